"""Runs model, oracle and shadow side by side, replays the model, and measures every point.

Three iterators of layers advance together, so that one layer of each is in memory; weights are
read once per layer for all who need them. What leaves this module are numbers, not tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytest_aprt import selftest
from pytest_aprt.arithmetic import Arithmetic
from pytest_aprt.capture import Engine, LayerStages
from pytest_aprt.compare import Metrics, Slice, View, judge, measure, non_finite
from pytest_aprt.errors import CaptureError
from pytest_aprt.oracle import Prelude, TransformersRunner
from pytest_aprt.pair import Pair
from pytest_aprt.replay import Context, Reference, replay, visible
from pytest_aprt.rungs import TensorRow, layer_rows, model_rows
from pytest_aprt.selftest import SelfTest
from pytest_aprt.stages import STAGES, Point, Stage

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many layers are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and its token ids; the text is empty where ids were given."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PointErrors:
    """The four errors of one point on one prompt.

    ``bracket`` names the missing stages that the replay had to bridge: an error of this point was
    born in one of them or here. ``born_non_finite`` counts NaN and Inf that appear although every
    parent is wholly finite.
    """

    point: Point
    prompt: int
    shape: tuple[int, ...]
    missing: bool = False
    total: Metrics | None = None
    weights: Metrics | None = None
    engine: Metrics | None = None
    local: Metrics | None = None
    worst: Slice | None = None
    born_non_finite: int = 0
    bracket: tuple[Point, ...] = ()


@dataclass(kw_only=True)
class Measurement:
    """All that the runs gave."""

    errors: list[PointErrors] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    self_tests: list[SelfTest] = field(default_factory=list)


class _Lane:
    """One prompt on its way through the layers: three runs, and what the replay must remember."""

    def __init__(self, index: int, prompt: Prompt, pair: Pair, runs: _Runs) -> None:
        self.index, self.prompt = index, prompt
        self.model = (LayerStages(*item) for item in runs.model.layers(prompt.tokens))
        self.oracle = runs.oracle.layers(prompt.tokens)
        self.shadow = runs.shadow.layers(prompt.tokens)
        self.prelude: Prelude = runs.shadow.prelude(prompt.tokens)
        self.model_replay = _Replay(pair, prompt, self.prelude)
        self.shadow_replay = _Replay(pair, prompt, self.prelude)


class _Runs:
    def __init__(self, pair: Pair, engine: Engine) -> None:
        self.model = engine
        self.oracle = TransformersRunner(pair.config, pair.oracle_weights)
        self.shadow = TransformersRunner(pair.config, pair.model_weights)


class _Replay:
    """Replays one side's captures, and bridges stages that the side does not expose."""

    def __init__(self, pair: Pair, prompt: Prompt, prelude: Prelude) -> None:
        self._pair, self._tokens, self._prelude = pair, prompt.tokens, prelude
        self._layer_input: tuple[Point, Tensor] | None = None
        self._gaps: dict[Point, tuple[Point, ...]] = {}
        self._values: dict[Point, Tensor] = {}

    def context(self, layer: int | None) -> Context:
        """Return what the stages of a layer need besides their inputs."""
        pair = self._pair
        return Context(
            facts=pair.oracle_facts,
            architecture=pair.architecture,
            weights={} if layer is None else pair.model_weights.layer(layer),
            call={} if layer is None else self._prelude.calls[layer],
            source=pair.model_weights,
            tokens=self._tokens,
        )

    def enter(self, captured: LayerStages) -> None:
        """Take in a layer's captured stages; the layer's input is all that stays of the last."""
        graph, layer = self._pair.graph, captured.layer
        entry = graph.layer_input(layer)
        kept = {entry: self._values[entry]} if entry in self._values else {}
        self._gaps = {p: gap for p, gap in self._gaps.items() if p in kept}
        self._values = kept | {Point(layer, name): t for name, t in captured.stages.items()}
        self._captured = set(self._values) - set(kept)

    def reference(self, point: Point, context: Context) -> Reference:
        """Return the replay of a point; where the point was not captured it stands in for it."""
        parents = self._pair.graph.parents(point)
        reference = replay(point.stage, context, [self._values[p] for p in parents])
        if point not in self._captured:
            self._values[point] = reference.value
            gap = {p for parent in parents for p in self._gaps.get(parent, ())} | {point}
            self._gaps[point] = tuple(sorted(gap, key=self._pair.graph.order))
        return reference

    def bracket(self, point: Point) -> tuple[Point, ...]:
        """Return the missing points that lie between this one and its captured ancestors."""
        parents = self._pair.graph.parents(point)
        gap = {p for parent in parents for p in self._gaps.get(parent, ())}
        return tuple(sorted(gap, key=self._pair.graph.order))

    def parents_finite(self, point: Point, view_of: Callable[[Stage], View]) -> bool:
        """Return whether everything that the point was computed from is finite."""
        return all(
            non_finite(self._values[p], view_of(STAGES[p.stage])) == 0
            for p in self._pair.graph.parents(point)
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matmuls this skinny gain nothing from a second thread, and lose tenfold if a core is busy.

    Measured on 2 cores beside a process that keeps both busy: a tiny model took 3.0 s with two
    threads, 0.2 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@_one_thread()
def measure_pair(
    pair: Pair,
    engine: Engine,
    prompts: Sequence[Prompt],
    points: Sequence[Point],
    arithmetic: Arithmetic,
    progress: Progress = lambda what, done, total: None,
) -> Measurement:
    """Run everything once and return the numbers.

    Args:
        pair: the opened model and oracle.
        engine: runs the model under test.
        prompts: at least one.
        points: those to judge.
        arithmetic: how the engine rounds.
        progress: told after every layer.
    """
    result = Measurement()
    runs = _Runs(pair, engine)
    shares_layers = getattr(engine, "shares_layers", False)
    lanes_at_once = (
        [list(enumerate(prompts))] if shares_layers else [[p] for p in enumerate(prompts)]
    )
    checks = selftest.Checks(pair, arithmetic.tolerance)
    wanted = frozenset(points)
    total = (pair.graph.n_layers + 1) * len(lanes_at_once)
    done = 0
    try:
        for first, group in enumerate(lanes_at_once):
            lanes = [_Lane(index, prompt, pair, runs) for index, prompt in group]
            for lane in lanes:
                checks.tokens(lane.prompt.tokens)
            for layer in [*range(pair.graph.n_layers), None]:
                for lane in lanes:
                    result.errors += _measure_layer(pair, lane, layer, wanted, arithmetic, checks)
                if first == 0:
                    result.tensors += model_rows(pair) if layer is None else layer_rows(pair, layer)
                    if layer == 0:
                        checks.oracle_layer(runs.oracle, lanes[0].prompt.tokens)
                done += 1
                progress("final norm and head" if layer is None else f"layer {layer}", done, total)
    except CaptureError as error:
        checks.fail("capture", str(error))
    result.self_tests = checks.results()
    return result


def _measure_layer(
    pair: Pair,
    lane: _Lane,
    layer: int | None,
    wanted: frozenset[Point],
    arithmetic: Arithmetic,
    checks: selftest.Checks,
) -> Iterator[PointErrors]:
    model, oracle, shadow = next(lane.model), next(lane.oracle), next(lane.shadow)
    replays = lane.model_replay
    replays.enter(model)
    lane.shadow_replay.enter(shadow)
    context = replays.context(layer)
    seen = visible(context) if layer is not None else None

    def view_of(stage: Stage) -> View:
        return View(stage, pair.oracle_facts, seen)

    checks.layer(lane.index, model)
    for stage in pair.graph.of_layer(layer):
        point, view = Point(layer, stage.name), view_of(stage)
        if layer in pair.witnesses and lane.index == 0:
            truth = lane.shadow_replay.reference(point, context)
            checks.replay(point, shadow.stages[stage.name], truth, view)
        if point not in wanted and stage.name in model.stages:
            continue
        reference = replays.reference(point, context)
        if point not in wanted:
            continue  # only the replay's way across a missing stage
        yield _point_errors(
            point, lane, model.stages, oracle.stages, shadow.stages, reference, view, view_of,
            arithmetic, checks,
        )  # fmt: skip


def _point_errors(
    point: Point,
    lane: _Lane,
    model: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    shadow: Mapping[str, Tensor],
    reference: Reference,
    view: View,
    view_of: Callable[[Stage], View],
    arithmetic: Arithmetic,
    checks: selftest.Checks,
) -> PointErrors:
    name, shape = point.stage, tuple(oracle[point.stage].shape)
    weights = measure(shadow[name], oracle[name], view)
    if name not in model:
        return PointErrors(
            point=point, prompt=lane.index, shape=shape, missing=True, weights=weights
        )
    value, replays = model[name], lane.model_replay
    local = measure(value, reference.value, view)
    born = local.non_finite_a if replays.parents_finite(point, view_of) else 0
    if lane.index == 0:
        checks.canary(point, value, reference, view)
    return PointErrors(
        point=point,
        prompt=lane.index,
        shape=shape,
        total=measure(value, oracle[name], view),
        weights=weights,
        engine=measure(value, shadow[name], view),
        local=local,
        worst=judge(value, reference, view, arithmetic.tolerance),
        born_non_finite=born,
        bracket=replays.bracket(point),
    )
