"""The ladder of evidence, and the many words by which contracts in the field name its rungs."""

from __future__ import annotations

import re
from typing import NamedTuple


class Rung(NamedTuple):
    """A status that evidence can support; a higher ``height`` claims more."""

    height: int
    what: str


LADDER = {
    "FALSIFIED": Rung(-1, "a check of the claim failed, and none has passed since"),
    "BLOCKER_FIXTURE_ABSENT": Rung(0, "what the check needs is not there"),
    "PROPOSED": Rung(0, "written down; nothing was evaluated"),
    "PARTIAL_ALGORITHM_LEVEL": Rung(1, "held on synthetic data or a tiny model"),
    "FUNCTIONAL": Rung(2, "held in a live run on the named model"),
    "DISCHARGED": Rung(3, "held in runs on different machines, or byte-equal to an oracle"),
}

_WORDS = {
    # the field's word: the rung that it claims
    "PROPOSED": "PROPOSED",
    "PENDING": "PROPOSED",
    "PLANNED": "PROPOSED",
    "DEFERRED": "PROPOSED",
    "DRAFT": "PROPOSED",
    "DRAFT_RED": "PROPOSED",
    "PARTIAL": "PARTIAL_ALGORITHM_LEVEL",
    "PARTIAL_ALGORITHM_LEVEL": "PARTIAL_ALGORITHM_LEVEL",
    "PARTIALLY_DISCHARGED": "PARTIAL_ALGORITHM_LEVEL",
    "ALGORITHM_LEVEL_DISCHARGED": "PARTIAL_ALGORITHM_LEVEL",
    "ACTIVE_ALGORITHM_LEVEL": "PARTIAL_ALGORITHM_LEVEL",
    "PASS": "PARTIAL_ALGORITHM_LEVEL",  # a passed test, on nothing that is named
    "VERIFIED": "PARTIAL_ALGORITHM_LEVEL",
    "FUNCTIONAL": "FUNCTIONAL",
    "FUNCTIONAL_DISCHARGED": "FUNCTIONAL",
    "ACTIVE_FUNCTIONAL": "FUNCTIONAL",
    "ACTIVE_RUNTIME": "FUNCTIONAL",
    "SHIPPED": "FUNCTIONAL",
    "DISCHARGED": "DISCHARGED",
    "FULL_DISCHARGED": "DISCHARGED",
    "LIVE_DISCHARGED": "DISCHARGED",
    "FAIL": "FALSIFIED",
    "FALSIFIED": "FALSIFIED",
    "BLOCKED": "BLOCKER_FIXTURE_ABSENT",
    "BLOCKER_FIXTURE_ABSENT": "BLOCKER_FIXTURE_ABSENT",
    "BLOCKER_UPSTREAM_MISSING": "BLOCKER_FIXTURE_ABSENT",
}


def rung_of(status: str | None) -> str | None:
    """Return the rung that a status claims; None where the word is unknown.

    Prose after the word does not matter (``VERIFIED - loss within 1 %``); no status claims
    nothing, as PROPOSED does.
    """
    if status is None:
        return "PROPOSED"
    word = re.match(r"[A-Za-z][A-Za-z0-9_-]*", status.strip())
    return _WORDS.get(word[0].upper().replace("-", "_")) if word else None


def height(rung: str | None) -> int:
    """Return how much a rung claims; an unknown one claims nothing."""
    return LADDER[rung].height if rung in LADDER else 0
