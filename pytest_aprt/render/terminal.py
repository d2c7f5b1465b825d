"""The summary at the end of a run: at most 25 lines, 80 columns, plain ASCII."""

from __future__ import annotations

import textwrap
from collections import Counter

from pytest_aprt.render.words import SYMBOLS, by_layer, cosine, rel_l2, small, where, worst_of
from pytest_aprt.report import Report

WIDTH = 80
_TABLE_LAYERS = 6  # more layers than this get one sign each instead of a line each
_ORIGINS = 4


def render(report: Report, saved_to: str | None) -> list[str]:
    """Return the summary's lines; ``saved_to`` is the folder of the written report, if any."""
    verdict = report["verdict"]
    lines = textwrap.wrap(verdict["summary"], WIDTH)[:4]
    for origin in verdict["origins"][:_ORIGINS]:
        name = " .. ".join(
            [origin["bracket"][0], origin["point"]] if origin["bracket"] else [origin["point"]]
        )
        text = f"origin {name}: local rel_l2 {rel_l2(origin['local'])}{where(origin['worst'])}"
        lines.append(text[:WIDTH])
        if origin["hint"] and origin is verdict["origins"][0]:
            lines += textwrap.wrap(
                origin["hint"], WIDTH - 2, initial_indent="  ", subsequent_indent="  "
            )[:3]
    lines += [
        test_line(test["name"], test["detail"])
        for test in report["self_test"]
        if not test["passed"]
    ][:2]
    lines.append("")
    lines += _strip(report)
    lines += [line for note in report["notes"] for line in textwrap.wrap(f"note: {note}", WIDTH)]
    lines.append(
        f"report: {saved_to}" if saved_to else "report: none kept (--aprt-report DIR keeps it)"
    )
    return lines[:25]


def test_line(name: str, detail: str) -> str:
    """Return one line on a failed self-test."""
    return f"self-test {name}: {detail}"[:WIDTH]


def counts(report: Report) -> str:
    """Return how many points have which status, in words."""
    found = Counter(point["status"] for point in report["points"])
    return ", ".join(f"{found[status]} {status}" for status in SYMBOLS if found[status])


def _strip(report: Report) -> list[str]:
    layers = by_layer(report)
    lines = [f"{len(report['points'])} points: {counts(report)}"]
    if len(layers) <= _TABLE_LAYERS:
        lines.append(f"{'layer':7}{'worst point':20}{'status':14}{'total cos':>10}{'engine':>10}"
                     f"{'local':>10}")  # fmt: skip
        for layer, points in layers.items():
            p = worst_of(points)
            lines.append(
                f"{'head' if layer is None else f'L{layer:02d}':7}{p['stage']:20}{p['status']:14}"
                f"{cosine(p['total']):>10}{rel_l2(p['engine']):>10}{rel_l2(p['local']):>10}"
            )
        return lines
    signs = "".join(SYMBOLS[worst_of(points)["status"]] for points in layers.values())
    lines += textwrap.wrap(f"worst status of each layer: {signs}", WIDTH)
    used = [f"{SYMBOLS[s]} {s}" for s in SYMBOLS if SYMBOLS[s] in signs]
    lines.append(f"  ({', '.join(used)}; last sign: the head)")
    p = worst_of(report["points"])
    tolerance = small(p["tolerance"]["rel_l2"]) if p["tolerance"] else ""
    worst = f"worst point: {p['point']}, total cosine {cosine(p['total'])}, "
    lines += textwrap.wrap(worst + f"local {rel_l2(p['local'])} (tolerance {tolerance})", WIDTH)
    return lines
