"""The facts beside a page's headline: where, how large, what else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_aprt.render.ladder import BAD, mark
from pytest_aprt.render.words import cosine, counts, excess, rel_l2, small, span, where
from pytest_aprt.report import MetricsJson, OriginJson, Report
from pytest_aprt.stages import STAGES


@dataclass(frozen=True)
class Tile:
    """One fact beside the headline."""

    label: str
    value: str
    detail: str = ""
    href: str = ""
    mark: str = ""


def tiles_of(report: Report) -> list[Tile]:
    """Return the facts beside the headline."""
    outside = _rung_tiles(report)
    if report["verdict"]["origins"]:
        return outside + _origin_tiles(report, "And in the stages" if outside else "Where")
    return outside or _quiet_tiles(report)


def _rung_tiles(report: Report) -> list[Tile]:
    """What is broken in a rung other than the stages, where the verdict names one."""
    name: Any = report["verdict"]["rung"]
    ladder: Any = report["ladder"]
    rows = ladder.get(name) if name != "stages" else None
    broken = [row for row in rows or [] if isinstance(row, dict) and mark(row) == BAD]
    if not broken:
        return []
    what = f"{name} {broken[0].get('name', '')}"
    reason = str(broken[0].get("reason") or "is broken")
    tiles = [Tile("Where", what, reason, f"#rung-{name}", "bad")]
    if further := [str(row.get("name", "")) for row in broken[1:]]:
        more = ", ".join(further[:6]) + (", ..." if len(further) > 6 else "")
        tiles.append(Tile("Besides", f"{len(further)} further", more, f"#rung-{name}", "bad"))
    return tiles


def _origin_tiles(report: Report, label: str) -> list[Tile]:
    origin = report["verdict"]["origins"][0]
    tiles = [
        Tile(
            label,
            span(origin),
            STAGES[origin["stage"]].what if origin["stage"] in STAGES else "",
            _link(report, origin["point"]),
            "bad",
        ),
        _size_tile(report, origin),
    ]
    good = origin["previous_good"]
    if good:
        name, detail = good["point"], f"local error {small(good['rel_l2'])}"
        tiles.append(Tile("Still sound before it", name, detail, _link(report, name), "good"))
    if origin["hint"]:
        tiles.append(Tile("Likely", "", origin["hint"]))
    return tiles


def _size_tile(report: Report, origin: OriginJson) -> Tile:
    if count := origin["born_non_finite"]:
        return Tile("Size", f"{count} NaN or Inf", "although every input is finite")
    worst = origin["worst"]
    if worst is None:
        return Tile("Size", rel_l2(origin["local"]), "relative L2")
    times = max((excess(p) for p in report["points"] if p["point"] == origin["point"]), default=0.0)
    size = float(worst["rel_l2"])
    value = f"{size:.1%}" if 1e-3 <= size < 10 else small(size)
    detail = f"relative L2 {small(worst['rel_l2'])}"
    if times > 1:
        detail += f": {times:,.0f} times its tolerance"
    return Tile("Size", value + where(worst), detail)


def _quiet_tiles(report: Report) -> list[Tile]:
    judged = [p for p in report["points"] if p["total"] and p["local"]]
    tiles = [Tile("Judged", f"{len(judged)} points", counts(report))]
    if judged:
        lowest = min(judged, key=lambda p: _cosine(p["total"]))
        closest = max(judged, key=excess)
        tiles += [
            Tile("Lowest cosine", cosine(lowest["total"]), f"total, at {lowest['point']}",
                 f"#p-{lowest['point']}"),
            Tile("Error born in one stage", f"at most {excess(closest):.2g} of its tolerance",
                 f"at {closest['point']}", f"#p-{closest['point']}"),
        ]  # fmt: skip
    return tiles


def _link(report: Report, name: str) -> str:
    return f"#p-{name}" if any(p["point"] == name for p in report["points"]) else ""


def _cosine(metrics: MetricsJson | None) -> float:
    value = float(metrics["cosine"]) if metrics else 1.0
    return value if value == value else 1.0
