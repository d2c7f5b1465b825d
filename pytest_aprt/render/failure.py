"""The text of a failed point: the first line stands alone, then the facts, then what to do."""

from __future__ import annotations

from tabulate import tabulate

from pytest_aprt.render.words import cosine, place, rel_l2, small, where
from pytest_aprt.report import PointJson, Report

_AFTER = 3  # points shown after the failed one
_BEFORE = 5  # and at most before it


def render(report: Report, point: PointJson) -> str:
    """Return the failure text of a point."""
    sections = [
        headline(report, point),
        _neighbourhood(report, point),
        _worst_elements(point),
        _meaning(report, point),
    ]
    return "\n\n".join(section for section in sections if section)


def headline(report: Report, point: PointJson) -> str:
    """Return the one line that stands alone: point, value, bound, where it began."""
    name = point["point"]
    if point["status"] != "diverged":
        reason = point["reason"]
        total, at_least = point["total"], point["threshold"]["cosine"]
        if total is None or float(total["cosine"]) >= at_least:
            return f"{name}: {reason}"
        bound = point["threshold"]
        return (
            f"{name}: total cosine {cosine(point['total'])} < {bound['cosine']:g} "
            f"({bound['source']}); {reason}"
        )
    origins = report["verdict"]["origins"]
    first = origins[0]["point"]
    began = "first divergence" if first == name else f"a further origin; the first is {first}"
    good = _good(report, point)
    before = f"; {good['point']} was {rel_l2(good['local'])}" if good else ""
    return f"{name}: {_size(point)} ({began}{before})"


def _size(point: PointJson) -> str:
    local, worst, tolerance = point["local"], point["worst_slice"], point["tolerance"]
    if local and local["non_finite"]["model"]:
        count = local["non_finite"]["model"]
        return f"{count} non-finite value{'s' * (count > 1)} although all inputs are finite"
    if worst is None or tolerance is None:
        return "local error beyond tolerance"
    return f"local rel_l2 {small(worst['rel_l2'])} > {small(tolerance['rel_l2'])}{where(worst)}"


def _good(report: Report, point: PointJson) -> PointJson | None:
    """Return the last point before this one that is sound."""
    points = report["points"]
    before = points[: points.index(point)]
    sound = [p for p in before if p["status"] in ("pass", "noise", "drift")]
    return sound[-1] if sound else None


def _neighbourhood(report: Report, point: PointJson) -> str:
    points = report["points"]
    here = points.index(point)
    good = _good(report, point)
    start = max(points.index(good) if good else 0, here - _BEFORE)
    rows = [
        [
            ("> " if p is point else "  ") + p["point"],
            p["status"],
            cosine(p["total"]),
            cosine(p["weights"]),
            cosine(p["engine"]),
            rel_l2(p["local"]),
        ]
        for p in points[start : here + _AFTER + 1]
    ]
    head = ["  point", "status", "total cos", "weights cos", "engine cos", "local rel_l2"]
    return tabulate(rows, head, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def _worst_elements(point: PointJson) -> str:
    rows = [
        [place(d["at"]), f"{float(d['model']):.7g}", f"{float(d['reference']):.7g}",
         f"{abs(float(d['model']) - float(d['reference'])):.2e}"]
        for d in point["top_diffs"]
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["worst elements", "model", "replay", "difference"]
    return tabulate(rows, head, tablefmt="plain", disable_numparse=True)


def _meaning(report: Report, point: PointJson) -> str:
    prompt = report["run"]["prompts"][point["prompt"]]
    text = prompt["text"] or "token ids"
    text = text if len(text) <= 40 else text[:37] + "..."
    lines = [
        f"shape {tuple(point['shape'])}, prompt {text!r} ({len(prompt['tokens'])} tokens)",
    ]
    local = point["local"]
    if local:
        worst = local["worst_token"]
        token = f", worst token {worst['token']} ({small(worst['rel_l2'])})" if worst else ""
        lines.append(
            f"whole tensor: cosine {cosine(local)}, rel_l2 {rel_l2(local)}, slope "
            f"{float(local['slope']):.6g}, norm ratio {float(local['norm_ratio']):.6g}{token}"
        )
    for origin in report["verdict"]["origins"]:
        if origin["point"] != point["point"]:
            continue
        if origin["bracket"]:
            lines.append(
                f"the fault lies in {origin['bracket'][0]} .. {origin['point']}; capture "
                f"{', '.join(origin['bracket'][:-1])} to narrow it"
            )
        if origin["hint"]:
            lines.append(f"likely: {origin['hint']}")
    if point["tolerance"]:
        lines.append(f"tolerance: {point['tolerance']['source']}")
    lines.append(f"again: {report['run']['command']} -k {point['point']}")
    return "\n".join(lines)
