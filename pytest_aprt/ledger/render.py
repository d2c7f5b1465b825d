"""A ledger's summary as people read it: for the terminal, and for a file in a repository."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from pytest_aprt.contracts.ladder import LADDER
from pytest_aprt.ledger.summary import Row, Summary

_WIDTH = 80

_MARKS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("FALSIFIED", lambda row: row.supported.status == "FALSIFIED"),
    ("OVERSTATED", lambda row: row.overstated),
    ("stale", lambda row: row.stale),
)


def text(summary: Summary) -> str:
    """Return the summary for a terminal of 80 columns: what needs attention first, each by itself.

    The rest is listed by what supports it, which mostly is the same for many.
    """
    lines = []
    for line in headline(summary):
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in summary.rows:
        mark = _mark(row)
        if not mark:
            alike.setdefault((_statuses(row), _why(row)), []).append(row)
            continue
        declared = f"declared {row.declared or 'nothing'}, supported {row.supported.status}"
        lines += ["", f"{mark}  {row.id}  {row.contract}", *_indented(f"{declared}{_runs(row)}"),
                  *_indented(_why(row))]  # fmt: skip
    for (statuses, why), rows in alike.items():
        lines += ["", f"{statuses}: {len(rows)}", *_indented(why)]
        width = max(len(row.id) for row in rows)
        contract = ""
        for row in rows:
            if row.contract != contract:
                contract = row.contract
                lines.append(f"  {contract}")
            lines.append(f"    {row.id:{width}}{_runs(row)}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _statuses(row: Row) -> str:
    if row.declared == row.supported.status:
        return f"{row.supported.status}, as declared"
    return f"{row.supported.status}, declared {row.declared or 'nothing'}"


def _indented(value: str) -> list[str]:
    return textwrap.wrap(
        value, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _runs(row: Row) -> str:
    found = row.supported.records
    if not found:
        return ""
    return f" ({len(found)} run{'s' if len(found) > 1 else ''}, last {found[-1].time_utc[:10]})"


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


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
