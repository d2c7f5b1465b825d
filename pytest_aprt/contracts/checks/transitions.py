"""Where a sequence of stages turns from good to bad, on the model or with a fault planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.contracts.checks.points import plain
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject
from pytest_aprt.errors import AprtError
from pytest_aprt.measure import Measurement
from pytest_aprt.stages import Point, point_id, stage_named

if TYPE_CHECKING:
    from pytest_aprt.verdict import Verdict

CHANGES: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "roll": lambda x: np.roll(x, 1, axis=-1),
    "scale": lambda x: x * np.float32(1.25),
    "negate": lambda x: -x,
    "zero": np.zeros_like,
}


def single_transition(
    subject: Subject,
    *,
    stages: list[str],
    layer: int,
    threshold: float,
    error: str,
    plant: str | None,
    change: str,
) -> Finding:
    """Follow the cosine along the stages: it must fall below the threshold exactly once."""
    if plant is None:
        cosines = _of_report(subject, stages, layer, error)
    else:
        cosines = _of_planted(subject, stages, layer, error, _name(plant), change)
    names = [point_id(layer, stage) for stage in stages]
    # NaN is below every threshold.
    good = [cosine >= threshold for cosine in cosines]
    falls = [i for i in range(len(stages) - 1) if good[i] and not good[i + 1]]
    chain = ", ".join(f"{n} {c:.6f}" for n, c in zip(stages, cosines, strict=True))
    pairs = [f"{names[i]} -> {names[i + 1]}" for i in falls]
    held = len(falls) == 1
    detail = f"{error} cosine crosses {threshold:g} at {', '.join(pairs) or 'no pair'} ({chain})"
    if plant is not None and held:
        held = stages[falls[0] + 1] == _name(plant)
        detail += f"; the fault was planted in {point_id(layer, _name(plant))}"
    values = {"pairs": pairs, "cosines": [plain(c) for c in cosines]}
    return Finding(held=held, detail=detail, values=values)


def fault_found(subject: Subject, *, plant: str, layer: int, change: str) -> Finding:
    """Plant a fault: the verdict must name it, and nothing else."""
    where = _point(layer, _name(plant))
    found = _verdict(subject, layer, _name(plant), change)
    origins = [str(judged.point) for judged in found.origins]
    return Finding(
        held=origins == [str(where)],
        detail=f"planted {change} in {where}; found {found.summary}",
        values={"origins": origins, "verdict": found.status},
    )


def no_false_alarm(subject: Subject) -> Finding:
    """Run the second engine as it is: nothing may be found."""
    found = _verdict(subject, 0, None, None)
    origins = [str(judged.point) for judged in found.origins]
    excess = [j.errors.worst.excess for j in found.points if j.errors and j.errors.worst]
    return Finding(
        held=not origins and bool(excess),
        detail=f"{found.summary}; largest local error {max(excess, default=0):.2g} of tolerance",
        values={"origins": origins, "verdict": found.status, "excess": max(excess, default=0.0)},
    )


def _verdict(subject: Subject, layer: int, stage: str | None, change: str | None) -> Verdict:
    from pytest_aprt.options import DEFAULT_COSINE
    from pytest_aprt.rungs.config import fact_rows
    from pytest_aprt.stages import STAGES
    from pytest_aprt.verdict import Threshold, conclude

    measured, pair = _planted(subject, layer, stage, change)
    thresholds = dict.fromkeys(STAGES, Threshold(cosine=DEFAULT_COSINE, source="default"))
    longest = max(len(prompt.tokens) for prompt in subject.model.opened.prompts)
    facts = fact_rows(pair, longest)
    return conclude(pair.graph, pair.graph.points, measured, facts, thresholds)


def _point(layer: int, stage: str) -> Point:
    from pytest_aprt.stages import STAGES

    return Point(layer if STAGES[stage].per_layer else None, stage)


def _name(stage: str) -> str:
    return stage_named(stage).name


def _of_report(subject: Subject, stages: list[str], layer: int, error: str) -> list[float]:
    points = {p["point"]: p for p in subject.report["points"]}
    cosines = []
    for stage in stages:
        point: Any = points.get(point_id(layer, stage))
        if point is None or point[error] is None:
            raise BlockedError(f"the model shows nothing of {point_id(layer, stage)}")
        cosines.append(float(point[error]["cosine"]))
    return cosines


def _of_planted(
    subject: Subject, stages: list[str], layer: int, error: str, plant: str, change: str
) -> list[float]:
    measured, _ = _planted(subject, layer, plant, change)
    worst: dict[Point, float] = {}
    for errors in measured.errors:
        metrics = getattr(errors, error)
        if metrics is not None:
            worst[errors.point] = min(metrics.cosine, worst.get(errors.point, 1.0))
    try:
        return [worst[Point(layer, stage)] for stage in stages]
    except KeyError as missing:
        raise BlockedError(f"this architecture has no {missing.args[0]}") from None


def _planted(
    subject: Subject, layer: int, stage: str | None, change: str | None
) -> tuple[Measurement, Any]:
    """Run a second engine on the model's weights and the run's prompts, a fault in place if any."""
    from pytest_aprt.arithmetic import PROFILES
    from pytest_aprt.capture import CheckedEngine
    from pytest_aprt.measure import measure_pair
    from pytest_aprt.testing import Change, NumpyEngine

    opened = subject.model.opened
    pair = opened.pair
    faults: dict[tuple[int | None, str], Change] = {}
    if stage is not None and change is not None:
        where = _point(layer, stage)
        if where not in pair.graph.points:
            raise BlockedError(f"this architecture has no {where}")
        faults[where.layer, stage] = lambda value, workings: CHANGES[change](value)
    engine = CheckedEngine(
        NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, faults),
        pair.graph,
        pair.oracle_facts,
        "planted",
    )
    try:
        measured = measure_pair(
            pair, engine, list(opened.prompts), pair.graph.points, PROFILES["float32"]
        )
    except AprtError as error:
        raise BlockedError(f"the planted engine cannot run: {error}") from error
    return measured, pair
