"""A ledger's summary as people read it: for the terminal, and for a file in a repository."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from pytest_aprt.contracts.ladder import LADDER
from pytest_aprt.ledger.summary import Row, Summary

_MARKS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("FALSIFIED", lambda row: row.supported.status == "FALSIFIED"),
    ("OVERSTATED", lambda row: row.overstated),
    ("stale", lambda row: row.stale),
)


def text(summary: Summary) -> str:
    """Return the summary for a terminal: what needs attention first."""
    head = ["", "falsifier", "declared", "supported", "runs", "why"]
    rows = [
        [_mark(r), r.id, r.declared or "", r.supported.status, len(r.supported.records) or "",
         _short(_why(r))]
        for r in summary.rows
    ]  # fmt: skip
    lines = [*headline(summary), "", tabulate(rows, head, tablefmt="plain", disable_numparse=True)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown(summary: Summary) -> str:
    """Return the summary for a repository: in the order of contracts and ids, small diffs."""
    lines = ["# Falsification ledger", "", *[f"- {line}" for line in headline(summary)], ""]
    by_contract: dict[str, list[Row]] = {}
    for row in sorted(summary.rows, key=lambda r: (r.contract, r.id)):
        by_contract.setdefault(row.contract, []).append(row)
    for contract, rows in by_contract.items():
        lines += [f"## {contract} {rows[0].version}", ""]
        cells = [
            [r.id, _cell(r.rule), r.declared or "", r.supported.status, _mark(r), _cell(_why(r)),
             _cell(_evidence(r))]
            for r in rows
        ]  # fmt: skip
        head = ["id", "rule", "declared", "supported", "", "why", "latest evidence"]
        # One width for all rows would change every line with the longest.
        lines += ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]
        lines.append("")
    return "\n".join(lines)


def headline(summary: Summary) -> list[str]:
    """Return the lines that stand above the table."""
    discharged, partial = summary.tally
    counts = summary.counts
    functional = counts.get("FUNCTIONAL", 0)
    blocked = counts.get("BLOCKER_FIXTURE_ABSENT", 0)
    lines = [
        f"tally {discharged}+{partial} of {len(summary.rows)} falsifiers: {discharged} discharged, "
        f"{partial} partial ({functional} of them functional); {blocked} blocked, not counted"
    ]
    lines.append(", ".join(f"{counts[status]} {status}" for status in LADDER if status in counts))
    for word, test in (("falsified", _MARKS[0][1]), ("overstated", _MARKS[1][1])):
        ids = [row.id for row in summary.rows if test(row)]
        if ids:
            lines.append(f"{word}: {', '.join(ids)}")
    if summary.changes is not None:
        found = [f"{kind} {name}" for kind, names in summary.changes.items() for name in names]
        lines.append(f"since {summary.since}: " + ("; ".join(found) or "no change"))
    lines += [f"line {p.line} {p.text}" for p in summary.problems]
    return lines


def _mark(row: Row) -> str:
    return next((mark for mark, test in _MARKS if test(row)), "")


def _why(row: Row) -> str:
    expired = row.supported.expired
    return row.supported.why + (f"; expired: {expired[-1]}" if expired else "")


def _evidence(row: Row) -> str:
    if not row.supported.records:
        return ""
    last = row.supported.records[-1]
    model = f", {last.model.get('source')}" if last.model else ""
    return f"{last.time_utc[:10]}{model}: {last.detail}"


def _short(value: str) -> str:
    return value if len(value) <= 90 else value[:87] + "..."


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
