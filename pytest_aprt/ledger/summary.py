"""Contracts and records put together: what is declared, what is supported, what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_aprt.contracts.bindings import ShellSettings, bind
from pytest_aprt.contracts.contract import Contract, Falsifier, text_hash
from pytest_aprt.contracts.ladder import height, rung_of
from pytest_aprt.errors import ContractError
from pytest_aprt.ledger.levels import Supported, supported
from pytest_aprt.ledger.record import Problem, Record

SCHEMA = "aprt-ledger-summary-v1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One falsifier: the status that it declares and the one that its evidence supports."""

    contract: str
    version: str
    id: str
    rule: str
    declared: str | None
    supported: Supported
    gone: bool = False

    @property
    def overstated(self) -> bool:
        """Whether the contract declares more than the evidence supports."""
        return height(rung_of(self.declared)) > max(0, height(self.supported.status))

    @property
    def stale(self) -> bool:
        """Whether evidence expired, or the falsifier is in no contract any more."""
        return bool(self.supported.expired) or self.gone

    @property
    def name(self) -> str:
        """Contract and id."""
        return f"{self.contract}::{self.id}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows, those that need attention first, and how they changed since a base."""

    rows: list[Row]
    problems: list[Problem]
    records: int
    since: str | None = None
    changes: Mapping[str, list[str]] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many falsifiers each status is supported for."""
        return dict(Counter(row.supported.status for row in self.rows))

    @property
    def tally(self) -> tuple[int, int]:
        """A + B: discharged, and those that hold partially or functionally; blocked ones apart."""
        counts = self.counts
        partial = counts.get("PARTIAL_ALGORITHM_LEVEL", 0) + counts.get("FUNCTIONAL", 0)
        return counts.get("DISCHARGED", 0), partial

    @property
    def flagged(self) -> list[Row]:
        """Rows that are falsified or overstated."""
        return [r for r in self.rows if r.overstated or r.supported.status == "FALSIFIED"]


def claim_hash(falsifier: Falsifier) -> str:
    """Return a hash of what a falsifier claims."""
    return text_hash(falsifier.rule, falsifier.prediction)


def summarise(
    contracts: Mapping[str, Contract],
    records: Sequence[Record],
    problems: Sequence[Problem] = (),
    *,
    base: Sequence[Record] | None = None,
    since: str | None = None,
) -> Summary:
    """Return the summary of a ledger.

    Args:
        contracts: by the name that records use.
        records: of the ledger, oldest first.
        problems: lines that count for nothing.
        base: the records of an earlier state; changes are told against it.
        since: how the base is called.

    Raises:
        ContractError: there is no record, so that nothing could be said.
    """
    if not records:
        raise ContractError("the ledger has no record that counts: expected at least one run")
    rows = _rows(contracts, records)
    changes = None if base is None else _changes(rows, _rows(contracts, base))
    return Summary(
        rows=sorted(rows, key=_attention),
        problems=list(problems),
        records=len(records),
        since=since,
        changes=changes,
    )


def _attention(row: Row) -> tuple[int, str, str]:
    status = row.supported.status
    place = (status == "FALSIFIED", row.overstated, row.stale, status == "BLOCKER_FIXTURE_ABSENT")
    return place.index(True) if True in place else len(place), row.contract, row.id


def _rows(contracts: Mapping[str, Contract], records: Sequence[Record]) -> list[Row]:
    by_name: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        by_name.setdefault((record.contract, record.id), []).append(record)
    rows = []
    for name, contract in contracts.items():
        for falsifier in contract.falsifiers:
            found = by_name.pop((name, falsifier.id), [])
            rows.append(_row(name, contract, falsifier, found))
    for (name, falsifier_id), found in by_name.items():
        last = found[-1]
        why = "it is in no contract any more"
        rows.append(
            Row(contract=name, version=last.version, id=falsifier_id, rule="", declared=None,
                supported=Supported(status="PROPOSED", why=why), gone=True)
        )  # fmt: skip
    return rows


def _row(name: str, contract: Contract, falsifier: Falsifier, records: list[Record]) -> Row:
    bound = bind(falsifier, ShellSettings(True, 1.0))
    check = "" if isinstance(bound, str) else text_hash(bound.by, bound.source)
    python = [r.check for r in records if r.by == "python"]
    if python:  # its source is known in a run alone, where conftest.py was loaded
        check = python[-1]
    return Row(
        contract=name,
        version=contract.version,
        id=falsifier.id,
        rule=falsifier.rule,
        declared=falsifier.status,
        supported=supported(
            records, version=contract.version, claim=claim_hash(falsifier), check=check,
            models=contract.models,
        ),
    )  # fmt: skip


def _changes(now: Iterable[Row], before: Iterable[Row]) -> dict[str, list[str]]:
    old = {row.name: row.supported.status for row in before}
    found: dict[str, list[str]] = {"raised": [], "lowered": [], "new": []}
    for row in now:
        was, status = old.get(row.name, "PROPOSED"), row.supported.status
        if was == status:
            continue
        kind = "raised" if height(status) > height(was) else "lowered"
        found["new" if row.name not in old else kind].append(f"{row.name}: {was} -> {status}")
    return {kind: sorted(names) for kind, names in found.items()}


def contracts_by_name(root: Path, folders: Sequence[Path]) -> dict[str, Contract]:
    """Return the contracts of folders by their paths from ``root``, as records name them.

    Raises:
        ContractError: a folder is not there, or a contract cannot be read.
    """
    from pytest_aprt.contracts.contract import contracts_in, load

    found = {}
    for folder in folders:
        if not folder.exists():
            raise ContractError(f"{folder}: no such folder; name that of the contracts")
        for path in contracts_in(folder) if folder.is_dir() else [folder]:
            contract = load(path)
            if not isinstance(contract, str):
                name = path.resolve()
                base = root.resolve()
                inside = name.is_relative_to(base)
                found[(name.relative_to(base) if inside else name).as_posix()] = contract
    return found


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain JSON types."""
    discharged, partial = summary.tally
    return {
        "schema": SCHEMA,
        "records": summary.records,
        "tally": {"discharged": discharged, "partial": partial},
        "counts": summary.counts,
        "flagged": [row.name for row in summary.flagged],
        "since": summary.since,
        "changes": summary.changes,
        "problems": [{"line": p.line, "text": p.text} for p in summary.problems],
        "falsifiers": [
            {
                "contract": row.contract,
                "version": row.version,
                "id": row.id,
                "rule": row.rule,
                "declared": row.declared,
                "supported": row.supported.status,
                "why": row.supported.why,
                "overstated": row.overstated,
                "stale": row.stale,
                "expired": list(row.supported.expired),
                "runs": [r.run for r in row.supported.records],
            }
            for row in summary.rows
        ],
    }
