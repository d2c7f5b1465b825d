"""What a GitHub workflow shows: annotations beside the run, and a step summary.

GitHub shows ten errors of a step at most, so the verdict comes first and the origins follow.
Source: GitHub Docs, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

from pytest_aprt.render.ladder import BAD
from pytest_aprt.render.sheets import contracts
from pytest_aprt.render.words import passes, printable, size, span
from pytest_aprt.report import Report

_MOST = 10


def commands(report: Report) -> list[str]:
    """Return workflow commands, one a line: an error for what fails, a notice for what passes."""
    verdict = report["verdict"]
    if passes(report):
        return [_command("notice", "forward-pass parity", verdict["summary"]), *_claims(report)]
    lines = [_command("error", "forward-pass parity", verdict["summary"])]
    for origin in verdict["origins"][: _MOST - 1]:
        hint = f"; likely: {origin['hint']}" if origin["hint"] else ""
        text = f"error is born here: local rel_l2 {size(origin)}{hint}"
        lines.append(_command("error", span(origin), text))
    return (lines + _claims(report))[:_MOST]


def _claims(report: Report) -> list[str]:
    """Return an error for every claim that is falsified, a warning for those that overstate."""
    claims = contracts(report)
    flagged = zip(claims.table.rows, claims.table.marks, strict=True) if claims else ()
    found = [
        _command("warning" if row[1] == "overstated" else "error", row[0],
                 f"{row[1]}: {row[2]}; {row[5]} ({row[6]})")
        for row, mark in flagged if mark == BAD
    ]  # fmt: skip
    return found[: _MOST - 1]


def _command(level: str, title: str, text: str) -> str:
    """Return one command; its text may hold anything."""
    return f"::{level} title={_escaped(title, ':,')}::{_escaped(text)}"


def _escaped(text: str, further: str = "") -> str:
    text = printable(text)
    for character in "%\r\n" + further:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
