"""The rules that a contract file must keep, as one table.

SCHEMA-, PROVABILITY- and CRUX- ids are those of ``pv validate`` (paiml/aprender); APRT- ids are of
this package, for what that validator does not look at. Rules about several files or about an
earlier revision are in ``validate``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytest_aprt.contracts.contract import Contract, Falsifier
from pytest_aprt.contracts.ladder import height, rung_of
from pytest_aprt.contracts.lines import Map, Seq
from pytest_aprt.contracts.references import missing_references
from pytest_aprt.contracts.shapes import equations, misshapen

Severity = Literal["error", "warning"]
Found = Iterator[tuple[int, str]]


class Rule(NamedTuple):
    """One rule; ``find`` yields line and message of every place that breaks it."""

    id: str
    severity: Severity
    what: str
    find: Callable[[Contract], Found]


class Violation(NamedTuple):
    """One place that breaks a rule."""

    path: Path
    line: int
    rule: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.severity} {self.rule}: {self.message}"


KINDS = {
    # metadata.kind: rules of its own upstream that are not checked here
    "kernel": None, "registry": None, "model-family": None, "model-family-variant": None,
    "tokenizer": None, "training-loop": None, "pretraining-corpus": None,
    "training-precondition-gate": None, "corpus-assembly": None, "pattern": None, "schema": None,
    "beat-benchmark": "BEAT", "kaizen": "KAIZEN", "competitive-parity": "PARITY",
}  # fmt: skip

_TOP_LEVEL = (
    "metadata", "equations", "proof_obligations", "kernel_structure", "simd_dispatch",
    "enforcement", "falsification_tests", "kani_harnesses", "qa_gate", "verification_summary",
    "type_invariants", "coq_spec", "beat", "stories",
)  # fmt: skip
_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)([-+][0-9A-Za-z.+-]+)?")
_CONTRACT_STATUSES = frozenset({"ACTIVE", "ENFORCED"})  # of whole contracts: they claim no rung


def violations(contract: Contract) -> list[Violation]:
    """Return what breaks a rule, in order of line."""
    found = [
        Violation(contract.path, line, rule.id, rule.severity, message)
        for rule in RULES
        for line, message in rule.find(contract)
    ]
    return sorted(found, key=lambda v: v.line)


def rows(contract: Contract, key: str) -> Iterator[tuple[Map, int]]:
    """Yield the mappings of a list at top level, and the line of each."""
    value = contract.data.get(key)
    if isinstance(value, Seq):
        for item, line in zip(value, value.lines, strict=True):
            if isinstance(item, Map):
                yield item, line


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value) or (
        isinstance(value, str) and not value.strip()
    )  # fmt: skip


def _in_metadata(contract: Contract, key: str) -> int:
    if key in contract.metadata:
        return contract.metadata.line_of(key)
    return contract.data.line_of("metadata")


def _references(c: Contract) -> Found:
    if _empty(c.metadata.get("references")):
        yield _in_metadata(c, "references"), "metadata.references is empty"


def _version(c: Contract) -> Found:
    if not c.version:
        yield _in_metadata(c, "version"), "metadata.version is empty"


def _no_equations(c: Contract) -> Found:
    if c.kind == "kernel" and not equations(c):
        yield c.data.line_of("equations"), f"a kernel contract has no equations{_note(c)}"


def _no_formula(c: Contract) -> Found:
    found = equations(c)
    for name, equation in found.items():
        if isinstance(equation, Map) and _empty(equation.get("formula")):
            yield equation.line, f"equation {name}: formula is empty"


def _no_property(c: Contract) -> Found:
    for row, line in rows(c, "proof_obligations"):
        if _empty(row.get("property", row.get("statement"))):
            yield line, "proof obligation: property is empty"


def _same_formal(c: Contract) -> Found:
    yield from _repeated(
        (str(row.get("formal", row.get("verification", ""))).strip(), line)
        for row, line in rows(c, "proof_obligations")
    )


def _repeated(pairs: Iterator[tuple[str, int]], what: str = "formal") -> Found:
    first: dict[str, int] = {}
    for text, line in pairs:
        if text and text in first:
            yield line, f"{what} {text[:60]!r} stands in line {first[text]} already"
        first.setdefault(text, line)


def _same_id(c: Contract) -> Found:
    yield from _repeated(((f.id, f.line) for f in c.falsifiers), "falsifier id")


def _no_prediction(c: Contract) -> Found:
    for f in c.falsifiers:
        if not f.prediction:
            yield f.line, f"{f.id}: prediction is empty"


def _no_if_fails(c: Contract) -> Found:
    for f in c.falsifiers:
        if not f.if_fails:
            yield f.line, f"{f.id}: if_fails is empty"


def _same_kani(c: Contract) -> Found:
    pairs = ((str(row.get("id", "")), line) for row, line in rows(c, "kani_harnesses"))
    yield from _repeated(pairs, "kani id")


def _kani(key: str) -> Callable[[Contract], Found]:
    def find(c: Contract) -> Found:
        for row, line in rows(c, "kani_harnesses"):
            if _empty(row.get(key)):
                yield line, f"kani harness {row.get('id', '?')}: {key} is empty"

    return find


def _no_gate(c: Contract) -> Found:
    if c.kind == "kernel" and _empty(c.data.get("qa_gate")):
        yield c.data.line_of("qa_gate"), "a kernel contract has no qa_gate"


def _only_on(key: str, *types: str) -> Callable[[Contract], Found]:
    def find(c: Contract) -> Found:
        for row, line in rows(c, "proof_obligations"):
            kind = str(row.get("type", "invariant"))
            if key in row and kind not in types:
                yield line, f"{key} on an obligation of type {kind}: only on {' or '.join(types)}"

    return find


def _parents(c: Contract) -> Found:
    depends = c.metadata.get("depends_on")
    known = [str(item) for item in depends] if isinstance(depends, list) else []
    for row, line in rows(c, "proof_obligations"):
        parent = row.get("parent_contract")
        if parent is not None and str(parent) not in known:
            yield line, f"parent_contract {parent} is not in metadata.depends_on"


def _top_level_kind(c: Contract) -> Found:
    if "kind" in c.data:
        yield c.data.line_of("kind"), "kind stands at top level: move it into metadata"


def _near_misses(c: Contract) -> Found:
    known = {form: name for name in _TOP_LEVEL for form in _forms(name)}
    for key in c.data:
        meant = next((known[form] for form in sorted(_forms(key)) if form in known), None)
        if meant and key not in _TOP_LEVEL:
            yield c.data.line_of(key), f"key {key!r} is read by nobody: {meant!r} is meant"


def _forms(key: str) -> set[str]:
    """Return the key without case and separators, and what it is the plural of."""
    bare = "".join(character for character in key.lower() if character.isalnum())
    return {bare, bare.removesuffix("s"), bare.removesuffix("es")} - {""}


def _not_applicable(key: str) -> Callable[[Contract], Found]:
    def find(c: Contract) -> Found:
        for row, line in rows(c, "proof_obligations"):
            if row.get("applies_to") == "not_applicable" and _empty(row.get(key)):
                yield line, f"an obligation that is not applicable has no {key}"

    return find


def _dangling_na(c: Contract) -> Found:
    for row, line in rows(c, "proof_obligations"):
        for key in ("na_reason", "na_owner"):
            if key in row and row.get("applies_to") != "not_applicable":
                yield line, f"{key} on an obligation that applies"


def _note(c: Contract) -> str:
    return "" if "kind" in c.metadata else " (no metadata.kind, so it counts as a kernel)"


def _provability(c: Contract) -> Found:
    if c.kind != "kernel":
        return
    for key in ("proof_obligations", "falsification_tests", "kani_harnesses"):
        if _empty(c.data.get(key)):
            yield c.data.line_of(key), f"a kernel contract has no {key}{_note(c)}"
    obligations = sum(1 for _ in rows(c, "proof_obligations"))
    if 0 < len(c.falsifiers) < obligations:
        yield (
            c.data.line_of("falsification_tests"),
            f"{len(c.falsifiers)} falsification_tests for {obligations} proof_obligations: "
            "expected at least as many",
        )


def _demand(c: Contract) -> Found:
    score = c.metadata.get("demand_score")
    if score is not None and score not in (1, 2, 3, 4, 5):
        yield _in_metadata(c, "demand_score"), f"demand_score {score!r}: expected 1 to 5"


def _semver(c: Contract) -> Found:
    if c.version and not _SEMVER.fullmatch(c.version):
        yield _in_metadata(c, "version"), f"version {c.version!r} is not of the form 1.2.3"


def _binds_to(c: Contract) -> Found:
    known = equations(c)
    for f in c.falsifiers:
        if f.binds_to and f.binds_to not in known:
            names = ", ".join(known) or "none"
            yield (
                f.data.line_of("binds_to"),
                f"{f.id}: binds_to {f.binds_to!r} is no equation here; these are: {names}",
            )


def _statuses(c: Contract) -> Found:
    for f in c.falsifiers:
        if f.status is not None and rung_of(f.status) is None:
            yield f.line, f"{f.id}: status {f.status[:60]!r} is no known one"
    if c.status is not None and rung_of(c.status) is None:
        word = c.status.split()[0].upper() if c.status else ""
        if word not in _CONTRACT_STATUSES:
            yield _in_metadata(c, "status"), f"status {c.status[:60]!r} is no known one"


def _no_evidence(c: Contract) -> Found:
    for f in c.falsifiers:
        if height(rung_of(f.status)) > 0 and not f.evidence:
            yield f.line, f"{f.id}: status {_word(f)} without any evidence"


def _word(f: Falsifier) -> str:
    return (f.status or "").split()[0]


def _check(c: Contract) -> Found:
    from pytest_aprt.contracts.checks import problem_with

    for f in c.falsifiers:
        problem = f.check is not None and problem_with(f.check)
        if problem:
            yield f.data.line_of("check"), f"{f.id}: {problem}"


def _gone(c: Contract) -> Found:
    for f in c.falsifiers:
        for key, path in missing_references(f, c.path):
            yield f.data.line_of(key), f"{f.id}: {key} names {path}, which is not there"


def _unchecked(c: Contract) -> Found:
    if "competitor" in c.metadata:
        # a list of one project's own, which grows with it
        yield _in_metadata(c, "competitor"), "competitor: its rule CRUX-002 is not checked here"
    if c.kind not in KINDS:
        yield _in_metadata(c, "kind"), f"kind {c.kind!r} is no known one"
    elif KINDS[c.kind]:
        yield (
            _in_metadata(c, "kind"),
            f"kind {c.kind}: its {KINDS[c.kind]}- rules are not checked here",
        )


RULES = (
    Rule("SCHEMA-001", "error", "references are given", _references),
    Rule("SCHEMA-002", "error", "a version is given", _version),
    Rule("SCHEMA-003", "error", "a kernel has equations", _no_equations),
    Rule("SCHEMA-004", "error", "equations have a formula", _no_formula),
    Rule("SCHEMA-005", "error", "obligations have a property", _no_property),
    Rule("SCHEMA-006", "warning", "no two obligations have one formal", _same_formal),
    Rule("SCHEMA-007", "error", "falsifier ids are unique in a file", _same_id),
    Rule("SCHEMA-008", "error", "falsifiers have a prediction", _no_prediction),
    Rule("SCHEMA-009", "warning", "falsifiers say what it means if they fail", _no_if_fails),
    Rule("SCHEMA-010", "error", "kani ids are unique", _same_kani),
    Rule("SCHEMA-011", "error", "kani harnesses name an obligation", _kani("obligation")),
    Rule("SCHEMA-012", "warning", "kani harnesses have a bound", _kani("bound")),
    Rule("SCHEMA-013", "warning", "a kernel has a qa_gate", _no_gate),
    Rule("SCHEMA-014", "error", "requires is for postconditions",
         _only_on("requires", "postcondition")),
    Rule("SCHEMA-015", "error", "applies_to_phase is for loops",
         _only_on("applies_to_phase", "loop_invariant", "loop_variant")),
    Rule("SCHEMA-016", "error", "parent_contract is for subcontracts",
         _only_on("parent_contract", "subcontract")),
    Rule("SCHEMA-017", "error", "a parent_contract is depended on", _parents),
    Rule("SCHEMA-018", "error", "kind is in metadata", _top_level_kind),
    Rule("SCHEMA-019", "error", "no key is a near miss of a known one", _near_misses),
    Rule("SCHEMA-021", "error", "what is not applicable has a reason",
         _not_applicable("na_reason")),
    Rule("SCHEMA-022", "error", "what is not applicable has an owner",
         _not_applicable("na_owner")),
    Rule("SCHEMA-023", "error", "na_reason and na_owner are for what is not applicable",
         _dangling_na),
    Rule("PROVABILITY-001", "error", "a kernel can be proven and falsified", _provability),
    Rule("CRUX-001", "error", "a demand_score is 1 to 5", _demand),
    Rule("APRT-001", "error", "fields have their shape", misshapen),
    Rule("APRT-002", "warning", "a version is of the form 1.2.3", _semver),
    Rule("APRT-003", "warning", "binds_to names an equation of the file", _binds_to),
    Rule("APRT-004", "warning", "statuses are known", _statuses),
    Rule("APRT-005", "warning", "a status that claims has evidence", _no_evidence),
    Rule("APRT-008", "error", "a check is of a known kind, with its settings", _check),
    Rule("APRT-009", "warning", "tests and evidence that are named exist", _gone),
    Rule("APRT-010", "warning", "a kind is known, and what is not checked is told", _unchecked),
)  # fmt: skip
"""Every rule about one file; 020 (YAML) is the loader's, APRT-006 and -007 ``validate``'s."""
