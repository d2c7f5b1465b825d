"""The drawings of report.html: SVG by matplotlib, whose colours follow the page's.

matplotlib is told placeholder colours, which become CSS variables in the SVG, so that one drawing
serves the light and the dark page.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pytest_aprt.images import NON_FINITE
from pytest_aprt.render.words import layer_name
from pytest_aprt.report import ImageJson, MetricsJson, Report

ERRORS = ("total", "weights", "engine", "local")

LEVELS = 32
SMALLEST, LARGEST = 1e-8, 1.0
"""The heatmap's colour scale in relative L2, logarithmic: level 0 is SMALLEST or less."""

_RAMP = "magma"  # perceptually even, and readable for the colour blind
_NO_NUMBER = "#00b7c7"
_NAMES = ("ink", "muted", "grid", "total", "weights", "engine", "local", "warn")
_PLACEHOLDER = {name: f"#00000{index + 1}" for index, name in enumerate(_NAMES)}
_STYLE = {"total": "-", "weights": (0, (6, 2)), "engine": (0, (1, 1)), "local": "-"}
_WIDTH = {"total": 1.6, "weights": 1.6, "engine": 2.2, "local": 1.3}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_RC: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "aprt",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _PLACEHOLDER["grid"],
    "axes.labelcolor": _PLACEHOLDER["muted"],
    "text.color": _PLACEHOLDER["ink"],
    "xtick.color": _PLACEHOLDER["grid"],
    "ytick.color": _PLACEHOLDER["grid"],
    "xtick.labelcolor": _PLACEHOLDER["muted"],
    "ytick.labelcolor": _PLACEHOLDER["muted"],
    "grid.color": _PLACEHOLDER["grid"],
    "grid.linewidth": 0.6,
}


def ramp(dark: bool) -> list[str]:
    """Return the heatmap's colours, the smallest error first: it fades into the page."""
    along = np.linspace(0, 1, LEVELS) ** 1.4
    shades = 0.13 + 0.84 * along if dark else 0.985 - 0.865 * along
    return [to_hex(colour) for colour in colormaps[_RAMP](shades)]


def level(metrics: MetricsJson | None) -> int | None:
    """Return the colour of an error; None where nothing could be compared."""
    size = extent(metrics)
    if math.isnan(size):
        return None
    if size <= SMALLEST:
        return 0
    share = math.log(size / SMALLEST) / math.log(LARGEST / SMALLEST)
    return round(min(share, 1) * (LEVELS - 1))


def extent(metrics: MetricsJson | None) -> float:
    """Return how large an error is: its relative L2, or infinity where values turned non-finite."""
    if metrics is None:
        return math.nan
    left, right = metrics["non_finite"].values()
    return math.inf if left > right else float(metrics["rel_l2"])


def errors_along_the_pass(report: Report, width: float) -> str:
    """Return the four errors of every point in computation order, with the tolerance.

    Args:
        report: of a run.
        width: inches; a page 400 pixels wide takes 4.
    """
    points = report["points"]
    series = {
        error: _shown([extent(p[error]) for p in points])  # type: ignore[literal-required]
        for error in ERRORS
    }
    bound = _shown(
        [float(p["tolerance"]["rel_l2"]) if p["tolerance"] else math.nan for p in points]
    )
    with rc_context(_RC):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.set_ylim(SMALLEST / 10, 10)
        places = range(len(points))
        for error, values in series.items():
            axes.plot(places, values, label=error, color=_PLACEHOLDER[error], lw=_WIDTH[error],
                      ls=_STYLE[error], solid_joinstyle="round")  # fmt: skip
        axes.plot(places, bound, label="tolerance of local", color=_PLACEHOLDER["muted"], lw=1,
                  ls=(0, (4, 3)))  # fmt: skip
        origins = [i for i, p in enumerate(points) if p["status"] == "diverged"]
        axes.plot(origins, [series["local"][i] for i in origins], "X", ms=9, label="origin",
                  color=_PLACEHOLDER["local"], mec=_PLACEHOLDER["ink"], mew=0.8)  # fmt: skip
        _layer_ticks(axes, report, most=28 if width > 6 else 8)
        axes.set_xlim(-0.5, max(len(points) - 0.5, 0.5))
        _powers_of_ten(axes, most=12)
        axes.grid(axis="y", alpha=0.8)
        axes.set_ylabel("relative L2")
        figure.legend(
            loc="outside upper left", ncols=6 if width > 6 else 3, frameon=False, fontsize=9
        )
        text = "Relative L2 of the four errors along the forward pass, logarithmic"
        return _svg(figure, f"pass-{width:.0f}", text)


