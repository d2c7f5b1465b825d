"""Contracts of all forms that the field has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_aprt.contracts.contract import load, parse
from pytest_aprt.contracts.ladder import LADDER, height, rung_of

DATA = Path(__file__).parent / "data"


def test_a_plain_contract():
    contract = load(DATA / "kernel.yaml")
    assert (contract.kind, contract.version, contract.status) == ("kernel", "1.0.0", None)
    first = contract.falsifiers[0]
    assert (first.id, first.rule, first.line) == ("FALSIFY-SM-001", "sums to one", 28)
    assert (first.status, first.evidence, first.check) == (None, (), None)
    assert contract.data["proof_obligations"][0]["tolerance"] == 1e-6
    assert contract.metadata["created"] == "2026-01-02"


def test_every_oddity_is_read_and_kept():
    contract = load(DATA / "odd.yaml")
    by_id = {f.id: f for f in contract.falsifiers}
    assert list(by_id) == ["FALSIFY-ODD-007", "FALSIFY-ODD-009", "FALSIFY-ODD-008",
                           "FALSIFY-ODD-011", "F-QW3-MOE-001", "FALSIFY-F2-ACCEPT"]  # fmt: skip
    aliased = by_id["FALSIFY-ODD-007"]
    assert (aliased.rule, aliased.prediction, aliased.test, aliased.if_fails) == (
        "an alias for rule", "an alias for prediction", "./run.sh --check",
        "an alias for if_fails")  # fmt: skip
    assert (aliased.status, aliased.evidence) == ("DISCHARGED", ("holds",))
    assert aliased.data["ship_blocking"] is True and aliased.data["issue"].startswith("https")
    assert by_id["FALSIFY-ODD-009"].status == "FUNCTIONAL"
    assert by_id["FALSIFY-ODD-009"].evidence == ("a log", "holds")
    assert by_id["FALSIFY-ODD-008"].evidence == ("src/a.rs", "f", "g", "prose")
    assert by_id["FALSIFY-ODD-008"].prediction == "0.001"
    assert by_id["FALSIFY-ODD-011"].status == "ALGORITHM_LEVEL_DISCHARGED"
    assert by_id["FALSIFY-ODD-011"].evidence == ("2026-05-04", "crates/a.rs")
    assert by_id["F-QW3-MOE-001"].evidence == ("host a", "host b")
    assert contract.status == "ACTIVE_RUNTIME"
    assert contract.data["five_whys"].startswith("1. Why?")


@pytest.mark.parametrize(("name", "text", "what"), [
    ("binding.yaml", "metadata: {version: 1}\n", "a binding registry"),
    ("x--binding.yaml", "version: 1\nbindings: []\n", "a binding registry"),
    ("ontology.yaml", "a: 1\n", "an ontology"),
    (".hidden.yaml", "metadata: {}\n", "a hidden file"),
    ("a.yaml", "", "an empty file"),
    ("a.yaml", "# only a comment\n", "an empty file"),
    ("a.yaml", "- a\n- b\n", "a list or text"),
    ("a.yaml", "on: push\njobs: {}\n", "neither metadata nor falsification_tests"),
])  # fmt: skip
def test_other_files_are_told_from_contracts(name, text, what):
    found = parse(text, Path(name))
    assert isinstance(found, str) and what in found


@pytest.mark.parametrize(("text", "line", "says"), [
    ("metadata: x\n", 1, "metadata: expected a mapping"),
    ("metadata: {}\nfalsification_tests: {a: 1}\n", 2, "expected a list"),
    ("metadata: {}\nfalsification_tests:\n  - rule: r\n", 3, "an entry has no id"),
    ("metadata: {}\nfalsification_tests:\n  - just text\n", 3, "expected a mapping with id"),
    ("metadata: {}\nfalsification_tests:\n  - id: A::B\n", 3, "no space, bracket or '::'"),
    ("metadata: {}\nfalsification_tests:\n  - id: A\n    rule: [x]\n", 4, "A: rule: expected text"),
    ("metadata: {}\nfalsification_tests:\n  - id: A\n    check: yes\n", 4, "check: expected a map"),
])  # fmt: skip
def test_a_wrong_shape_is_a_problem_with_a_line(text, line, says):
    contract = parse(text, Path("a.yaml"))
    ((found, message),) = contract.problems
    assert found == line and says in message


@pytest.mark.parametrize(("status", "rung"), [
    (None, "PROPOSED"), ("PENDING", "PROPOSED"), ("draft", "PROPOSED"),
    ("PARTIAL_ALGORITHM_LEVEL", "PARTIAL_ALGORITHM_LEVEL"),
    ("ALGORITHM_LEVEL_DISCHARGED", "PARTIAL_ALGORITHM_LEVEL"),
    ("PARTIALLY_DISCHARGED", "PARTIAL_ALGORITHM_LEVEL"),
    ("VERIFIED — loss", "PARTIAL_ALGORITHM_LEVEL"), ("FUNCTIONAL", "FUNCTIONAL"),
    ("LIVE-DISCHARGED on a host", "DISCHARGED"), ("DISCHARGED", "DISCHARGED"),
    ("BLOCKER-UPSTREAM-MISSING", "BLOCKER_FIXTURE_ABSENT"), ("GREAT", None), ("", None),
])  # fmt: skip
def test_words_of_the_field_name_a_rung(status, rung):
    assert rung_of(status) == rung


def test_rungs_rise():
    order = ["FALSIFIED", "PROPOSED", "PARTIAL_ALGORITHM_LEVEL", "FUNCTIONAL", "DISCHARGED"]
    assert sorted(order, key=height) == order
    assert set(order) | {"BLOCKER_FIXTURE_ABSENT"} == set(LADDER)
