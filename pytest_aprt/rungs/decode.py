"""The decode rung: steps with the KV cache, teacher-forced by the oracle's greedy tokens.

Each step is compared with the model's own prefill of the same tokens, which finds faults in the
cache's state, and its logits with those of shadow and oracle, as the logits rung does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_aprt.errors import AprtError, CaptureError, blame
from pytest_aprt.matrices import together
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.rungs import Row, decode_names, unavailable
from pytest_aprt.rungs.logits import SIDES, Logits, heads, row_of, summarised
from pytest_aprt.stages import STAGES, Point

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Finals

_FLOOR = 1e-4
"""Distance between a step and the prefill that rounding explains: other kernels run for one row.
Healthy float32 engines stay below 3e-6 on the fixtures."""

_MARGIN = 3.0
"""An engine that rounds differs from its own prefill by no more than this many times what it
differs from the shadow: both are draws of the same rounding."""

_GROWTH = 10.0
"""Growth of the model's distance from the shadow over the steps that counts as accumulating."""


@dataclass(frozen=True)
class _Step:
    """One step: the distance of every captured stage from the prefill, and the logits."""

    number: int
    first_wrong: tuple[Point, float, float] | None  # point, distance, tolerance
    worst: tuple[Point, float] | None
    logits: Logits
    engine: float  # relative L2 of the logits against the shadow's
    weights: float  # of the shadow's against the oracle's


@torch.no_grad()
def decode_rows(pair: Pair, engine: Any, finals: Sequence[Finals], steps: int) -> list[Row]:
    """Return the decode rung, on the longest prompt.

    Args:
        pair: the opened model and oracle.
        engine: the engine under test, as ``measure_pair`` was given it.
        finals: what the prefills gave.
        steps: how many tokens are decoded.

    Raises:
        AprtError: never for what the engine does wrong; that breaks the rung.
    """
    asked = decode_names(steps)
    decode = getattr(getattr(engine, "raw", engine), "decode", None)
    if not asked:
        return []
    if not callable(decode):
        return unavailable(asked, "the engine has no decode(tokens, forced)")
    if not finals:
        return unavailable(asked, "the run ended before the head")
    longest = max(finals, key=lambda f: len(f.prompt.tokens))
    prompt, context = longest.prompt.tokens, pair.oracle_facts.context
    if len(prompt) + steps > context:
        return unavailable(asked, f"the prompt and {steps} steps exceed the context of {context}")
    if "lm_head" not in longest.model:
        return unavailable(asked, "the model's side does not expose lm_head")
    oracle = TransformersRunner(pair.config, pair.oracle_weights)
    forced = _greedy(oracle, prompt, longest.oracle["lm_head"], steps)
    try:
        found = _steps(pair, engine, decode, oracle, prompt, forced)
    except CaptureError as error:
        return [Row(name=name, status="broken", reason=str(error)) for name in asked[:1]] + (
            unavailable(asked[1:], "the engine's decode failed")
        )
    before = _apart(longest.model["lm_head"], longest.shadow["lm_head"])
    text = _text_row(pair, longest, forced, found)
    return [*(_step_row(pair, step) for step in found), _growth_row(found, before), text]


def _greedy(
    oracle: TransformersRunner, prompt: Sequence[int], logits: Tensor, steps: int
) -> tuple[int, ...]:
    """Return the oracle's tokens, given its logits after the prompt."""
    forced = [int(logits.argmax())]
    while len(forced) < steps:
        (last,) = deque(oracle.layers((*prompt, *forced)), maxlen=1)  # the others need not stay
        forced.append(int(last.stages["lm_head"].argmax()))
    return tuple(forced)


def _steps(
    pair: Pair,
    engine: Any,
    decode: Callable[..., Any],
    oracle: TransformersRunner,
    prompt: Sequence[int],
    forced: Sequence[int],
) -> list[_Step]:
    """Run all sides over prompt and steps, side by side, and compare them."""
    shadow = TransformersRunner(pair.config, pair.model_weights)
    ids = (*prompt, *forced)
    runs: list[Callable[[], Any]] = [
        lambda: _decoded(pair, decode, prompt, forced),
        lambda: _last_rows(engine.layers(ids), len(forced)),
        lambda: _last_rows(shadow.layers(ids), len(forced)),
        lambda: _last_rows(oracle.layers(ids), len(forced), only=_NORM),
    ]
    steps, prefill, reference, truth = together(runs)
    wrong: list[tuple[Point, float, float] | None] = [None] * len(forced)
    worst: list[tuple[Point, float] | None] = [None] * len(forced)

    def compare(point: Point, step: int, own: Tensor, prefill: Tensor, reference: Tensor) -> None:
        distance = _apart(own, prefill)
        tolerance = max(_FLOOR, _MARGIN * _apart(prefill, reference))
        if not distance <= tolerance and wrong[step] is None:
            wrong[step] = point, distance, tolerance
        before = worst[step]
        if before is None or not distance <= before[1]:
            worst[step] = point, distance

    for point in pair.graph.points:
        for step, found in enumerate(steps):
            if point in prefill and point in found:
                compare(point, step, found[point], prefill[point][step], reference[point][step])
    sides = {"model": prefill, "shadow": reference, "oracle": truth}
    normed = {side: rows[_NORM] for side, rows in sides.items() if _NORM in rows}
    return _with_logits(pair, steps, normed, wrong, worst, compare)


_NORM = Point(None, "final_norm")


def _last_rows(
    layers: Iterable[tuple[int | None, Mapping[str, Tensor]]], count: int, only: Point | None = None
) -> dict[Point, Tensor]:
    """Return the last ``count`` rows of every stage that has one per token, or of one stage."""
    return {
        point: tensor[-count:].clone()
        for layer, stages in layers
        for name, tensor in stages.items()
        if STAGES[name].shape[0] == "T" and (point := Point(layer, name)) in (only or point,)
    }


def _with_logits(
    pair: Pair,
    steps: Sequence[Mapping[Point, Tensor]],
    normed: dict[str, Tensor],
    wrong: Sequence[tuple[Point, float, float] | None],
    worst: Sequence[tuple[Point, float] | None],
    compare: Callable[[Point, int, Tensor, Tensor, Tensor], None],
) -> list[_Step]:
    """Add the logits of every step, of all sides."""
    head = Point(None, "lm_head")
    own = torch.stack([found[head] for found in steps])
    parts = list(heads(pair, {"model": normed["shadow"], **normed}))
    full = {side: torch.cat([part[side] for part in parts], dim=1) for side in SIDES}
    summed = []
    for step in range(len(steps)):
        if "model" in normed:
            compare(head, step, own[step], full["model"][step], full["shadow"][step])
        sides = {"model": own, "shadow": full["shadow"], "oracle": full["oracle"]}
        summed.append(summarised([{side: t[step : step + 1] for side, t in sides.items()}]))
    return [
        _Step(step + 1, wrong[step], worst[step], summed[step],
              _apart(own[step], full["shadow"][step]),
              _apart(full["shadow"][step], full["oracle"][step]))
        for step in range(len(steps))
    ]  # fmt: skip


def _decoded(
    pair: Pair, decode: Callable[..., Any], prompt: Sequence[int], forced: Sequence[int]
) -> list[dict[Point, Tensor]]:
    """Return every step's stages as (X,) rows.

    Raises:
        CaptureError: the engine raises, or yields something else than steps.
    """
    sizes = pair.oracle_facts.sizes(1)
    found: list[dict[Point, Tensor]] = []
    for number, layers in enumerate(_guarded(decode, prompt, forced), 1):
        step: dict[Point, Tensor] = {}
        for layer, stages in layers:
            for name, value in stages.items():
                stage = STAGES.get(name)
                if stage is None or not (stage.shape[0] == "T" or name == "lm_head"):
                    continue
                row = torch.as_tensor(value).detach().to("cpu", torch.float32).reshape(-1)
                expected = math.prod(sizes[symbol] for symbol in stage.shape)
                if row.numel() != expected:
                    raise CaptureError(
                        f"decode yielded {Point(layer, name)} with {row.numel()} values in step "
                        f"{number}, expected {expected}: those of the one new token"
                    )
                step[Point(layer, name)] = row.clone()
        if Point(None, "lm_head") not in step:
            raise CaptureError(f"decode yielded no lm_head in step {number}: expected its logits")
        found.append(step)
    if len(found) != len(forced):
        raise CaptureError(f"decode yielded {len(found)} steps, expected {len(forced)}")
    return found