def decode_growth(engine: Sequence[float], weights: Sequence[float], width: float) -> str:
    """Return how far the logits of every decode step are off.

    Args:
        engine: model against shadow, of the prefill and then of every step.
        weights: shadow against oracle, of every step.
        width: inches.
    """
    with rc_context(_RC):
        figure = Figure(figsize=(width, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.set_ylim(SMALLEST / 10, 10)
        for name, values, first in (("weights", weights, 1), ("engine", engine, 0)):
            axes.plot(range(first, first + len(values)), _shown(values), label=name, marker="o",
                      ms=4, color=_PLACEHOLDER[name], lw=_WIDTH[name], ls=_STYLE[name])  # fmt: skip
        axes.set_xlim(-0.3, len(engine) - 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.xaxis.set_major_formatter(lambda x, _: f"step {x:.0f}" if x > 0 else "prefill")
        _powers_of_ten(axes, most=6)
        axes.grid(axis="y", alpha=0.8)
        axes.set_ylabel("relative L2 of logits")
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        text = "Relative L2 of the logits over the decode steps, engine and weights, logarithmic"
        return _svg(figure, f"decode-{width:.0f}", text)


def _shown(values: Sequence[float]) -> list[float]:
    """Return what a log axis shows: zero at its bottom, infinity at its top, nan as a gap."""
    return [value if math.isnan(value) else min(max(value, SMALLEST / 10), 10) for value in values]


def _powers_of_ten(axes: Axes, most: int) -> None:
    """Label the y axis in plain text: to typeset it takes more than half of a drawing's time."""
    axes.yaxis.set_major_locator(LogLocator(numticks=most))
    axes.yaxis.set_major_formatter(
        lambda y, _: "10" + f"{math.log10(y):.0f}".translate(_SUPERSCRIPTS)
    )
    axes.yaxis.set_minor_locator(NullLocator())


def _layer_ticks(axes: Axes, report: Report, most: int) -> None:
    starts: dict[int | None, int] = {}
    for index, point in enumerate(report["points"]):
        starts.setdefault(point["layer"], index)
    every = math.ceil(len(starts) / most)
    shown = [
        (place, layer) for layer, place in starts.items() if layer is None or not layer % every
    ]
    axes.set_xticks([place for place, _ in shown], [layer_name(layer) for _, layer in shown],
                    ha="left", rotation=0 if len(shown) < 10 else 60)  # fmt: skip
    for place, _ in shown:
        axes.axvline(place - 0.5, color=_PLACEHOLDER["grid"], lw=0.6)


def difference_image(image: ImageJson, key: str, width: float) -> str:
    """Return a point's difference as a picture with coordinates and a scale; ids begin with key."""
    rows, columns = image["pixels"]
    levels = np.frombuffer(base64.b64decode(image["levels"]), np.uint8).reshape(rows, columns)
    largest = float(image["largest"])
    largest = largest if 0 < largest < math.inf else 1.0
    values = largest * 10.0 ** ((levels / 254 - 1) * image["decades"])
    values = np.ma.masked_array(values, levels == NON_FINITE)
    colours: Colormap = colormaps[_RAMP].with_extremes(bad=_NO_NUMBER)
    with rc_context({**_RC, "font.size": 8}):
        figure = Figure(figsize=(width, width * 0.36))  # a layout engine takes five times as long
        axes = figure.add_axes((0.085, 0.22, 0.74, 0.74))
        beside = figure.add_axes((0.85, 0.22, 0.02, 0.74))
        shown = axes.imshow(
            values,
            cmap=colours,
            norm=LogNorm(largest * 10.0 ** -image["decades"], largest),
            aspect="auto",
            interpolation="none",
            extent=(-0.5, image["shape"][1] - 0.5, image["shape"][0] - 0.5, -0.5),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if image["shape"][0] == 1:
            axes.set_yticks([0])
        axes.set_xlabel(image["columns"])
        axes.set_ylabel(image["rows"])
        bar = figure.colorbar(shown, cax=beside)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_label("|difference|")
        text = (
            f"Difference ({image['error']}) over {image['rows']}s and {image['columns']}s, "
            f"the largest {largest:.2g}"
        )
        return _svg(figure, key, text)


def _svg(figure: Figure, key: str, text: str) -> str:
    """Return a figure as inline SVG with its text for those who cannot see it."""
    out = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
                 rf'<svg viewBox="\1" role="img" aria-label="{text}">', svg, count=1)  # fmt: skip
    svg = re.sub(r"\n\s*", "\n", svg)
    prefix = f"{key}-"  # ids are the page's, and every figure has a figure_1
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}", svg)
    for name, placeholder in _PLACEHOLDER.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg
