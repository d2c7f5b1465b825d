"""Runs model, oracle and shadow side by side, replays the model, and measures every point.

Three iterators of layers advance together, so that one layer of each is in memory; weights are
read once per layer for all who need them. What leaves this module are numbers, not tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytest_aprt import selftest
from pytest_aprt.architectures import HEAD
from pytest_aprt.arithmetic import EXACT, PROFILES, Arithmetic, Profile
from pytest_aprt.bridges import BridgedReplay
from pytest_aprt.buffers import hold_on
from pytest_aprt.capture import Engine, LayerStages
from pytest_aprt.compare import (
    TOP_DIFFS,
    Comparison,
    Metrics,
    judge,
    judge_and_measure,
    measure,
    measure_each,
)
from pytest_aprt.consensus import Group, Tally, group_of, settled
from pytest_aprt.errors import CaptureError
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.matrices import Matrix, Watch, compute_threads, together, until
from pytest_aprt.oracle import Prelude, TransformersRunner
from pytest_aprt.pair import Pair
from pytest_aprt.readings import Finals, PointErrors, Prompt, Reading, explains
from pytest_aprt.replay import Context, UnfitError, visible
from pytest_aprt.rounding import fits
from pytest_aprt.rungs.weights import TensorRow, Watched, layer_rows, model_rows
from pytest_aprt.selftest import SelfTest
from pytest_aprt.stages import STAGES, Point, Stage
from pytest_aprt.stopping import Decider
from pytest_aprt.views import View
from pytest_aprt.weights import FEW, streams

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many layers are done, and how many there are."""

AHEAD = 256
"""Tokens up to which the replay's products are formed with those of the runs and kept: beyond, the
products cost more than reading the weights once more."""

_NORM = "final_norm"

Keep = Callable[[str, int, Iterator[LayerStages]], Iterator[LayerStages]]
"""Called with the side and the index of the prompt; sees every layer that passes."""


