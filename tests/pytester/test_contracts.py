"""Contracts as pytest collects, selects and runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from short_summary import summary

PLUGINS = ("anyio", "html", "hypothesispytest", "metadata", "pytest_cov", "randomly", "timeout")
CONTRACT = """\
metadata: {version: 1.0.0, kind: pattern, references: [a]}
falsification_tests:
  - id: FALSIFY-B-002
    rule: "files are as the format says"
    prediction: "12 + 4n bytes"
    if_fails: "nobody can read them"
    check: {kind: header_format}
  - id: FALSIFY-B-001
    rule: "stages are near the oracle"
    prediction: "cosine 0.9999"
    if_fails: "somebody must look at it"
    check: {kind: stage_cosine, at_least: 0.9999}
  - id: FALSIFY-B-003
    rule: "the shell says so"
    prediction: "it ends with 0"
    test: "echo ran > ran.txt"
  - id: FALSIFY-B-004
    rule: "Python says so"
    prediction: "nothing is asserted"
  - id: FALSIFY-B-005
    rule: "nobody says so"
    prediction: "none"
"""


@pytest.fixture
def project(pytester):
    """A project with a contract, a Python test, and YAML of other kinds."""
    pytester.makeini("[pytest]\naprt_contracts = claims\nfilterwarnings = error\n")
    (pytester.path / "claims").mkdir()
    (pytester.path / "claims" / "b-v1.yaml").write_text(CONTRACT)
    (pytester.path / "claims" / "binding.yaml").write_text("bindings: []\n")
    (pytester.path / "other").mkdir()
    (pytester.path / "other" / "c-v1.yaml").write_text(CONTRACT)
    pytester.makepyfile(test_own="def test_own(): pass")
    return pytester


def run(pytester, *args):
    return pytester.runpytest_inprocess("-p", "no:randomly", *args)


def ids(result):
    return [line for line in result.outlines if "::" in line]


def test_falsifiers_are_items_in_the_order_of_the_file(project):
    result = run(project, "--collect-only", "-q")
    assert ids(result) == [
        *(f"claims/b-v1.yaml::FALSIFY-B-00{n}" for n in (2, 1, 3, 4, 5)),
        "test_own.py::test_own",
    ]


def test_the_rule_is_the_items_description(project):
    result = run(project, "--collect-only", "-v")
    result.stdout.fnmatch_lines(["*FALSIFY-B-002>", "*files are as the format says"])


def test_without_a_model_what_needs_one_is_blocked_and_said_so(project):
    result = run(project, "-rs", "--strict-markers")
    result.assert_outcomes(passed=2, skipped=4)
    result.stdout.fnmatch_lines([
        "*BLOCKER_FIXTURE_ABSENT: no model under test: give --aprt-model and --aprt-oracle",
        "*UNBOUND: its test is a shell line or prose, which only --aprt-run-shell runs",
        "*UNBOUND: no check, no test and no binding in Python",
    ])  # fmt: skip
    assert not (project.path / "ran.txt").exists()


def test_nothing_is_collected_where_nobody_opted_in(project):
    project.makeini("[pytest]\n")
    assert ids(run(project, "--collect-only", "-q")) == ["test_own.py::test_own"]


def test_the_option_names_folders_and_runs_them_alone(project):
    result = run(project, "--collect-only", "-q", "--aprt-contracts=other")
    assert len(ids(result)) == 5 and all(i.startswith("other/c-v1.yaml::") for i in ids(result))
    both = run(project, "--collect-only", "-q", "--aprt-contracts=other", "--aprt-contracts=claims")
    assert len(ids(both)) == 10


@pytest.mark.parametrize(("args", "chosen"), [
    (("claims/b-v1.yaml::FALSIFY-B-002",), ["FALSIFY-B-002"]),
    (("-k", "B-002 or own"), ["FALSIFY-B-002", "test_own"]),
    (("claims", "--deselect", "claims/b-v1.yaml::FALSIFY-B-002", "-k", "not 5"),
     ["FALSIFY-B-001", "FALSIFY-B-003", "FALSIFY-B-004"]),
])  # fmt: skip
def test_falsifiers_are_selected_as_tests_are(project, args, chosen):
    result = run(project, "--collect-only", "-q", *args)
    assert [i.rpartition("::")[2] for i in ids(result)] == chosen


def test_shell_lines_run_by_the_flag_alone_and_within_their_limit(project):
    result = run(project, "--aprt-run-shell", "-k", "B-003")
    result.assert_outcomes(passed=1, deselected=5)
    assert (project.path / "ran.txt").read_text() == "ran\n"
    path = project.path / "claims" / "b-v1.yaml"
    path.write_text(
        CONTRACT.replace("echo ran > ran.txt", "(sleep 60; echo late > late.txt) & wait")
    )
    result = run(project, "--aprt-run-shell", "--aprt-shell-timeout=0.5", "-k", "B-003", "-rs")
    result.assert_outcomes(skipped=1, deselected=5)
    result.stdout.fnmatch_lines(["*BLOCKER_FIXTURE_ABSENT: stopped after 0.5 s"])
    path.write_text(CONTRACT.replace("echo ran > ran.txt", "echo no such thing; exit 3"))
    result = run(project, "--aprt-run-shell", "-k", "B-003")
    result.assert_outcomes(failed=1, deselected=5)
    result.stdout.fnmatch_lines(["FALSIFY-B-003: falsified: exit 3: no such thing"])
    path.write_text(CONTRACT.replace("echo ran > ran.txt", "no-such-command-at-all --x"))
    run(project, "--aprt-run-shell", "-k", "B-003").assert_outcomes(skipped=1, deselected=5)


BINDING = """
import pytest, pytest_aprt

