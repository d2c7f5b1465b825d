"""The text of a failed falsifier: one line that stands alone, the claim, the measurement."""

from __future__ import annotations

from textwrap import fill

from pytest_aprt.contracts.contract import Falsifier
from pytest_aprt.contracts.evaluate import Evaluated
from pytest_aprt.report import Report

STAGE_BOUND = ("report", "captures", "model")
"""Checks that need one of these look at stages, so the run's first divergence explains them."""


def render(falsifier: Falsifier, evaluated: Evaluated, report: Report | None) -> str:
    """Return the failure text."""
    word = "falsified" if evaluated.outcome == "failed" else "could not be evaluated"
    rows = {
        "rule": falsifier.rule,
        "prediction": falsifier.prediction,
        "measured": evaluated.detail,
        "if it fails": falsifier.if_fails,
    }
    lines = [f"{falsifier.id}: {word}: {evaluated.detail}", ""]
    lines += [_row(name, text) for name, text in rows.items() if text]
    if report is not None and evaluated.needs in STAGE_BOUND:
        first = report["verdict"]["first_divergence"]
        good = first["previous_good"] if first else None
        place = "none in this run" if first is None else first["point"]
        lines.append(_row("first divergence", place + (f" ({good} was good)" if good else "")))
    lines.append(_row("where", f"{evaluated.contract}:{falsifier.line}"))
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    indent = " " * 18
    return fill(" ".join(text.split()), 96, initial_indent=f"{name:<18}", subsequent_indent=indent,
                break_long_words=False, break_on_hyphens=False)  # fmt: skip
