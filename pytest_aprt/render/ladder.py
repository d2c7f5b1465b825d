"""The rungs of the ladder as tables, whatever rungs a report holds.

A rung is a list of rows (mappings), or one mapping. Its columns are the union of its rows' keys,
so a rung that is new to the report shows without new code here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BAD, GOOD, NEUTRAL, FOLLOWS, SKIPPED = "bad", "good", "neutral", "follows", "skipped"

_MARKS = {
    # value of a row's status, outcome or passed: how the row is to be seen
    "broken": BAD,
    "failed": BAD,
    "differs": NEUTRAL,
    "inherited": FOLLOWS,
    "unavailable": SKIPPED,
    "skipped": SKIPPED,
    "falsified": BAD,
    "diverged": BAD,
    "False": BAD,
    "agree": GOOD,
    "pass": GOOD,
    "passed": GOOD,
    "True": GOOD,
}
_TELLING = ("status", "outcome", "passed", "supported")


@dataclass(frozen=True)
class Row:
    """One row: plain values, and whether it is bad, good or neither."""

    cells: tuple[Any, ...]
    mark: str


@dataclass(frozen=True)
class Rung:
    """One rung as a table; the bad rows come first."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The rung's name as a heading."""
        return self.name.replace("_", " ").capitalize()

    @property
    def state(self) -> tuple[str, str]:
        """Whether something is broken, follows, or could not be judged: words and their chip."""
        if self.bad:
            return f"{self.bad} broken", "diverged"
        follows = sum(row.mark == FOLLOWS for row in self.rows)
        if follows:
            return f"{follows} follow from another fault", "inherited"
        skipped = sum(row.mark == SKIPPED for row in self.rows)
        if skipped == len(self.rows):
            return "not judged", "inconclusive"
        return f"nothing broken, {skipped} not judged" if skipped else "nothing broken", "pass"

    @property
    def bad(self) -> int:
        """How many rows are bad."""
        return sum(row.mark == BAD for row in self.rows)


def rungs(ladder: Mapping[str, Any]) -> list[Rung]:
    """Return every rung that holds something, in the report's order."""
    found = [rung(name, value) for name, value in ladder.items() if value not in (None, [], {})]
    return [r for r in found if r.rows]


def rung(name: str, value: Any) -> Rung:
    """Return one rung: a list of mappings, one mapping, or a bare value."""
    if isinstance(value, Mapping):
        nested = [v for v in value.values() if _is_table(v)]
        rows = nested[0] if len(nested) == 1 and len(value) == 1 else [value]
    else:
        rows = value if isinstance(value, list) else [value]
    mappings = [row if isinstance(row, Mapping) else {"value": row} for row in rows]
    columns = tuple(dict.fromkeys(key for row in mappings for key in row))
    table = [Row(tuple(row.get(c, "") for c in columns), mark(row)) for row in mappings]
    table.sort(key=lambda row: row.mark != BAD)
    return Rung(name, columns, tuple(table))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def mark(row: Mapping[str, Any]) -> str:
    """Return whether a row is bad, good or neither."""
    for key in _TELLING:
        if key in row:
            return _MARKS.get(str(row[key]), _MARKS.get(str(row[key]).lower(), NEUTRAL))
    return NEUTRAL
