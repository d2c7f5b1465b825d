"""A run against an earlier one: what is worse fails, what was broken before is known.

Works on two reports alone.
"""

from __future__ import annotations

from pathlib import Path

from pytest_aprt.errors import SettingsError
from pytest_aprt.render.ladder import BAD, rungs
from pytest_aprt.render.words import excess
from pytest_aprt.report import BaselineJson, Report

GROWTH = 1.1
"""How much larger an error that was there before may become: two machines sum in other orders."""


def compare(report: Report, baseline: Report, path: Path) -> BaselineJson:
    """Return which failures are new or larger, which were there before, and which are gone.

    Args:
        report: of this run.
        baseline: of the earlier run.
        path: of the baseline, for messages.

    Raises:
        SettingsError: the baseline is of another model, oracle or prompt.
    """
    check(report, baseline, path)
    now, before = failures(report), failures(baseline)
    worse = [
        name for name, size in now.items() if name not in before or size > GROWTH * before[name]
    ]
    return {
        "path": str(path),
        "id": baseline["run"]["id"],
        "worse": worse,
        "known": [name for name in now if name not in worse],
        "better": [name for name in before if name not in now],
    }


def check(report: Report, baseline: Report, path: Path) -> None:
    """Refuse a baseline that measured something else.

    Raises:
        SettingsError: it is of another model, oracle or prompt.
    """
    pairs = {
        "model": (report["model"]["sha256"], baseline["model"]["sha256"]),
        "oracle": (report["oracle"]["sha256"], baseline["oracle"]["sha256"]),
        "prompt": tuple([p["tokens"] for p in r["run"]["prompts"]] for r in (report, baseline)),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise SettingsError(
                f"--aprt-baseline={path} is of another {what}: expected the report.json of a run "
                "with the same model, oracle and prompts; write a new one with --aprt-report"
            )


def failures(report: Report) -> dict[str, float]:
    """Return every failed test beside the gate, in the order of the ladder, and its size."""
    found = {f"selftest-{t['name']}": 0.0 for t in report["self_test"] if not t["passed"]}
    for rung in rungs(report["ladder"]):
        for row in rung.rows:
            if row.mark == BAD:
                found[f"{rung.name}-{row.cells[0]}"] = 0.0
    for point in report["points"]:
        if point["outcome"] == "failed":
            found[point["point"]] = excess(point)
    return found
