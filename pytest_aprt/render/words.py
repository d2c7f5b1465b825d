"""How numbers and places are written, the same in every rendering."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_aprt.report import MetricsJson, Number, PointJson, Report, SliceJson

SYMBOLS = {
    # status: its sign in a strip of layers
    "diverged": "X",
    "inherited": ">",
    "drift": "d",
    "noise": "n",
    "pass": ".",
    "inconclusive": "?",
    "missing": "-",
}
"""Statuses from the one that is told first to the one that is told last."""


def cosine(metrics: MetricsJson | None) -> str:
    """Return a cosine with as many digits as tell it from 1."""
    if metrics is None:
        return ""
    value = float(metrics["cosine"])
    if value != value:
        return "nan"
    return f"{value:.6f}" if 1 - value > 5e-7 else "1.000000"


def small(value: Number | None) -> str:
    """Return an error in two digits."""
    return "" if value is None else f"{float(value):.1e}"


def rel_l2(metrics: MetricsJson | None) -> str:
    """Return a relative L2 distance in two digits."""
    return "" if metrics is None else small(metrics["rel_l2"])


def place(at: Mapping[str, int]) -> str:
    """Return coordinates as words: ``token 6, head 3, channel 12``."""
    return ", ".join(f"{axis} {index}" for axis, index in at.items())


def where(worst: SliceJson | None) -> str:
    """Return the slice as words: `` at head 3``; nothing for the whole tensor."""
    if worst is None or worst["axis"] == "all":
        return ""
    if worst["axis"] == "part":
        return f" in {'QKV'[worst['index'] or 0]}"
    return f" at {worst['axis']} {worst['index']}"


def megabytes(count: int) -> str:
    """Return a number of bytes in MB."""
    return f"{count / 1e6:,.0f} MB"


def worst_of(points: list[PointJson]) -> PointJson:
    """Return the point to be told first: by status, then by local error, then by total."""

    def badness(point: PointJson) -> tuple[int, float, float]:
        local, tolerance, total = point["local"], point["tolerance"], point["total"]
        excess = float(local["rel_l2"]) / float(tolerance["rel_l2"]) if local and tolerance else 0.0
        distance = float(total["rel_l2"]) if total else 0.0
        return (-list(SYMBOLS).index(point["status"]), excess if excess > 1 else 0.0, distance)

    return max(points, key=badness)


def by_layer(report: Report) -> dict[int | None, list[PointJson]]:
    """Return the judged points of every layer (None: the whole model)."""
    layers: dict[int | None, list[PointJson]] = {}
    for point in report["points"]:
        layers.setdefault(point["layer"], []).append(point)
    return layers
