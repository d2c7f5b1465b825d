"""Checks that read the finished run's report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pytest_aprt.contracts.checks.settings import Layers
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject
from pytest_aprt.report import PointJson, Report


def chosen(report: Report, stages: list[str] | None, layers: Layers | None) -> list[PointJson]:
    """Return the points of the stages and layers; whole-model stages belong to every layer.

    Raises:
        BlockedError: a stage or the layers are not part of this run.
    """
    points = report["points"]
    count = 1 + max((p["layer"] for p in points if p["layer"] is not None), default=-1)
    wanted = None if layers is None else set(layers(count))
    found = [
        p
        for p in points
        if (stages is None or p["stage"] in stages)
        and (wanted is None or p["layer"] is None or p["layer"] in wanted)
    ]
    missing = set(stages or ()) - {p["stage"] for p in found}
    if missing or not found:
        what = ", ".join(sorted(missing)) or f"the chosen layers of its {count}"
        raise BlockedError(f"the model shows nothing of {what}")
    return found


def stage_cosine(subject: Subject, **settings: Any) -> Finding:
    """Bound the cosine of points."""
    return stage_metric(subject, metric="cosine", **settings)


def stage_metric(
    subject: Subject,
    *,
    metric: str,
    error: str,
    stages: list[str] | None,
    layers: Layers | None,
    at_least: float | None,
    at_most: float | None,
    quantile: float | None,
) -> Finding:
    """Bound a metric of points, on every prompt."""
    points = chosen(subject.report, stages, layers)
    found = list(_values(points, error, metric))
    shown = {p["point"] for p in points if p["status"] != "missing"}
    if not found or len({point for _, point, _ in found}) < len(shown):
        gone = next(p["point"] for p in points if p["point"] not in {f[1] for f in found})
        raise BlockedError(f"{gone} has no `{error}` error in this run")
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    lowest = (at_least is not None) or (at_most is None)
    ranked = sorted(found, key=lambda f: (not math.isnan(f[0]), f[0] if lowest else -f[0]))
    if quantile is None:
        broken = [f for f in found if not low <= f[0] <= high]
        value, point, prompt = min(
            broken or ranked, key=lambda f: ranked.index(f)
        )  # the worst on the bounded side
        count = f"; {len(broken)} of {len(found)} values break the bound" if broken else ""
        name = "lowest" if lowest else "highest"
    else:
        value, point, prompt = sorted(found)[_rank(quantile, len(found))]
        broken = [] if low <= value <= high else [(value, point, prompt)]
        count, name = f" of {len(found)} values", f"quantile {quantile:g} of"
    detail = (
        f"{name} {error} {metric} is {value:.6g} at {point} (prompt {prompt}), "
        f"{_bounds(at_least, at_most)}{count}"
    )
    values = {"metric": metric, "error": error, "value": plain(value), "point": point,
              "values": len(found), "broken": len(broken)}  # fmt: skip
    return Finding(held=not broken, detail=detail, values=values)


def _rank(quantile: float, count: int) -> int:
    return min(count - 1, max(0, math.ceil(quantile * count) - 1))


def _values(points: list[PointJson], error: str, metric: str) -> Iterator[tuple[float, str, int]]:
    for point in points:
        for on_prompt in point["prompts"]:
            metrics: Any = on_prompt.get(error)
            if metrics is not None:
                yield float(metrics[metric]), point["point"], on_prompt["prompt"]


def _bounds(at_least: float | None, at_most: float | None) -> str:
    bounds = (("at least", at_least), ("at most", at_most))
    parts = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
    return f"expected {' and '.join(parts)}"


def plain(value: float) -> float | str:
    """Return a number that JSON can hold."""
    return float(value) if math.isfinite(value) else str(value)


def verdict(subject: Subject, *, among: list[str]) -> Finding:
    """Compare the run's verdict."""
    found = subject.report["verdict"]
    return Finding(
        held=found["status"] in among,
        detail=f"verdict {found['summary']}, expected {' or '.join(among)}",
        values={"verdict": found["status"]},
    )


def rung(subject: Subject, *, name: str) -> Finding:
    """Require that a rung of the ladder stands; rows that could not be judged are told."""
    ladder: Any = subject.report["ladder"]
    rows = ladder.get(name) or []
    judged = [row for row in rows if row["status"] != "unavailable"]
    if not judged:
        reason = rows[0].get("reason", "") if rows else "this run has no such rung"
        raise BlockedError(f"nothing of the rung {name} was judged: {reason}")
    bad = [row for row in judged if row["status"] in ("broken", "inherited")]
    detail = f"{len(bad)} of {len(judged)} rows of the rung {name} are broken"
    if len(judged) < len(rows):
        detail += f", {len(rows) - len(judged)} could not be judged"
    for row in bad[:2]:
        detail += f"; {row['name']}: {row.get('reason', '')}"
    values = {"rows": len(judged), "broken": len(bad), "unjudged": len(rows) - len(judged)}
    return Finding(held=not bad, detail=detail, values=values)


def report_bound(
    subject: Subject, *, path: str, at_least: float | None, at_most: float | None
) -> Finding:
    """Bound one number of the report."""
    value: Any = subject.report
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise BlockedError(f"the report has no {path} (nothing at {part!r})") from None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BlockedError(f"{path} of the report is no number: {value!r:.60}") from None
    held = (at_least is None or number >= at_least) and (at_most is None or number <= at_most)
    detail = f"{path} is {number:.6g}, {_bounds(at_least, at_most)}"
    return Finding(held=held, detail=detail, values={path: plain(number)})


def everything_judged(subject: Subject, *, at_least: int, fused: list[str] | None) -> Finding:
    """Refuse silent empties: no point unjudged, no prompt left out, no self-test failed.

    A ``fused`` stage may be missing: the replay of the next one, which must be judged, spans it.
    """
    report = subject.report
    points, prompts = report["points"], len(report["run"]["prompts"])
    fused_away = [
        p["point"] for p in points if p["status"] == "missing" and p["stage"] in (fused or ())
    ]
    unjudged = [
        p["point"]
        for p in points
        if p["status"] in ("missing", "inconclusive") and p["point"] not in fused_away
    ]
    short = [p["point"] for p in points if len(p["prompts"]) != prompts]
    empty = [p["point"] for p in points if not math.prod(p["shape"])]
    failed = [t["name"] for t in report["self_test"] if not t["passed"]]
    problems = [
        f"{what}: {', '.join(names[:5])}"
        for what, names in (
            ("not judged", unjudged),
            (f"not on all {prompts} prompts", short),
            ("empty", empty),
            ("self-test failed", failed),
        )
        if names
    ]
    judged = len(points) - len(fused_away)
    if judged < at_least:
        problems.append(f"{judged} points, expected at least {at_least}")
    if not report["self_test"]:
        problems.append("no self-test ran")
    detail = "; ".join(problems) or (
        f"{judged} points judged on {prompts} prompts, {len(report['self_test'])} self-tests"
        + (f"; the engine fuses {', '.join(fused_away)}" if fused_away else "")
    )
    values = {"points": len(points), "unjudged": len(unjudged), "fused": len(fused_away)}
    return Finding(held=not problems, detail=detail, values=values)
