"""The summary at the end of a run: at most 25 lines of 80 columns, plain ASCII, in colour.

``-q`` is the verdict's sentence alone; ``-v`` adds the table of all points.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from pytest_aprt.render.words import (
    SYMBOLS,
    ascii_only,
    by_layer,
    cosine,
    counts,
    layer_name,
    passes,
    rel_l2,
    size,
    small,
    span,
    worst_of,
)
from pytest_aprt.report import PointJson, Report

WIDTH = 80
LINES = 25
_TABLE_LAYERS = 6  # more layers than this get one sign each instead of a line each
_ORIGINS = 3

_COLOURS = {
    # status: how the terminal shows it
    "diverged": {"red": True, "bold": True},
    "inherited": {"yellow": True},
    "drift": {"cyan": True},
    "noise": {},
    "pass": {"green": True},
    "inconclusive": {"purple": True},
    "missing": {"light": True},
}


class Line(NamedTuple):
    """One line, and the markup that pytest's terminal writer takes."""

    text: str
    markup: Mapping[str, bool] = {}


def render(
    report: Report, saved_to: str | None, verbosity: int = 0, width: int = WIDTH
) -> list[Line]:
    """Return the summary.

    Args:
        report: of the finished run.
        saved_to: the folder of the written report, if any.
        verbosity: pytest's; below 0 the verdict's sentence alone, above 0 all points too.
        width: columns of the terminal; no more than 80 are used.
    """
    width = min(width, WIDTH)
    verdict = report["verdict"]
    colour = {"bold": True, "green" if passes(report) else "red": True}
    if verbosity < 0:
        return [Line(ascii_only(verdict["summary"]), colour)]
    head = [Line(text, colour) for text in _wrap(verdict["summary"], width, 4)]
    for part in (_baseline, _origins, _failed_self_tests):
        head += part(report, width)
    head.append(Line(""))
    body = (_points if verbosity > 0 else _layers)(report, width)
    kept = f"report: {saved_to}" if saved_to else "report: none kept (--aprt-report DIR keeps it)"
    tail = [Line(text) for text in _wrap(kept, width, 3)]
    space = LINES - len(head) - len(tail) - (0 if verbosity > 0 else len(body))
    notes = [
        Line(text) for note in report["notes"] for text in _wrap(f"note: {note}", width, LINES)
    ]
    if len(notes) > space:
        left = f"{len(report['notes'])} notes: see the report"
        notes = [*notes[: max(space - 1, 0)], Line(left)][: max(space, 0)]
    return head + body + notes + tail


def _wrap(text: str, width: int, most: int, indent: str = "") -> list[str]:
    """Return at most ``most`` lines of plain ASCII."""
    return textwrap.wrap(
        ascii_only(text),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=most,
        placeholder=" ...",
    )


def _baseline(report: Report, width: int) -> list[Line]:
    if "baseline" not in report:
        return []
    found = report["baseline"]
    lines = []
    for kind, colour in (("worse", "red"), ("better", "green")):
        if names := found[kind]:  # type: ignore[literal-required]
            text = f"{kind} than the baseline: {', '.join(names[:3])}"
            text += f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines += [Line(line, {colour: True}) for line in _wrap(text, width, 1)]
    if not found["worse"]:
        lines.append(Line(f"nothing is worse than the baseline; {len(found['known'])} known"))
    return lines


def _origins(report: Report, width: int) -> list[Line]:
    origins = report["verdict"]["origins"]
    lines = []
    for origin in origins[:_ORIGINS]:
        text = f"origin {span(origin)}: local rel_l2 {size(origin)}"
        lines += [Line(line, _COLOURS["diverged"]) for line in _wrap(text, width, 1)]
        if origin["hint"] and origin is origins[0]:
            lines += [Line(line) for line in _wrap(origin["hint"], width, 3, indent="  ")]
    if len(origins) > _ORIGINS:
        lines.append(Line(f"and {len(origins) - _ORIGINS} further origins"))
    return lines


def _failed_self_tests(report: Report, width: int) -> list[Line]:
    failed = [test for test in report["self_test"] if not test["passed"]]
    return [
        Line(text, _COLOURS["inconclusive"])
        for test in failed[:2]
        for text in _wrap(f"self-test {test['name']}: {test['detail']}", width, 1)
    ]


_COLUMNS = {75: (25, 14, 12, 12, 12), 0: (23, 12, 9, 8, 8)}
"""Widths of a table's columns, by the width that the terminal must have."""


def _cells(width: int, first: str, status: str, *numbers: str) -> str:
    a, b, *rest = next(columns for least, columns in _COLUMNS.items() if width >= least)
    cells = [f"{number:>{n}}" for number, n in zip(numbers, rest, strict=True)]
    return f"{first:{a}}{status:{b}}" + "".join(cells)


def _row(name: str, point: PointJson, width: int) -> Line:
    numbers = (cosine(point["total"]), rel_l2(point["engine"]), rel_l2(point["local"]))
    return Line(_cells(width, name, point["status"], *numbers), _COLOURS[point["status"]])


def _head(first: str, width: int) -> Line:
    return Line(_cells(width, first, "status", "total cos", "engine", "local"))


def _points(report: Report, width: int) -> list[Line]:
    rows = [_row(p["point"], p, width) for p in report["points"]]
    return [*map(Line, _wrap(_counted(report), width, 2)), _head("point", width), *rows]


def _counted(report: Report) -> str:
    return f"{len(report['points'])} points: {counts(report)}"


def _layers(report: Report, width: int) -> list[Line]:
    layers = by_layer(report)
    lines = [Line(text) for text in _wrap(_counted(report), width, 2)]
    if not layers:
        return lines
    worst = {layer: worst_of(points) for layer, points in layers.items()}
    if len(layers) <= _TABLE_LAYERS:
        lines.append(_head("worst", width))
        return lines + [
            _row(p["point"] if layer is None else f"{layer_name(layer)}-{p['stage']}", p, width)
            for layer, p in worst.items()
        ]
    signs = "".join(SYMBOLS[p["status"]] for p in worst.values())
    lines += [Line(text) for text in _wrap(f"worst status of each layer: {signs}", width, 4)]
    used = ", ".join(f"{sign} {status}" for status, sign in SYMBOLS.items() if sign in signs)
    last = "; last sign: the head" if None in layers else ""
    lines += [Line(text) for text in _wrap(f"({used}{last})", width, 2, indent="  ")]
    p = worst_of(report["points"])
    bound = f" (tolerance {small(p['tolerance']['rel_l2'])})" if p["tolerance"] else ""
    text = f"worst point: {p['point']}, total cosine {cosine(p['total'])}, local "
    text += rel_l2(p["local"]) + bound
    return lines + [Line(line, _COLOURS[p["status"]]) for line in _wrap(text, width, 2)]
