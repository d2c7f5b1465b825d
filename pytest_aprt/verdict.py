"""From errors to statuses, origins and one verdict.

Works on numbers alone. The status of a point is the first row of ``STATUSES`` that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pytest_aprt.compare import Metrics
from pytest_aprt.hints import hint_for
from pytest_aprt.measure import Measurement
from pytest_aprt.readings import PointErrors
from pytest_aprt.rungs import LADDER, Row
from pytest_aprt.rungs.config import FactRow
from pytest_aprt.rungs.diagnosis import OTHER_NUMBERS
from pytest_aprt.rungs.weights import STAGE_OF_TENSOR, TensorRow
from pytest_aprt.stages import STAGES, Point, StageGraph
from pytest_aprt.statuses import STATUSES

_SEVERITY = ("missing", "inconclusive", "pass", "noise", "drift", "inherited", "diverged")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A bound on cosine that a test asserts, and where it was set."""

    cosine: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One point's status, on the prompt where it is worst.

    ``follows`` names what it inherits from: an origin, a fact or a tensor.
    """

    point: Point
    status: str
    outcome: str
    reason: str
    follows: str | None
    threshold: Threshold
    errors: PointErrors | None  # None where the run ended before the point
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run concludes."""

    status: str
    summary: str
    rung: str | None
    points: list[Judged]
    origins: list[Judged] = field(default_factory=list)

    @property
    def first_divergence(self) -> Judged | None:
        """The first origin in computation order."""
        return self.origins[0] if self.origins else None


@dataclass(frozen=True)
class _Causes:
    """What is known to be broken, by the stage where it enters."""

    origins: frozenset[Point]
    facts: Mapping[str, str]  # stage -> fact that feeds it
    tensors: Mapping[Point, str]  # point -> tensor that it reads

    def born_in(self, e: PointErrors, graph: StageGraph) -> bool:
        """Return whether error was born at the point, or in its bracket.

        Behind an origin, K and V of earlier positions that were not captured may be anything.
        """
        return _is_origin(e) and not (e.stood_in and graph.ancestors(e.point) & self.origins)

    def behind(self, point: Point, graph: StageGraph) -> tuple[list[str], list[str]]:
        """Return what may explain a point's `engine` error, and what its `total` error."""
        line = sorted(graph.ancestors(point) | {point}, key=graph.order)
        facts = [f"config-{self.facts[p.stage]}" for p in line if p.stage in self.facts]
        origins = [str(p) for p in line if p in self.origins and p != point]
        tensors = [f"weights-{self.tensors[p]}" for p in line if p in self.tensors]
        return facts + origins, facts + tensors


def conclude(
    graph: StageGraph,
    selected: Sequence[Point],
    measurement: Measurement,
    facts: Sequence[FactRow],
    thresholds: Mapping[str, Threshold],
    rungs: Mapping[str, Sequence[Row]] = MappingProxyType({}),
    *,
    strict: bool = False,
) -> Verdict:
    """Judge every point and the run.

    Args:
        graph: the points of the model.
        selected: those to judge, in computation order.
        measurement: all errors, tensors and self-tests.
        facts: the config rung.
        thresholds: of each stage, on `engine` and `total`.
        rungs: the rows of the further rungs, by name.
        strict: fail every point whose `total` is below its threshold.
    """
    broken_facts = [row for row in facts if row.broken]
    broken_tensors = [row for row in measurement.tensors if row.broken]
    fed = {stage: row.name for row in reversed(broken_facts) for stage in row.feeds}
    causes = _Causes(
        origins=_origins(measurement.errors, graph, fed),
        facts=fed,
        tensors={_entry(row, graph): row.name for row in reversed(broken_tensors)},
    )
    unrun = "the run ended before this point"
    if measurement.stopped is not None:
        unrun = not_run(measurement.stopped)
    by_point: dict[Point, list[PointErrors]] = {point: [] for point in selected}
    for errors in measurement.errors:
        by_point[errors.point].append(errors)
    points = [
        _judge_point(point, by_point[point], causes, graph, thresholds[point.stage], strict, unrun)
        for point in selected
    ]
    origins = [judged for judged in points if judged.status == "diverged"]
    failed = [test for test in measurement.self_tests if not test.passed]
    judged = [p for p in points if p.status not in ("missing", "inconclusive")]
    left_open = [p for p in points if p.status == "inconclusive" and _is_by_total(p)]
    rung: str | None
    if failed:
        status, rung = "INCONCLUSIVE", "self-test"
        summary = f"the self-test {failed[0].name!r} failed: {failed[0].detail}"
    elif not judged and not left_open:
        status, rung = "INCONCLUSIVE", "stages"
        summary = "no point could be judged: " + (points[0].reason if points else "there is none")
    else:
        broken: dict[str, Sequence[Any]] = {
            "config": broken_facts,
            "weights": broken_tensors,
            "stages": origins,
            **{name: [row for row in rows if row.broken] for name, rows in rungs.items()},
        }
        rung = next((name for name in LADDER if broken.get(name)), None)
        status = "DIVERGED" if rung else _quiet_status(judged)
        summary = _summary(rung, broken, judged, graph, by_point)
        if rung is None and left_open:
            status, rung = "INCONCLUSIVE", "stages"
            summary = _open_in_words(left_open, judged)
    return Verdict(
        status=status, summary=f"{status}: {summary}", rung=rung, points=points, origins=origins
    )


def not_run(stopped: Point) -> str:
    """Return why nothing behind the first divergence was judged in a run that ended at it."""
    return f"not run: stopped at {stopped}, the first divergence (--aprt-stop-at-first)"


def _judge_point(
    point: Point,
    prompts: Sequence[PointErrors],
    causes: _Causes,
    graph: StageGraph,
    threshold: Threshold,
    strict: bool,
    unrun: str,
) -> Judged:
    if not prompts:
        return Judged(point=point, status="inconclusive", outcome="skipped", follows=None,
                      reason=unrun, threshold=threshold,
                      errors=None)  # fmt: skip
    judged = [_status(errors, causes, graph, threshold) for errors in prompts]
    worst = max(
        range(len(prompts)),
        key=lambda i: (_SEVERITY.index(judged[i][0]), _size(prompts[i])),
    )
    status, reason, follows = judged[worst]
    errors = prompts[worst]
    outcome = STATUSES[status]
    below = [e for e in prompts if e.total is not None and is_below(e.total, threshold.cosine)]
    if strict and below and outcome != "failed":
        outcome = "failed"
        errors = min(below, key=lambda e: e.total.cosine if e.total else math.inf)
        reason = f"--aprt-strict: total below its threshold; {reason}".rstrip("; ")
    return Judged(
        point=point,
        status=status,
        outcome=outcome,
        reason=reason,
        follows=follows,
        threshold=threshold,
        errors=errors,
        hint=hint_for(STAGES[point.stage], errors) if status == "diverged" else None,
    )


def _status(
    e: PointErrors, causes: _Causes, graph: StageGraph, threshold: Threshold
) -> tuple[str, str, str | None]:
    """Return status, reason and what it follows from, for one prompt."""
    if e.missing:
        return "missing", "the model's side does not expose this stage", None
    explains_engine, explains_total = causes.behind(e.point, graph)
    beyond, born_here = _is_origin(e), causes.born_in(e, graph)
    if e.only_total and not born_here:
        return _by_total_alone(e, explains_engine, threshold)
    if e.worst is None and not born_here and not (e.engine and e.engine.non_finite_a):
        return "inconclusive", "no row is finite on both sides", None
    if born_here and e.point.stage not in causes.facts:
        return "diverged", "", None
    if e.engine is not None and (beyond or is_below(e.engine, threshold.cosine)):
        if explains_engine:
            return "inherited", f"follows from {explains_engine[0]}", explains_engine[0]
        if e.engine.non_finite_a > e.engine.non_finite_b:
            return "inconclusive", "non-finite values whose origin was not captured", None
        return "drift", "rounding adds up: no origin upstream", None
    if e.total is not None and is_below(e.total, threshold.cosine):
        if explains_total:
            return "inherited", f"follows from {explains_total[0]}", explains_total[0]
        return "noise", "the quantised weights explain it", None
    return "pass", "", None