def _guarded(
    decode: Callable[..., Any], prompt: Sequence[int], forced: Sequence[int]
) -> Iterator[Any]:
    try:
        for step in decode(list(prompt), list(forced)):
            yield list(step)
    except AprtError:
        raise
    except Exception as error:
        raise CaptureError(f"decode raised {blame(error)}") from error


def _step_row(pair: Pair, step: _Step) -> Row:
    row = row_of(f"step{step.number}", step.logits, 0, pair)
    figures = {**row.figures, "engine_rel_l2": step.engine, "weights_rel_l2": step.weights}
    figures.pop("prompt")
    if step.worst is not None:
        figures |= {"worst_point": str(step.worst[0]), "worst_rel_l2": step.worst[1]}
    status, reason = row.status, row.reason
    if step.first_wrong is not None:
        point, distance, tolerance = step.first_wrong
        figures["first_point"] = str(point)
        status = "broken"
        reason = (
            f"first at {point}: the step with the cache is {distance:.3g} from the model's own "
            f"prefill of the same tokens, tolerance {tolerance:.0e}"
        )
    return Row(name=row.name, status=status, reason=reason, figures=figures)


def _growth_row(steps: Sequence[_Step], before: float) -> Row:
    engine = [before, *(step.engine for step in steps)]
    weights = [step.weights for step in steps]
    expected = max(1.0, weights[-1] / weights[0] if weights[0] else 1.0)
    limit = _GROWTH * expected * max(before, _FLOOR)
    grows = engine[-1] > engine[1]  # else one step is wrong, and not more and more
    reason = ""
    if not engine[-1] <= limit and (grows or math.isnan(engine[-1])):
        reason = (
            f"the distance from the shadow grows from {before:.1e} at the prefill to "
            f"{engine[-1]:.1e} at step {len(steps)}, that of the shadow from the oracle by "
            f"{expected:.2g}: error accumulates in the cache"
        )
    figures = {"engine": engine, "weights": weights}
    return Row(name="growth", status="broken" if reason else "pass", reason=reason, figures=figures)


def _text_row(pair: Pair, prefill: Finals, forced: Sequence[int], steps: Sequence[_Step]) -> Row:
    """Show what the oracle says, and the model up to where it parts from that.

    A difference has its cause in other tests.
    """
    theirs = [*forced, int(steps[-1].logits.favourites["oracle"][0])]
    own = [int(prefill.model["lm_head"].argmax())]
    own += [int(step.logits.favourites["model"][0]) for step in steps]
    same = next((n for n, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), len(own))
    own = own[: same + 1]
    figures: dict[str, Any] = {"model": own, "oracle": theirs}
    try:
        said = [pair.tokenizer.decode(ids) for ids in (own, theirs)]
    except AprtError:
        said = [", ".join(map(str, ids)) for ids in (own, theirs)]
    figures |= {"model_text": said[0], "oracle_text": said[1]}
    reason = f"the model goes on with {said[0]!r}, the oracle with {said[1]!r}"
    return Row(name="text", status="pass" if own == theirs else "differs", reason=reason,
               figures=figures)  # fmt: skip


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    norm = float(b.norm())
    error = float((a - b).norm())
    return error / norm if norm else (math.inf if error else 0.0)
