"""``aprt validate``: every rule broken once, and what is told of files, folders and revisions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pytest_aprt.commands.main import main
from pytest_aprt.contracts.contract import load, parse
from pytest_aprt.contracts.rules import RULES, violations
from pytest_aprt.contracts.validate import as_json, as_text, validate

DATA = Path(__file__).parent / "data"
KERNEL = (DATA / "kernel.yaml").read_text(encoding="utf-8")

REAL = "APRT_REAL_CONTRACTS"
"""Environment variable naming a folder of contracts from the field."""


def test_a_plain_contract_breaks_no_rule():
    assert violations(load(DATA / "kernel.yaml")) == []


def test_odd_files_break_no_rule_of_the_schema():
    found = violations(load(DATA / "odd.yaml"))
    assert {v.rule for v in found} == {"SCHEMA-009"}  # two entries say nothing of failing


BROKEN = [
    # rule, line, what the message says, what is replaced in kernel.yaml, by what
    ("SCHEMA-001", 2, "references is empty", '  references:\n    - "a paper"\n', ""),
    ("SCHEMA-002", 3, "version is empty", '"1.0.0"', '""'),
    ("SCHEMA-003", 2, "no equations (no metadata.kind", "equations:", "equation_s:"),
    ("SCHEMA-004", 17, "equation stable: formula", '"no overflow"\nproof', '""\nproof'),
    ("SCHEMA-005", 19, "property is empty", 'property: "sums to one"\n    formal', "formal"),
    ("SCHEMA-006", 24, "stands in line 19", '"0 <= p <= 1"', '"|Σ p - 1| < ε"'),
    ("SCHEMA-007", 33, "'FALSIFY-SM-001' stands in line 28", "FALSIFY-SM-002", "FALSIFY-SM-001"),
    ("SCHEMA-008", 33, "prediction is empty", 'prediction: "finite for x = 1000"', "p: 1"),
    ("SCHEMA-009", 33, "if_fails is empty", 'if_fails: "the maximum is not subtracted"', "x: 1"),
    ("SCHEMA-010", 44, "kani id 'KANI-SM-001'", "qa_gate:", "  - id: KANI-SM-001\n    "
     "obligation: x\n    bound: 1\nqa_gate:"),
    ("SCHEMA-011", 39, "obligation is empty", "obligation: SM-INV-001", "x: 1"),
    ("SCHEMA-012", 39, "bound is empty", "bound: 8", "x: 1"),
    ("SCHEMA-013", 2, "no qa_gate", "qa_gate:", "gate_of_quality:"),
    ("SCHEMA-014", 19, "requires on an obligation of type invariant", "applies_to: all",
     "requires: x"),
    ("SCHEMA-015", 19, "applies_to_phase", "applies_to: all", "applies_to_phase: x"),
    ("SCHEMA-016", 19, "only on subcontract", "applies_to: all", "parent_contract: other-v1"),
    ("SCHEMA-017", 19, "not in metadata.depends_on", "type: invariant\n    property",
     "type: subcontract\n    parent_contract: third-v1\n    property"),
    ("SCHEMA-018", 44, "kind stands at top level", "qa_gate:", "kind: pattern\nqa_gate:"),
    ("SCHEMA-019", 44, "'kani_harnesses' is meant", "qa_gate:", "kani-harness: []\nqa_gate:"),
    ("SCHEMA-019", 44, "'qa_gate' is meant", "qa_gate:", "qa_gates:"),
    ("SCHEMA-019", 11, "'equations' is meant", "equations:", "Equation:"),
    ("SCHEMA-021", 19, "no na_reason", "applies_to: all", "applies_to: not_applicable"),
    ("SCHEMA-022", 19, "no na_owner", "applies_to: all", "applies_to: not_applicable"),
    ("SCHEMA-023", 19, "na_owner on an obligation that applies", "applies_to: all", "na_owner: x"),
    ("PROVABILITY-001", 2, "no kani_harnesses", "kani_harnesses:", "kani_of_old:"),
    ("PROVABILITY-001", 28, "2 falsification_tests for 3 proof_obligations",
     "falsification_tests:", "  - property: third\nfalsification_tests:"),
    ("CRUX-001", 5, "demand_score 7", 'author: "somebody"', "demand_score: 7"),
    ("APRT-001", 28, "an entry has no id", "- id: FALSIFY-SM-001", "- name: x"),
    ("APRT-001", 44, "qa_gate: expected a mapping", "qa_gate:", "qa_gate: x\nold_gate:"),
    ("APRT-001", 19, "proof_obligations: expected a mapping, found 'sums'",
     "  - type: invariant\n", "  - sums\n  - type: invariant\n"),
    ("APRT-001", 18, "equation loose: expected a mapping", "proof_obligations:",
     "  loose: x = y\nproof_obligations:"),
    ("APRT-001", 5, "metadata.registry: expected true", 'author: "somebody"', "registry: yes"),
    ("APRT-002", 3, "'1.0' is not of the form", '"1.0.0"', '"1.0"'),
    ("APRT-003", 32, "binds_to 'soft' is no equation here; these are: softmax, stable",
     'if_fails: "normalisation is wrong"', "binds_to: soft\n    if_fails: x"),
    ("APRT-004", 28, "status 'GREAT' is no known one", 'rule: "sums to one"\n',
     'rule: "sums to one"\n    status: GREAT\n'),
    ("APRT-005", 28, "status FUNCTIONAL without any evidence", 'rule: "sums to one"\n',
     'rule: "sums to one"\n    status: FUNCTIONAL\n'),
    ("APRT-008", 31, "check kind 'stage_cosin' is unknown: expected one of stage_metric",
     'test: "proptest with random vectors"', "check: {kind: stage_cosin}"),
    ("APRT-008", 31, "setting 'at_lest' is unknown", 'test: "proptest with random vectors"',
     "check: {kind: stage_cosine, at_most: 1, at_lest: 1}"),
    ("APRT-008", 31, "stages: stage 'attn_nrom' is unknown", 'test: "proptest with random vectors"',
     "check: {kind: stage_cosine, stages: attn_nrom, at_least: 1}"),
    ("APRT-008", 31, "expected a bound, at_least or at_most",
     'test: "proptest with random vectors"', "check: {kind: stage_cosine}"),
    ("APRT-008", 31, "setting within is missing", 'test: "proptest with random vectors"',
     "check: {kind: stage_ratio}"),
    ("APRT-009", 31, "test names tests/test_nowhere.py::test_x, which is not there",
     '"proptest with random vectors"', '"tests/test_nowhere.py::test_x"'),
    ("APRT-009", 31, "test names tests/contracts/test_validate.py::test_gone",
     '"proptest with random vectors"', '"pytest tests/contracts/test_validate.py::test_gone"'),
    ("APRT-009", 31, "evidence names evidence/nothing.json, which is not there",
     'rule: "sums to one"\n',
     'rule: "sums to one"\n    status: DISCHARGED\n    evidence: [see evidence/nothing.json]\n'),
    ("APRT-010", 4, "kind 'kernell' is no known one", "created: 2026-01-02", "kind: kernell"),
    ("APRT-010", 5, "CRUX-002 is not checked", 'author: "somebody"', "competitor: vllm"),
    ("APRT-010", 4, "its KAIZEN- rules are not checked", "created: 2026-01-02", "kind: kaizen"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "line", "says", "old", "new"), BROKEN, ids=lambda v: str(v)[:15])
def test_a_broken_rule_is_told_with_its_line(rule, line, says, old, new):
    assert KERNEL.count(old) == 1
    found = violations(parse(KERNEL.replace(old, new), DATA / "kernel.yaml"))
    assert [(v.rule, v.line) for v in found if v.rule == rule and says in v.message] == [
        (rule, line)
    ], [str(v) for v in found]
    severity = next(r.severity for r in RULES if r.id == rule)
    assert f"kernel.yaml:{line}: {severity} {rule}: " in str(next(v for v in found
                                                                  if v.rule == rule))  # fmt: skip


def test_every_rule_is_broken_once_here():
    assert {rule for rule, *_ in BROKEN} == {rule.id for rule in RULES}


def test_a_pattern_need_not_be_provable():
    text = "metadata: {version: 1.0.0, kind: pattern, references: [a]}\n"
    assert violations(parse(text, Path("a.yaml"))) == []
    registry = "metadata: {version: 1.0.0, registry: true, references: [a]}\n"
    assert violations(parse(registry, Path("a.yaml"))) == []


def files(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return [folder]


def test_a_folder_is_judged_whole(tmp_path, capsys):
    paths = files(tmp_path, a=KERNEL, b=KERNEL, binding="bindings: []\n", c="a: 1\na: 2\n")
    (tmp_path / ".x.yaml").write_text("a: [")
    result = validate(paths)
    assert [c.path.name for c in result.contracts] == ["a.yaml", "b.yaml"]
    assert [(v.rule, v.path.name, v.line) for v in result.violations] == [
        ("APRT-006", "b.yaml", 28), ("APRT-006", "b.yaml", 33), ("SCHEMA-020", "c.yaml", 2),
    ]  # fmt: skip
    assert result.exit_code == 1
    text = as_text(result)
    assert f"{tmp_path / 'c.yaml'}:2: error SCHEMA-020: duplicate key 'a', first in line 1" in text
    assert f"{tmp_path / 'binding.yaml'}: not a contract: a binding registry" in text
    assert text.endswith("1 error(s), 2 warning(s)\n")
    parsed = json.loads(as_json(result))
    assert (parsed["schema"], parsed["errors"], parsed["warnings"]) == ("aprt-validate-v1", 1, 2)
    assert [Path(f["path"]).name for f in parsed["files"]] == ["a.yaml", "b.yaml", "c.yaml"]
    assert parsed["files"][0]["falsifiers"] == ["FALSIFY-SM-001", "FALSIFY-SM-002"]


def test_exit_codes_and_output_of_the_command(tmp_path, capsys):
    assert main(["validate", str(DATA / "kernel.yaml")]) == 0
    assert capsys.readouterr().out == "0 error(s), 0 warning(s)\nContract is valid.\n"
    assert main(["validate", str(DATA)]) == 0
    assert capsys.readouterr().out.endswith("0 error(s), 2 warning(s)\n2 contracts are valid.\n")
    assert main(["validate", "--json", str(DATA)]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
    (tmp_path / "bad.yaml").write_text("metadata: {version: 1}\nmetadata: {}\n")
    assert main(["validate", str(tmp_path)]) == 1
    assert "bad.yaml:2: error SCHEMA-020: duplicate key 'metadata'" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "says"), [
    ("nowhere.yaml", "nowhere.yaml: no such file or folder"),
    ("empty", "empty: a folder without YAML files"),
    ("binding.yaml", "no contract there"),
    ("pipe.yaml", "found a named pipe"),
])  # fmt: skip
def test_what_cannot_be_judged_is_declined(name, says, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binding.yaml").write_text("bindings: []\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert main(["validate", str(tmp_path / name)]) == 2
    assert says in capsys.readouterr().out


@pytest.fixture
def repository(tmp_path):
    def git(*args):
        env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        who = ("-c", "user.name=t", "-c", "user.email=t@t.example")
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True,
                       env=env)  # fmt: skip

    git("init", "-q")
    declared = KERNEL.replace('if_fails: "norm', 'status: PROPOSED\n    if_fails: "norm')
    files(tmp_path, a=declared)
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path, declared


RAISED = ("status: PROPOSED", "status: FUNCTIONAL\n    evidence: [a log]")
NEW = ("kani_harnesses:", "  - id: FALSIFY-SM-003\n    rule: r\n    prediction: p\n"
       "    if_fails: f\nkani_harnesses:")  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), [
    ([RAISED], "FALSIFY-SM-001 rose from PROPOSED to FUNCTIONAL since HEAD, and the version is "
     "1.0.0 still"),
    ([NEW], "FALSIFY-SM-003 is new since HEAD"),
    ([RAISED, ('"1.0.0"', '"1.1.0"')], None),
    ([("status: PROPOSED", "status: PENDING")], None),
    ([], None),
])  # fmt: skip
def test_a_promotion_needs_a_new_version(changes, says, repository):
    folder, text = repository
    for old, new in changes:
        text = text.replace(old, new)
    files(folder, a=text, new=KERNEL.replace("-SM-", "-NEW-"))
    result = validate([folder], base="HEAD")
    assert [v.rule for v in result.violations] == ["APRT-007"] * bool(says)
    assert all(says in v.message for v in result.violations)


def test_an_unknown_base_is_bad_input(repository, capsys):
    assert main(["validate", "--base", "nowhere", str(repository[0])]) == 2
    assert "revision nowhere is unknown to git" in capsys.readouterr().err


@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no folder of real contracts")
def test_real_contracts_give_the_counts_that_were_measured_upstream():
    result = validate([Path(os.environ[REAL])])
    assert not result.declined and not result.broken
    by_file: dict[str, list[str]] = {c.path.name: [] for c in result.contracts}
    for v in result.violations:
        if not v.rule.startswith("APRT"):
            by_file[v.path.name].append(v.rule)
    odd = {
        "provable-contracts--layer-parity-v1.yaml":
            ["PROVABILITY-001", "PROVABILITY-001", "SCHEMA-003", "SCHEMA-013"],
        "provable-contracts--tensor-layout-v1.yaml":
            ["PROVABILITY-001", "PROVABILITY-001", "SCHEMA-001", "SCHEMA-003"]
            + ["SCHEMA-009"] * 8 + ["SCHEMA-013"],
    }  # fmt: skip
    assert {name: sorted(rules) for name, rules in by_file.items() if rules} == odd
    assert len(by_file) == 9 and [what for _, what in result.other] == ["a binding registry"]
    assert sum(len(c.falsifiers) for c in result.contracts) == 49