@pytest_aprt.falsifier("FALSIFY-B-004")
def says_python(falsifier, tmp_path):
    assert falsifier.id == "FALSIFY-B-004" and tmp_path.is_dir()
    {body}
"""


@pytest.mark.parametrize(("body", "outcome", "says"), [
    ("return {'count': 3}", "passed", None),
    ("assert 1 > 2, 'one is less than two'", "failed",
     "FALSIFY-B-004: falsified: one is less than two*"),
    ("pytest.skip('no card here')", "skipped", "*BLOCKER_FIXTURE_ABSENT: no card here*"),
    ("return 1 / 0", "failed", "FALSIFY-B-004: could not be evaluated: ZeroDivisionError: *"),
    ("return 3", "failed", "FALSIFY-B-004: could not be evaluated: TypeError: *dict or None*"),
])  # fmt: skip
def test_python_binds_a_falsifier(project, body, outcome, says):
    project.makeconftest(BINDING.format(body=body))
    result = run(project, "-k", "B-004", "-rs")
    result.assert_outcomes(**{outcome: 1}, deselected=5)
    if says:
        result.stdout.fnmatch_lines([says])


def test_a_binding_with_a_wrong_argument_says_which_there_are(project):
    project.makeconftest("import pytest_aprt\n@pytest_aprt.falsifier('A')\ndef f(model): pass\n")
    result = run(project)
    text = result.stderr.str() + result.stdout.str()
    assert "takes 'model': expected some of aprt_run, aprt_model" in text


BINDINGS = """
import pytest_aprt

@pytest_aprt.falsifier("FALSIFY-B-004")
def holds():
    return {"share": 0.5}
