"""The text of a failed point: the first line stands alone, then the facts, then what to do."""

from __future__ import annotations

from tabulate import tabulate

from pytest_aprt.render.words import cosine, place, printable, rel_l2, small, span, where
from pytest_aprt.report import OriginJson, PointJson, Report

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
    return printable("\n\n".join(section for section in sections if section))


def headline(report: Report, point: PointJson) -> str:
    """Return the one line that stands alone: point, value, bound, where it began."""
    name = point["point"]
    if point["status"] != "diverged":
        return f"{name}: " + "; ".join(filter(None, [_below(point), point["reason"]]))
    first = report["verdict"]["origins"][0]["point"]
    began = "first divergence" if first == name else f"a further origin; the first is {first}"
    good = _origin(report, point)["previous_good"]
    before = f"; {good['point']} was {small(good['rel_l2'])}" if good else ""
    return f"{name}: {_size(report, point)} ({began}{before})"


def _origin(report: Report, point: PointJson) -> OriginJson:
    return next(o for o in report["verdict"]["origins"] if o["point"] == point["point"])


def _below(point: PointJson) -> str:
    """Return which error misses the threshold, if one does: the one that was judged."""
    bound = point["threshold"]
    judged = ("total", "engine") if point["outcome"] == "failed" else ("engine", "total")
    for error in judged:
        metrics = point["engine"] if error == "engine" else point["total"]
        if metrics is None:
            continue
        ours = metrics["non_finite"]["model"]
        if 2 * ours > sum(metrics["non_finite"].values()):  # more than the other side has
            return f"{ours} non-finite value{'s' * (ours > 1)}"
        if float(metrics["cosine"]) < bound["cosine"] and metrics["rel_l2"] != 0:
            return f"{error} cosine {cosine(metrics)} < {bound['cosine']:g} ({bound['source']})"
    return ""


def _size(report: Report, point: PointJson) -> str:
    worst, tolerance = point["worst_slice"], point["tolerance"]
    if count := _origin(report, point)["born_non_finite"]:
        return f"{count} non-finite value{'s' * (count > 1)} although all inputs are finite"
    if worst is None or tolerance is None:
        return "local error beyond tolerance"
    return f"local rel_l2 {small(worst['rel_l2'])} > {small(tolerance['rel_l2'])}{where(worst)}"


def _neighbourhood(report: Report, point: PointJson) -> str:
    points = report["points"]
    here = points.index(point)
    start = max(_sound_before(points, here), here - _BEFORE)
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
    head = ["  point", "status", "total cos", "weights", "engine", "local"]
    return tabulate(rows, head, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def _sound_before(points: list[PointJson], here: int) -> int:
    """Return the place of the last sound point before another; 0 where there is none."""
    sound = [i for i in range(here) if points[i]["status"] in ("pass", "noise", "drift")]
    return sound[-1] if sound else 0


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
    if point["status"] == "diverged":
        origin = _origin(report, point)
        if origin["bracket"]:
            lines.append(
                f"the fault lies in {span(origin)}; capture "
                f"{', '.join(origin['bracket'][:-1])} to narrow it"
            )
        if origin["hint"]:
            lines.append(f"likely: {origin['hint']}")
    if point["tolerance"]:
        lines.append(f"tolerance: {point['tolerance']['source']}")
    lines.append(f"again: {report['run']['command']} -k {point['point']}")
    return "\n".join(lines)
