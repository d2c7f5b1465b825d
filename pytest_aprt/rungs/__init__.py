"""The ladder: what is judged before and after the stages, one module for each rung.

Nothing here imports torch, so that the names of tests cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LADDER = ("tokens", "config", "weights", "stages", "logits", "decode", "path")
"""The rungs in order; a verdict names the first that breaks."""

TOKENS = (
    "vocabulary", "texts", "types", "merges", "bos", "eos", "add_bos", "add_eos", "pre_tokenizer",
    "prose", "code", "digits", "spaces", "newlines", "emoji", "scripts", "special", "user",
)  # fmt: skip
LOGITS = ("last", "all")
PATH = ("logits",)
"""The tests of the rungs; ``last`` is the last position, ``all`` all positions of a prompt."""


def decode_names(steps: int) -> tuple[str, ...]:
    """Return the tests of the decode rung."""
    return (*(f"step{k}" for k in range(1, steps + 1)), "growth", "text") if steps else ()


ROW_STATUSES = {
    # status of a row of the rungs tokens, logits, decode and path: outcome of its test
    "pass": "passed",
    "differs": "passed",  # a difference that does not change the result
    "near-tie": "passed",  # a flip that rounding explains
    "noise": "passed",  # a flip that the quantised weights alone cause
    "inherited": "xfailed",  # follows from a stage or a fact that breaks
    "broken": "failed",
    "unavailable": "skipped",  # the reason says what is missing
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One test of a rung: its name within the rung, what was found, in words and in figures.

    ``figures`` holds plain JSON types, non-finite numbers as they are.
    """

    name: str
    status: str  # of ROW_STATUSES
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether the rung breaks here."""
        return self.status == "broken"


def unavailable(names: Iterable[str], reason: str) -> list[Row]:
    """Return rows that could not be judged, for one and the same reason."""
    return [Row(name=name, status="unavailable", reason=reason) for name in names]


def judged(name: str, reason: str = "", **figures: Any) -> Row:
    """Return a row that is broken for a reason, and passes without one."""
    return Row(name=name, status="broken" if reason else "pass", reason=reason, figures=figures)


def following(rows: Iterable[Row], cause: str) -> list[Row]:
    """Return rows of which the broken ones follow from ``cause``.

    What a step with the cache has against the model's own prefill follows from nothing before it.
    """
    return [
        replace(row, status="inherited", reason=f"follows from {cause}: {row.reason}")
        if row.broken and "first_point" not in row.figures
        else row
        for row in rows
    ]
