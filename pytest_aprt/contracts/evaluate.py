"""One falsifier in one run: from its binding to an outcome that is told and recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_aprt.contracts.contract import Contract, Falsifier, text_hash
from pytest_aprt.contracts.subject import BlockedError, Bound, Subject
from pytest_aprt.errors import AprtError, blame

BLOCKED = "BLOCKER_FIXTURE_ABSENT"
UNBOUND = "UNBOUND"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What became of one falsifier; plain types alone, so that workers can send it.

    ``outcome`` is passed, failed, blocked, unbound or error (the check itself broke).
    ``check_hash`` changes with what evaluates the claim, ``needs`` says what that looked at.
    """

    contract: str
    version: str
    models: list[str]
    id: str
    rule: str
    declared: str | None
    outcome: str
    detail: str
    by: str
    needs: str
    check_hash: str
    byte_equal: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


def evaluate(subject: Subject, bound: Bound | str, name: str) -> Evaluated:
    """Evaluate a falsifier; whatever goes wrong is an outcome, too.

    Args:
        subject: what it is held against.
        bound: how it is bound, or why it is not.
        name: of the contract's file, as reports show it.
    """
    contract, falsifier = subject.contract, subject.falsifier
    if isinstance(bound, str):
        return _of(contract, falsifier, name, "unbound", bound, None)
    try:
        finding = bound.evaluate(subject)
    except BlockedError as error:
        return _of(contract, falsifier, name, "blocked", str(error), bound)
    except AprtError as error:
        return _of(contract, falsifier, name, "error", str(error), bound)
    except Exception as error:
        return _of(contract, falsifier, name, "error", blame(error), bound)
    return _of(
        contract, falsifier, name, "passed" if finding.held else "failed", finding.detail, bound,
        byte_equal=finding.byte_equal, values=_plain(finding.values),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a value that JSON and xdist can carry; what they cannot is told as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _of(
    contract: Contract, falsifier: Falsifier, name: str, outcome: str, detail: str,
    bound: Bound | None, **more: Any,
) -> Evaluated:  # fmt: skip
    return Evaluated(
        contract=name,
        version=contract.version,
        models=list(contract.models),
        id=falsifier.id,
        rule=falsifier.rule,
        declared=falsifier.status,
        outcome=outcome,
        detail=detail,
        by=bound.by if bound else "nothing",
        needs=bound.needs if bound else "nothing",
        check_hash=text_hash(bound.by, bound.source) if bound else "",
        **more,
    )
