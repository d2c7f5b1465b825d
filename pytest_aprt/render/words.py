"""How numbers and places are written, the same in every rendering."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from pytest_aprt.report import (
    MetricsJson,
    ModelJson,
    Number,
    OriginJson,
    PointJson,
    Report,
    SliceJson,
)
from pytest_aprt.statuses import VERDICTS

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
        total = point["total"]
        distance = _or_infinite(total["rel_l2"]) if total else 0.0
        over = excess(point)
        return (-list(SYMBOLS).index(point["status"]), over if over > 1 else 0.0, distance)

    return max(points, key=badness)


def excess(point: PointJson) -> float:
    """Return the worst slice's local error in units of its tolerance; 0 where there is none."""
    worst, tolerance = point["worst_slice"], point["tolerance"]
    if worst is None or tolerance is None:
        return 0.0
    error, bound = _or_infinite(worst["rel_l2"]), float(tolerance["rel_l2"])
    if not bound > 0:  # zero or nan: any error at all is beyond it
        return math.inf if error else 0.0
    return error / bound


def _or_infinite(value: Number) -> float:
    """Return a number; what is not one counts as the worst."""
    return math.inf if math.isnan(float(value)) else float(value)


def passes(report: Report) -> bool:
    """Return whether the gate lets the run pass."""
    status = report["verdict"]["status"]
    if status == "DIVERGED" and "baseline" in report:
        return not report["baseline"]["worse"]
    return VERDICTS[status]


def counts(report: Report) -> str:
    """Return how many points have which status, in words."""
    found = Counter(point["status"] for point in report["points"])
    return ", ".join(f"{found[status]} {status}" for status in SYMBOLS if found[status])


def layer_name(layer: int | None) -> str:
    """Return a layer's name as points have it; ``head`` for the whole model."""
    return "head" if layer is None else f"L{layer:02d}"


def span(origin: OriginJson) -> str:
    """Return where an origin lies: its point, or the bracket that ends there."""
    first = origin["bracket"][0] if origin["bracket"] else origin["point"]
    return " .. ".join(dict.fromkeys([first, origin["point"]]))


def size(origin: OriginJson) -> str:
    """Return an origin's size and the place that it belongs to: ``5.3e-01 at token 8``."""
    if origin["worst"] is not None:
        return small(origin["worst"]["rel_l2"]) + where(origin["worst"])
    return rel_l2(origin["local"])


def printable(text: str) -> str:
    """Return text that any UTF-8 file or terminal takes: control characters and lone surrogates
    become escapes, line breaks and tabs stay."""  # noqa: D205, D209
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def ascii_only(text: str) -> str:
    """Return text in one line of plain ASCII, the rest as escapes."""
    plain = printable(" ".join(text.split()))
    return plain.encode("ascii", "backslashreplace").decode("ascii")


def by_layer(report: Report) -> dict[int | None, list[PointJson]]:
    """Return the judged points of every layer (None: the whole model)."""
    layers: dict[int | None, list[PointJson]] = {}
    for point in report["points"]:
        layers.setdefault(point["layer"], []).append(point)
    return layers


def engine_details(model: ModelJson) -> str:
    """Return how the engine was set up: its parameters, and what it says of itself."""
    return ", ".join(f"{key} {value}" for key, value in model["engine_details"].items())