"""


@pytest.mark.parametrize(("body", "ret", "says"), [
    (BINDINGS, 0, "1 passed, 5 deselected*"),
    ("import nowhere_at_all", 4, "*entry point claims of pytest_aprt.falsifiers cannot be loaded: "
     "No module named 'nowhere_at_all'"),
])  # fmt: skip
def test_an_installed_package_binds_by_its_entry_point(project, monkeypatch, body, ret, says):
    installed = project.mkdir("installed")
    (installed / "bound_here.py").write_text(body)
    info = installed / "bound_here-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bound-here\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pytest_aprt.falsifiers]\nclaims = bound_here\n")
    monkeypatch.setenv("PYTHONPATH", str(installed), prepend=os.pathsep)
    result = project.runpytest_subprocess("-q", "-p", "no:randomly", "-k", "B-004")
    assert result.ret == ret
    (result.stderr if ret == 4 else result.stdout).fnmatch_lines([says])


def test_a_failure_tells_the_claim_the_measurement_and_the_place(faulty):
    (faulty.path / "contracts").mkdir()
    (faulty.path / "contracts" / "b-v1.yaml").write_text(CONTRACT)
    result = faulty("-k", "FALSIFY-B", "-rf")
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"], outcomes["skipped"]) == (1, 1, 3)
    result.stdout.fnmatch_lines([
        "FALSIFY-B-001: falsified: lowest total cosine is 0.* at L02-attn_scores (prompt 0), "
        "expected at least 0.9999; * values break the bound",
        "rule              stages are near the oracle",
        "prediction        cosine 0.9999",
        "measured          lowest total cosine is *",
        "if it fails       somebody must look at it",
        "first divergence  L01-ffn_silu (L01-ffn_gate was good)",
        "where             contracts/b-v1.yaml:8",
        summary("contracts/b-v1.yaml::FALSIFY-B-001", "FALSIFY-B-001: falsified: *"),
    ])  # fmt: skip
    assert faulty.runs() == 1


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_with_a_model_and_no_paths_the_run_is_the_suite_and_the_contracts(healthy, workers):
    (healthy.path / "contracts").mkdir()
    (healthy.path / "contracts" / "b-v1.yaml").write_text(CONTRACT)
    healthy.pytester.makepyfile(test_own="def test_own(): pass")
    listed = ids(healthy("--collect-only", "-q"))
    assert sum(i.startswith("contracts/b-v1.yaml::") for i in listed) == 5
    assert "aprt::gate" in listed and "test_own.py::test_own" not in listed
    outcomes = healthy(*workers).parseoutcomes()
    assert sum(outcomes.values()) == len(listed)


@pytest.mark.parametrize("ledger", [(), ("--aprt-ledger=l.jsonl",)], ids=["no ledger", "ledger"])
def test_what_was_not_selected_is_accused_of_nothing(healthy, ledger):
    """A ledger may know of it; without one nothing does."""
    (healthy.path / "contracts").mkdir()
    own = Path(__file__).parents[2] / "contracts" / "stage-parity-q4k-v1.yaml"
    (healthy.path / "contracts" / own.name).write_bytes(own.read_bytes())
    result = healthy("-k", "FALSIFY-Q4K-PARITY-002", *ledger)
    assert result.ret == 0
    count = 5 if ledger else 1
    result.stdout.fnmatch_lines(["1 passed", f"tally 0+1 of {count} falsifiers: *"])
    assert ("overstated" in result.stdout.str()) == bool(ledger)


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_outcomes_are_kept_in_ledger_and_report(faulty, workers):
    (faulty.path / "contracts").mkdir()
    (faulty.path / "contracts" / "b-v1.yaml").write_text(CONTRACT)
    for _ in range(2):
        faulty("-k", "FALSIFY", "--aprt-ledger=kept/l.jsonl", "--aprt-report=r", *workers)
    records = [
        json.loads(line) for line in (faulty.path / "kept" / "l.jsonl").read_text().splitlines()
    ]
    assert len(records) == 10 and len({r["run"] for r in records}) == 2
    by_id = {r["id"]: r for r in records}
    assert {i: r["outcome"] for i, r in by_id.items()} == {
        "FALSIFY-B-002": "passed", "FALSIFY-B-001": "failed", "FALSIFY-B-003": "unbound",
        "FALSIFY-B-004": "unbound", "FALSIFY-B-005": "unbound",
    }  # fmt: skip
    failed = by_id["FALSIFY-B-001"]
    assert failed["contract"] == "contracts/b-v1.yaml" and failed["version"] == "1.0.0"
    assert failed["verdict"] == "DIVERGED" and failed["model"]["parameters"] > 10_000
    assert failed["values"]["point"] == "L02-attn_scores" and failed["values"]["broken"] == 20
    assert by_id["FALSIFY-B-002"]["model"] is None
    report = json.loads((faulty.path / "r" / "report.json").read_text())
    rows = {row["id"]: row for row in report["contracts"]}
    assert rows["FALSIFY-B-001"]["supported"] == "FALSIFIED"
    assert rows["FALSIFY-B-002"]["supported"] == "PARTIAL_ALGORITHM_LEVEL"
    assert rows["FALSIFY-B-003"] == {
        "contract": "contracts/b-v1.yaml", "id": "FALSIFY-B-003", "rule": "the shell says so",
        "declared": None, "outcome": "unbound", "supported": "PROPOSED",
        "detail": "its test is a shell line or prose, which only --aprt-run-shell runs",
    }  # fmt: skip
    for page in ("report.md", "report.html"):
        assert "FALSIFY-B-001" in (faulty.path / "r" / page).read_text()


def test_a_ledger_without_a_model(project):
    result = run(project, "--aprt-ledger=l.jsonl")
    result.stdout.fnmatch_lines([
        "*= contracts =*", "1 passed, 1 blocked, 3 unbound",
        "tally 0+1 of 5 falsifiers: 0 discharged, 1 partial (0 of them functional); 1 blocked, *",
    ])  # fmt: skip
    records = [json.loads(line) for line in (project.path / "l.jsonl").read_text().splitlines()]
    assert [r["outcome"] for r in records] == ["passed", "blocked", *["unbound"] * 3]


def test_a_run_of_some_leaves_the_others_what_the_ledger_has_of_them(project):
    (project.path / "claims" / "d-v1.yaml").write_text(CONTRACT.replace("-B-", "-D-"))
    run(project, "--aprt-ledger=l.jsonl")
    whole = "tally 0+2 of 10 falsifiers: 0 discharged, 2 partial (0 of them functional); 2 *"
    result = run(project, "--aprt-ledger=l.jsonl", "-k", "FALSIFY-B-005")
    result.stdout.fnmatch_lines(["1 unbound", whole])
    other = run(project, "--aprt-ledger=l.jsonl", "--aprt-contracts=other", "-k", "FALSIFY-B-002")
    other.stdout.fnmatch_lines(["1 passed", "tally 0+1 of 5 falsifiers: *"])


def test_a_killed_run_has_recorded_what_it_evaluated(project):
    (project.path / "conftest.py").write_text(
        "import os, pytest_aprt\n@pytest_aprt.falsifier('FALSIFY-B-004')\ndef dies(): os._exit(9)\n"
    )
    result = project.runpytest_subprocess("-p", "no:randomly", "--aprt-ledger=l.jsonl")
    assert result.ret == 9
    records = [json.loads(line) for line in (project.path / "l.jsonl").read_text().splitlines()]
    assert [(r["id"][-3:], r["outcome"]) for r in records] == [
        ("002", "passed"), ("001", "blocked"), ("003", "unbound"),
    ]  # fmt: skip


def test_a_run_tells_which_lines_of_its_ledger_do_not_count(project):
    ledger = project.path / "l.jsonl"
    ledger.write_text('{"schema": "aprt-ledger-v9"}\n{"schema": "aprt-led')
    result = run(project, "--aprt-ledger=l.jsonl")
    result.stdout.fnmatch_lines([
        "line 1 has schema 'aprt-ledger-v9', which this version does not know; it is kept",
        "line 2 is no JSON object: *",
    ])  # fmt: skip
    assert ledger.read_text().startswith('{"schema": "aprt-ledger-v9"}\n{"schema": "aprt-led\n')


def test_a_ledger_that_cannot_be_written_ends_the_run_with_4(project):
    assert run(project, "--aprt-ledger=claims").ret == 4
    (project.path / "file").write_text("")
    result = run(project, "--aprt-ledger=file/l.jsonl")
    assert result.ret == 4
    result.stdout.fnmatch_lines(["ERROR: *file/l.jsonl: cannot be written: *"])


def test_ids_of_the_suite_and_of_contracts_stand_side_by_side(healthy):
    (healthy.path / "contracts").mkdir()
    (healthy.path / "contracts" / "b-v1.yaml").write_text(CONTRACT)
    healthy("aprt::gate", "contracts/b-v1.yaml::FALSIFY-B-001").assert_outcomes(passed=2)
    healthy("-n2", "aprt::gate", "contracts/b-v1.yaml::FALSIFY-B-001").assert_outcomes(passed=2)


@pytest.mark.parametrize(("name", "text", "says"), [
    ("a.yaml", "metadata: {}\nmetadata: {}\n", "a.yaml:2: duplicate key 'metadata'"),
    ("a.yaml", CONTRACT.replace("B-001", "B-002"), "a.yaml:8: falsifier id 'FALSIFY-B-002'"),
    ("a.yaml", CONTRACT.replace("header_format", "headers"), "a.yaml:7: FALSIFY-B-002: check kind"),
    ("a.yaml", "metadata: {}\nfalsification_tests: 3\n", "a.yaml:2: falsification_tests: expected"),
    ("a.yaml", "bindings: []\n", "no contract there"),
    ("a.txt", "", "no contract there"),
    (None, None, "no such folder"),
])  # fmt: skip
@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_a_bad_contract_ends_the_run_with_one_line(pytester, name, text, says, workers):
    if name:
        (pytester.path / "claims").mkdir()
        (pytester.path / "claims" / name).write_text(text)
    result = pytester.runpytest_inprocess("--aprt-contracts=claims", *workers)
    assert result.ret == 4
    lines = [line for line in result.errlines if line.strip()]
    assert len(lines) == 1 and says in lines[0] and "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan"])
def test_a_wrong_limit_for_shell_lines_is_refused(project, value):
    result = run(project, f"--aprt-shell-timeout={value}")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--aprt-shell-timeout=*is not valid: expected seconds*"])


def test_workers_give_the_same_outcomes(project):
    result = run(project, "-n2")
    result.assert_outcomes(passed=2, skipped=4)


def test_listing_contracts_imports_no_numpy(project):
    """Collected by a run that could not import numpy if it tried."""
    project.makepyfile(no_numpy="import sys\nsys.modules['numpy'] = sys.modules['torch'] = None\n")
    plugins = [f"-pno:{name}" for name in PLUGINS]
    result = project.runpytest_subprocess("-pno_numpy", *plugins, "--collect-only", "-q", "claims")
    assert len(ids(result)) == 5, result.stderr.str()


def test_junit_has_outcome_and_measurement(project):
    run(project, "--junitxml=j.xml", "-k", "B-002")
    text = (project.path / "j.xml").read_text()
    assert 'name="outcome" value="passed"' in text and 'name="measured" value="20 files' in text
    assert json.dumps("FALSIFY-B-002") in text