def _by_total_alone(
    e: PointErrors, causes: Sequence[str], threshold: Threshold
) -> tuple[str, str, str | None]:
    """Return status, reason and what it follows from, where there is neither shadow nor replay."""
    if e.total is None:
        return "inconclusive", "the oracle's side does not expose this stage", None
    if not e.total.compared and not (causes and e.total.non_finite_a > e.total.non_finite_b):
        return "inconclusive", "no row is finite on both sides", None
    if agrees(e.total, threshold.cosine):
        return "pass", "", None
    if causes:
        return "inherited", f"follows from {causes[0]}", causes[0]
    return "inconclusive", f"total is beyond its threshold, or a token's is; {e.only_total}", None


def agrees(total: Metrics, cosine: float) -> bool:
    """Return whether `total` alone shows that two stages agree.

    A cosine is blind to length, and whole tensors are blind beside one large token: the distance
    may be no larger than two vectors of one length have at that cosine, of every token.
    """
    if is_below(total, cosine):
        return False
    farthest = math.sqrt(max(2 - 2 * cosine, 0.0))
    worst = total.worst_token[1] if total.worst_token else total.rel_l2
    return not total.rel_l2 > farthest and not worst > farthest


def _origins(
    errors: Sequence[PointErrors], graph: StageGraph, fed: Mapping[str, str]
) -> frozenset[Point]:
    """Return the points where error was born, but those that a broken fact feeds."""
    found: set[Point] = set()
    for e in sorted(errors, key=lambda e: graph.order(e.point)):
        causes = _Causes(origins=frozenset(found), facts={}, tensors={})
        if e.point.stage not in fed and causes.born_in(e, graph):
            found.add(e.point)
    return frozenset(found)


def _is_origin(e: PointErrors) -> bool:
    return e.born_non_finite > 0 or (e.worst is not None and e.worst.excess > 1)


def is_below(metrics: Metrics, cosine: float) -> bool:
    """Return whether metrics miss a cosine threshold; new non-finite values and a norm that
    vanished on one side do."""  # noqa: D205, D209
    if metrics.non_finite_a > metrics.non_finite_b:
        return True
    if metrics.compared == 0 or metrics.rel_l2 == 0:
        return False
    return not metrics.cosine >= cosine


def _size(e: PointErrors) -> float:
    """Order prompts of one status: the larger local excess, then the larger distance, is worse."""
    excess = e.worst.excess if e.worst else 0.0
    distance = e.total.rel_l2 if e.total and e.total.compared else 0.0
    return max(excess - 1, 0.0) + distance


def _entry(row: TensorRow, graph: StageGraph) -> Point:
    stage = STAGE_OF_TENSOR.get(row.suffix)
    if stage is None or stage not in {s.name for s in graph.stages}:
        return graph.points[0]  # no stage reads it; an engine may, anywhere
    layer = row.layer if row.layer is not None else (0 if STAGES[stage].per_layer else None)
    return Point(layer, stage)


def _quiet_status(judged: Sequence[Judged]) -> str:
    loud = [p for p in judged if p.status in ("noise", "drift")]
    return "QUANTISATION_NOISE" if loud else "PARITY"


