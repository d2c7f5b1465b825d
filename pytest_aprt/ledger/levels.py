"""What counts as which status: one table, each row with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from pytest_aprt.ledger.record import Record

REAL_PARAMETERS = 100_000_000
"""Below this a model is tiny: no model that people use is smaller, fixtures are by far."""


class Level(NamedTuple):
    """A status, and when the latest passed records of every subject support it."""

    status: str
    when: Callable[[Sequence[Record], tuple[str, ...]], bool]
    why: str


@dataclass(frozen=True, kw_only=True)
class Supported:
    """The status that evidence supports, why, by which records, and what no longer counts."""

    status: str
    why: str
    records: tuple[Record, ...] = ()
    expired: tuple[str, ...] = ()


def is_named(record: Record, models: tuple[str, ...]) -> bool:
    """Return whether a record is about the model that the contract names.

    A contract that names none speaks of models that people use: those of real size.
    """
    if record.model is None:
        return False
    if not models:
        return int(record.model.get("parameters", 0)) >= REAL_PARAMETERS
    source, sha256 = str(record.model.get("source", "")), str(record.model.get("sha256", ""))
    return any(
        fnmatchcase(source, pattern) or fnmatchcase(source, f"*/{pattern}") or sha256 == pattern
        for pattern in models
    )


def _hosts(records: Sequence[Record], models: tuple[str, ...]) -> bool:
    by_model: dict[str, set[str]] = {}
    for record in records:
        if record.model is not None and is_named(record, models):
            by_model.setdefault(str(record.model.get("sha256")), set()).add(record.host)
    return any(len(hosts) > 1 for hosts in by_model.values())


def _byte_equal(records: Sequence[Record], models: tuple[str, ...]) -> bool:
    return any(r.byte_equal and is_named(r, models) for r in records)


LEVELS = (
    Level("DISCHARGED", _hosts,
          "held on the named model on machines of two kinds: no property of one machine"),
    Level("DISCHARGED", _byte_equal,
          "equal to an oracle byte for byte on the named model: nothing is left to rounding"),
    Level("FUNCTIONAL", lambda records, models: any(is_named(r, models) for r in records),
          "held in a live run on the named model, on machines of one kind"),
    Level("PARTIAL_ALGORITHM_LEVEL", lambda records, models: any(r.model for r in records),
          "held on a model that is tiny or not the named one: shows the code, not the model"),
    Level("PARTIAL_ALGORITHM_LEVEL", lambda records, models: bool(records),
          "held on synthetic data: shows the rule, no model was run"),
)  # fmt: skip
"""From the highest to the lowest; the first that applies is supported."""


def supported(
    records: Sequence[Record], *, version: str, claim: str, check: str, models: tuple[str, ...]
) -> Supported:
    """Return what the records of one falsifier support.

    Args:
        records: of one contract and id, oldest first.
        version: the contract's, as it stands.
        claim: hash of rule and prediction, as they stand.
        check: hash of what evaluates the claim, as it stands; empty where nothing does.
        models: patterns of the model that the contract names.
    """
    current, expired = _current(records, version, claim, check)
    latest: dict[str, Record] = {}
    for record in current:
        if record.outcome in ("passed", "failed"):
            if record.verdict == "INCONCLUSIVE":
                expired.append(f"{record.time_utc}: the run was inconclusive")
                continue
            latest[_subject(record)] = record
    failed = tuple(r for r in latest.values() if r.outcome == "failed")
    passed = tuple(
        r for r in current
        if r.outcome == "passed" and latest.get(_subject(r), r).outcome == "passed"
        and r.verdict != "INCONCLUSIVE"
    )  # fmt: skip
    told = tuple(dict.fromkeys(expired))
    if failed:
        why = f"falsified: {failed[-1].detail}"
        return Supported(status="FALSIFIED", why=why, records=failed, expired=told)
    for level in LEVELS if passed else ():
        if level.when(passed, models):
            return Supported(status=level.status, why=level.why, records=passed, expired=told)
    last = current[-1] if current else None
    if last is not None and last.outcome == "blocked":
        why = f"what it needs was not there: {last.detail}"
        return Supported(status="BLOCKER_FIXTURE_ABSENT", why=why, records=(last,), expired=told)
    why = "no run evaluated it" if last is None else f"{last.outcome}: {last.detail}"
    return Supported(status="PROPOSED", why=why, expired=told)


def _subject(record: Record) -> str:
    return "synthetic" if record.model is None else str(record.model.get("sha256"))


def _current(
    records: Sequence[Record], version: str, claim: str, check: str
) -> tuple[list[Record], list[str]]:
    """Return the records that still count, and why the others do not."""
    newest: dict[str, str] = {}  # a model's source: its hash in the latest run
    for record in records:
        if record.model is not None:
            newest[str(record.model.get("source"))] = str(record.model.get("sha256"))
    current, expired = [], []
    for record in records:
        source = None if record.model is None else str(record.model.get("source"))
        if record.version != version:
            why = f"the contract went from {record.version or 'no version'} to {version}"
        elif record.claim != claim:
            why = "rule or prediction changed, and the version did not"
        elif record.check != check and record.check:
            why = "the check changed"
        elif source is not None and newest[source] != _subject(record):
            why = f"the model {source} changed"
        else:
            current.append(record)
            continue
        if record.outcome in ("passed", "failed"):
            expired.append(why)
    return current, expired