@dataclass(kw_only=True)
class Measurement:
    """All that the runs gave; ``arithmetics`` is how the engine computes every group of points.

    ``stopped`` is the first divergence where the runs ended once it was certain.
    """

    errors: list[PointErrors] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    self_tests: list[SelfTest] = field(default_factory=list)
    arithmetics: Mapping[Group, Arithmetic] = field(default_factory=dict)
    finals: list[Finals] = field(default_factory=list)
    stopped: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Asks for the runs to end early; ``fed`` are the stages that a broken fact feeds."""

    fed: frozenset[str] = frozenset()


class _Lane:
    """One prompt on its way through the layers: three runs, and what the replay must remember."""

    def __init__(self, index: int, prompt: Prompt, pair: Pair, runs: _Runs, keep: Keep) -> None:
        self.index, self.prompt = index, prompt
        self.finals: list[Finals] = []
        layers = (LayerStages(*item) for item in runs.model.layers(prompt.tokens))
        self.model = keep("model", index, layers)
        self.oracle = keep("oracle", index, runs.oracle.layers(prompt.tokens))
        self.shadow, self.shadow_runner = runs.shadow.layers(prompt.tokens), runs.shadow
        self.oracle_runner = runs.oracle
        self.prelude: Prelude = runs.shadow.prelude(prompt.tokens)
        self.logits: dict[str, Tensor] = {}
        self.model_replay = BridgedReplay(
            pair, prompt.tokens, self.prelude, runs.profile, runs.tally
        )
        self.shadow_replay = BridgedReplay(
            pair, prompt.tokens, self.prelude, PROFILES["float32"], Tally()
        )

    def heads_of(
        self, pair: Pair, model: BuiltinRunner | LayerStages
    ) -> Iterator[Callable[[], None]]:
        """Yield what forms the logits of all positions while a large head passes, if they are few.

        Shadow and oracle ask for theirs themselves, which are formed once.
        """
        shows = isinstance(model, BuiltinRunner) or _NORM in model.stages
        if len(self.prompt.tokens) > FEW or not shows:
            return
        if not streams(pair.oracle_weights.matrix(HEAD)):
            return
        runs = ("model", model), ("shadow", self.shadow_runner), ("oracle", self.oracle_runner)
        for side, run in runs:
            weights = pair.oracle_weights if side == "oracle" else pair.model_weights
            yield partial(self._head_of, side, run, weights.matrix(HEAD))

    def _head_of(
        self, side: str, run: BuiltinRunner | LayerStages | TransformersRunner, head: Matrix
    ) -> None:
        until(lambda: _NORM in run.stages)
        self.logits[side] = head.times(run.stages[_NORM].detach())


class _Runs:
    def __init__(self, pair: Pair, engine: Engine, profile: Profile) -> None:
        self.model, self.profile, self.tally = engine, profile, Tally()
        self.oracle = TransformersRunner(pair.config, pair.oracle_weights)
        self.shadow = TransformersRunner(pair.config, pair.model_weights)


@torch.no_grad()
@compute_threads()
def measure_pair(
    pair: Pair,
    engine: Engine,
    prompts: Sequence[Prompt],
    points: Sequence[Point],
    profile: Profile,
    progress: Progress = lambda what, done, total: None,
    keep: Keep = lambda side, prompt, layers: layers,
    stop: Stop | None = None,
) -> Measurement:
    """Run everything once and return the numbers.

    Args:
        pair: the opened model and oracle.
        engine: runs the model under test.
        prompts: at least one.
        points: those to judge.
        profile: how the engine may round.
        progress: told after every layer.
        keep: wraps the layers of the sides ``model`` and ``oracle`` on every prompt.
        stop: ends the runs once the first divergence is certain; without it they go on.
    """
    hold_on()
    result = Measurement()
    runs = _Runs(pair, engine, profile)
    shares_layers = getattr(engine, "shares_layers", False)
    lanes_at_once = (
        [list(enumerate(prompts))] if shares_layers else [[p] for p in enumerate(prompts)]
    )
    checks = selftest.Checks(pair.oracle_facts.vocab)
    cut, decider = False, None
    if stop is not None:
        decider = Decider(pair.graph, len(prompts), stop.fed, runs.tally)
    wanted = frozenset(points)
    total = (pair.graph.n_layers + 1) * len(lanes_at_once)
    done = 0
    try:
        for first, group in enumerate(lanes_at_once):
            lanes = [_Lane(index, prompt, pair, runs, keep) for index, prompt in group]
            for lane in lanes:
                checks.tokens(lane.prompt.tokens)
            for layer in [*range(pair.graph.n_layers), None]:
                watched = Watched(pair, layer)
                for lane, passed in zip(
                    lanes, _advanced(pair, lanes, layer, engine, watched), strict=True
                ):
                    result.errors += _measure_layer(pair, lane, passed, wanted, checks)
                del passed  # before the runs make the next layer's stages
                if first == 0:
                    result.tensors += (
                        model_rows(pair, watched)
                        if layer is None
                        else layer_rows(pair, layer, watched)
                    )
                    if layer == 0:
                        checks.oracle_layer(runs.oracle, lanes[0].prompt.tokens)
                done += 1
                progress("final norm and head" if layer is None else f"layer {layer}", done, total)
                if decider is not None and decider.reached(result.errors, layer):
                    cut = True
                    break
            result.finals += [finals for lane in lanes for finals in lane.finals]
    except CaptureError as error:
        checks.fail(error.test, str(error))
    if decider is not None and cut:
        result.stopped = decider.first(result.errors)
        if result.stopped is None:  # a later prompt made it depend on layers that were left out
            return measure_pair(pair, engine, prompts, points, profile, progress, keep)
        result.errors, result.finals = decider.certain(result.errors), []
    result.arithmetics = runs.tally.arithmetics()
    result.errors = settled(result.errors, result.arithmetics)
    result.self_tests = checks.results()
    return result


class _Passed(NamedTuple):
    """One layer of the three runs on one prompt, and what its replay needs besides."""

    model: LayerStages
    shadow: LayerStages
    oracle: LayerStages
    context: Context


def _advanced(
    pair: Pair, lanes: Sequence[_Lane], layer: int | None, engine: Engine, watch: Watch
) -> list[_Passed]:
    """Take every run one layer on.

    All products with weights are formed together: those of the runs, and those that the replay of
    the engine's stages asks for. An engine that is not our own may be anything, and goes first.
    """
    ours = engine if isinstance(engine, BuiltinRunner) and len(lanes) == 1 else None
    models = [] if ours else [next(lane.model) for lane in lanes]
    stages = [{}] if ours else [model.stages for model in models]
    contexts = [
        lane.model_replay.enter(LayerStages(layer, known))
        for lane, known in zip(lanes, stages, strict=True)
    ]
    runs: list[Callable[[], Any]] = [partial(next, lane.model) for lane in lanes if ours]
    runs += [partial(next, lane.shadow) for lane in lanes]
    runs += [partial(next, lane.oracle) for lane in lanes]
    for lane in lanes:
        lane.shadow_replay.enter(LayerStages(layer, {}))
        if len(lane.prompt.tokens) <= AHEAD:
            replays = lane.model_replay
            runs += replays.products_of(ours) if ours else replays.products()
            if layer in pair.witnesses and lane.index == 0 and len(lanes) == 1:
                runs += lane.shadow_replay.products_of(lane.shadow_runner)
        if layer is None and len(lanes) == 1:
            runs += lane.heads_of(pair, ours or models[0])
    found = iter([*models, *together(runs, watch)])
    model, shadow, oracle = ([next(found) for _ in lanes] for _ in range(3))
    if ours:
        lanes[0].model_replay.take(model[0].stages)
    for lane, run in zip(lanes, shadow, strict=True):
        lane.model_replay.stand_in(run.stages)
        lane.shadow_replay.take(run.stages)
    return [_Passed(*row) for row in zip(model, shadow, oracle, contexts, strict=True)]


def _measure_layer(
    pair: Pair,
    lane: _Lane,
    passed: _Passed,
    wanted: frozenset[Point],
    checks: selftest.Checks,
) -> Iterator[PointErrors]:
    model, shadow, oracle, context = passed
    layer = model.layer
    if layer is None:
        lane.finals.append(
            Finals(prompt=lane.prompt, model=model.stages, shadow=shadow.stages,
                   oracle=oracle.stages, logits=lane.logits)
        )  # fmt: skip
    seen = visible(context) if layer is not None else None

    replays = lane.model_replay

    def view_of(stage: Stage) -> View:
        return View(stage, pair.oracle_facts, seen, replays.first)

    checks.layer(lane.index, model)
    ours, theirs, own = map(replays.cut, (model.stages, oracle.stages, shadow.stages))
    for stage in pair.graph.of_layer(layer):
        point, view = Point(layer, stage.name), view_of(stage)
        if layer in pair.witnesses and lane.index == 0:
            truth = lane.shadow_replay.reference(point)
            whole = View(stage, pair.oracle_facts, seen)
            checks.replay(point, shadow.stages[stage.name], truth, whole)
        if point not in wanted:
            continue
        yield _point_errors(point, lane, ours, theirs, own, view, view_of, checks)


def _point_errors(
    point: Point,
    lane: _Lane,
    model: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    shadow: Mapping[str, Tensor],
    view: View,
    view_of: Callable[[Stage], View],
    checks: selftest.Checks,
) -> PointErrors:
    name, shape = point.stage, tuple(oracle[point.stage].shape)
    of_weights = Comparison(shadow[name], oracle[name])
    if name not in model:
        (weights,) = measure_each([of_weights], view)
        return PointErrors(
            point=point, prompt=lane.index, shape=shape, missing=True, weights=weights
        )
    value, replays = model[name], lane.model_replay
    of_total = Comparison(value, oracle[name])
    of_engine = Comparison(value, shadow[name], pictured=True)
    readings, (total, weights, engine) = readings_of(
        point, value, replays, view, [of_total, of_weights, of_engine]
    )
    exact = readings[0]
    born = exact.local.non_finite_a
    if born and not replays.parents_finite(point, view_of):
        born = 0
    if lane.index == 0:
        for side in (value, oracle[name]):  # of the oracle where the engine has no finite stage
            checks.canary(point, side, view)
    return PointErrors(
        point=point,
        prompt=lane.index,
        shape=shape,
        total=total,
        weights=weights,
        engine=engine,
        local=exact.local,
        worst=exact.worst,
        readings=readings,
        born_non_finite=born,
        bracket=replays.bracket(point),
        stood_in=replays.stood_in(point),
    )


def readings_of(
    point: Point,
    value: Tensor,
    replays: BridgedReplay,
    view: View,
    beside: Sequence[Comparison] = (),
) -> tuple[tuple[Reading, ...], list[Metrics]]:
    """Return the exact reading and, where that leaves an error, all that explain it.

    ``beside`` is compared on the way, so that what is large is made once.
    """
    bracket = replays.bracket(point)
    group = group_of(point, bracket)
    reference = replays.reference(point, EXACT)
    of_local = Comparison(value, reference.value, TOP_DIFFS, pictured=True)
    worst, (local, *metrics) = judge_and_measure(
        value, reference, view, EXACT.tolerance, [of_local, *beside]
    )
    first = Reading(arithmetic=EXACT, local=local, worst=worst)
    votes = not replays.stood_in(point)
    if first.explains:
        replays.tally.add(group, (first,) if votes and first.worst is not None else ())
        return (first,), metrics
    kinds = dict.fromkeys(STAGES[p.stage].kind for p in [*bracket, point])
    others = [a for a in replays.profile.arithmetics(kinds) if a is not EXACT]
    leaders = [a for a in replays.tally.leaders(group) if a in others]
    read = (_explaining(point, value, replays, view, arithmetic) for arithmetic in leaders)
    led = [reading for reading in read if reading is not None]
    if leaders and len(led) == len(leaders):
        replays.tally.add(group, led if votes else ())
        return (first, *led), metrics
    dtype = next((d for d in ("bfloat16", "float16") if fits(value, d)), "float32")
    found = [
        reading
        for arithmetic in others
        if arithmetic.storage in ("float32", dtype)
        and (reading := _explaining(point, value, replays, view, arithmetic)) is not None
        and _is_far_better(reading, first, across=bool(bracket))
    ]
    replays.tally.add(group, found if votes else ())
    return (first, *found), metrics


def _explaining(
    point: Point, value: Tensor, replays: BridgedReplay, view: View, arithmetic: Arithmetic
) -> Reading | None:
    """Return the reading in an arithmetic, None where that leaves an error or does not fit."""
    try:
        reference = replays.reference(point, arithmetic)
    except UnfitError:
        return None
    worst = judge(value, reference, view, arithmetic.tolerance)
    if not explains(worst):
        return None
    local = measure(value, reference.value, view, TOP_DIFFS, pictured=True)
    return Reading(arithmetic=arithmetic, local=local, worst=worst)


def _is_far_better(reading: Reading, exact: Reading, *, across: bool) -> bool:
    """Rounding that is emulated leaves a tenth of the error at most; a dtype shows in the bits.

    Sums in float16 are not emulated, but an engine has them only where it says so.

    Across missing stages the inputs of a rounding are known to a few ulps only, and a block that
    goes the other way leaves more. What lies on the edge between two roundings does not count: one
    such value that went the other way may be a good part of a small matmul's error.
    """
    if reading.arithmetic.storage != "float32" or reading.arithmetic.sums != "none":
        return True
    better = 2 if across else 10
    if better * reading.local.rel_l2 <= exact.local.rel_l2:
        return True
    return not across and better * reading.undoubted <= exact.undoubted