def _summary(
    rung: str | None,
    broken: Mapping[str, Sequence[Any]],
    judged: Sequence[Judged],
    graph: StageGraph,
    by_point: Mapping[Point, Sequence[PointErrors]],
) -> str:
    if rung == "stages":
        return _first_origin(broken["stages"], graph, by_point)
    if rung is not None:
        first, *more = broken[rung]
        further = _further(len(more), _NOUNS.get(rung, "test")) + _origins_too(broken["stages"])
        strange = sum(row.reason.startswith(OTHER_NUMBERS) for row in broken["weights"])
        if rung == "weights" and strange >= _TOO_MANY * graph.n_layers:
            further += "; the oracle may not be the model that this one was made from"
        return f"{rung} {first.name} {first.reason}{further}"
    lowest = min(judged, key=_total_cosine)
    cosine, where = _total_cosine(lowest), lowest.point
    if _quiet_status(judged) == "PARITY":
        alone = " on total alone" if any(_is_by_total(p) for p in judged) else ""
        return f"all {len(judged)} points agree{alone} (lowest cosine {cosine:.6f} at {where})"
    counts = {s: sum(p.status == s for p in judged) for s in ("noise", "drift")}
    why = "the weights explain the distance" if counts["noise"] else "rounding adds up"
    return (
        f"no stage adds error of its own; {why} "
        f"(lowest cosine {cosine:.4f} at {where}; {counts['noise']} points in noise, "
        f"{counts['drift']} in drift)"
    )


def _is_by_total(judged: Judged) -> bool:
    e = judged.errors
    return e is not None and bool(e.only_total) and e.total is not None and e.total.compared > 0


def _open_in_words(left_open: Sequence[Judged], judged: Sequence[Judged]) -> str:
    first = left_open[0]
    errors = first.errors
    assert errors is not None and errors.total is not None
    agree = len([p for p in judged if p.status == "pass"])
    return (
        f"total is beyond its threshold at {len(left_open)} of {len(left_open) + agree} points, "
        f"first at {first.point} (cosine {errors.total.cosine:.4f}, rel_l2 "
        f"{errors.total.rel_l2:.2g}, threshold {first.threshold.cosine:g}, for every token too); "
        f"{errors.only_total}, "
        "so quantised weights and a fault cannot be told apart"
    )


def _total_cosine(judged: Judged) -> float:
    total = judged.errors.total if judged.errors else None
    return total.cosine if total and not math.isnan(total.cosine) else math.inf


_TOO_MANY = 2
"""Tensors per layer with other numbers: what a fault spoils is of one kind, or in another way."""

_NOUNS = {"config": "fact", "weights": "tensor", "decode": "step"}
"""What a row of a rung is."""


def _first_origin(
    origins: Sequence[Judged], graph: StageGraph, by_point: Mapping[Point, Sequence[PointErrors]]
) -> str:
    first = origins[0]
    text = f"first at {first.point} ({size_of(first)}"
    good = previous_good(first, graph, by_point)
    if good is not None:
        was = f"{good.local.rel_l2:.0e}" if good.local else "finite"
        text += f"; {good.point} was {was}"
    text += ")"
    others = [str(o.point) for o in origins[1:]]
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        text += f"; {len(others)} further origin{'s' * (len(others) > 1)}: {names}"
    return text


def size_of(judged: Judged) -> str:
    """Return the size of an origin in words: its worst slice against the tolerance."""
    errors = judged.errors
    if errors is None:
        return ""
    if errors.born_non_finite:
        return f"{errors.born_non_finite} non-finite values, all inputs are finite"
    if errors.worst is None:
        return ""
    where = "" if errors.worst.axis == "all" else f" at {errors.worst.axis} {errors.worst.index}"
    return f"rel_l2 {errors.worst.rel_l2:.3g}{where}, tolerance {errors.worst.tolerance:.0e}"


def previous_good(
    judged: Judged, graph: StageGraph, by_point: Mapping[Point, Sequence[PointErrors]]
) -> PointErrors | None:
    """Return the errors of the nearest captured ancestor that is no origin itself."""
    prompt = judged.errors.prompt if judged.errors else 0
    ancestors = sorted(graph.ancestors(judged.point), key=graph.order, reverse=True)
    for point in ancestors:
        for errors in by_point.get(point, ()):
            if errors.prompt == prompt and not errors.missing and not _is_origin(errors):
                return errors
    return None


def _further(count: int, noun: str) -> str:
    return f"; {count} further {noun}{'s' * (count > 1)}" if count else ""


def _origins_too(origins: Sequence[Judged]) -> str:
    if not origins:
        return ""
    return f"; and {len(origins)} origin{'s' * (len(origins) > 1)}, first {origins[0].point}"
