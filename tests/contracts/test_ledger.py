"""The ledger: nothing is lost, and no status is supported by less than its row says."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
from contract_bench import CONTRACTS, NO_SHELL, ROOT

from pytest_aprt.commands.main import main
from pytest_aprt.contracts.bindings import bind
from pytest_aprt.contracts.contract import parse, text_hash
from pytest_aprt.errors import ContractError
from pytest_aprt.ledger.levels import LEVELS, supported
from pytest_aprt.ledger.record import (
    SCHEMA,
    Record,
    append,
    git_revision,
    host_fingerprint,
    read,
)
from pytest_aprt.ledger.summary import claim_hash, contracts_by_name, summarise

TINY = {"source": "tiny.gguf", "sha256": "t1", "parameters": 1_000_000}
BIG = {"source": "models/big-q4_k_m.gguf", "sha256": "b1", "parameters": 7_000_000_000}
CURRENT = {"version": "1.0.0", "claim": "claim", "check": "check"}
COMMITTED = ROOT / "evidence" / "contracts" / "ledger.jsonl"


def record(**changes):
    return Record(**{
        "run": "r", "time_utc": "2026-11-24T00:00:00+00:00", "contract": "contracts/a.yaml",
        "id": "FALSIFY-A-001", **CURRENT, "declared": "PROPOSED", "outcome": "passed",
        "detail": "measured", "by": "check", "byte_equal": False, "host": "h1",
        "verdict": None if changes.get("model") is None else "PARITY", **changes,
    })  # fmt: skip


def status(*records, models=()):
    return supported(records, **CURRENT, models=models).status


PARTIAL = "PARTIAL_ALGORITHM_LEVEL"
CASES = [
    ("nothing", [], (), "PROPOSED"),
    ("synthetic", [record()], (), PARTIAL),
    ("tiny", [record(model=TINY)], (), PARTIAL),
    ("tiny on two hosts", [record(model=TINY), record(model=TINY, host="h2")], (), PARTIAL),
    ("tiny and byte-equal", [record(model=TINY, byte_equal=True)], (), PARTIAL),
    ("real", [record(model=BIG)], (), "FUNCTIONAL"),
    ("real, often", [record(model=BIG)] * 50, (), "FUNCTIONAL"),
    ("real on two hosts", [record(model=BIG), record(model=BIG, host="h2")], (), "DISCHARGED"),
    ("real and byte-equal", [record(model=BIG, byte_equal=True)], (), "DISCHARGED"),
    ("two real models, a host each",
     [record(model=BIG), record(model={**BIG, "source": "c", "sha256": "c"}, host="h2")], (),
     "FUNCTIONAL"),
    ("named", [record(model=TINY)], ("tiny.gguf",), "FUNCTIONAL"),
    ("named by pattern", [record(model=BIG)], ("big-*.gguf",), "FUNCTIONAL"),
    ("named by hash", [record(model=TINY)], ("t1",), "FUNCTIONAL"),
    ("another than the named", [record(model=BIG)], ("other.gguf",), PARTIAL),
    ("failed", [record(outcome="failed")], (), "FALSIFIED"),
    ("failed after passing", [record(), record(outcome="failed")], (), "FALSIFIED"),
    ("passed after failing", [record(outcome="failed"), record()], (), PARTIAL),
    ("passed on another subject after failing",
     [record(model=BIG, outcome="failed"), record(model=TINY), record()], (), "FALSIFIED"),
    ("blocked", [record(outcome="blocked")], (), "BLOCKER_FIXTURE_ABSENT"),
    ("blocked after passing", [record(), record(outcome="blocked")], (), PARTIAL),
    ("blocked after failing", [record(outcome="failed"), record(outcome="blocked")], (),
     "FALSIFIED"),
    ("unbound", [record(outcome="unbound", check="")], (), "PROPOSED"),
    ("error", [record(outcome="error")], (), "PROPOSED"),
    ("inconclusive run", [record(model=BIG, verdict="INCONCLUSIVE")], (), "PROPOSED"),
]  # fmt: skip


@pytest.mark.parametrize(("records", "models", "expected"), [c[1:] for c in CASES],
                         ids=[c[0] for c in CASES])  # fmt: skip
def test_what_counts_as_which_status(records, models, expected):
    found = supported(records, **CURRENT, models=models)
    assert found.status == expected
    assert found.why


def test_every_level_has_a_reason_of_its_own():
    assert len({level.why for level in LEVELS}) == len(LEVELS)


@pytest.mark.parametrize(("changes", "why"), [
    ({"version": "0.9.0"}, "the contract went from 0.9.0 to 1.0.0"),
    ({"claim": "other"}, "rule or prediction changed, and the version did not"),
    ({"check": "other"}, "the check changed"),
])  # fmt: skip
@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_evidence_expires_and_the_ledger_says_why(changes, why, outcome):
    found = supported([record(outcome=outcome, **changes)], **CURRENT, models=())
    assert (found.status, found.expired) == ("PROPOSED", (why,))


def test_evidence_expires_with_its_model():
    newer = record(model={**BIG, "sha256": "b2"}, outcome="blocked")
    found = supported([record(model=BIG), newer], **CURRENT, models=())
    assert found.status == "BLOCKER_FIXTURE_ABSENT"
    assert found.expired == ("the model models/big-q4_k_m.gguf changed",)


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    records = [
        record(model=TINY, values={"x": [1.5, "nan"]}),
        record(detail="a\nb \u2028 \U0001f600"),
    ]
    append(path, records[:1])
    append(path, records[1:])
    assert read(path) == (records, [])
    assert len(path.read_bytes().splitlines()) == 2


def test_a_killed_writer_costs_its_own_record_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(path, [record(id="A"), record(id="B")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    found, problems = read(path)
    assert [r.id for r in found] == ["A"]
    assert [(p.line, p.text) for p in problems] == [(2, "was cut off while it was written")]
    append(path, [record(id="C")])
    found, problems = read(path)
    assert [r.id for r in found] == ["A", "C"]
    assert [p.line for p in problems] == [2] and "no JSON object" in problems[0].text
    assert path.read_bytes().startswith(whole[:-30])


@pytest.mark.parametrize(("line", "says"), [
    ('{"schema": "aprt-ledger-v2", "id": "A"}', "schema 'aprt-ledger-v2', which this version"),
    ("[1]", "no JSON object"), ("\udcff", "no JSON object"),
    (json.dumps({"schema": SCHEMA}), "has no valid contract"),
    (json.dumps({**dataclasses.asdict(record()), "model": 3}), "has no valid model"),
])  # fmt: skip
def test_lines_that_do_not_count_are_told_and_kept(line, says, tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(path, [record(id="A")])
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    append(path, [record(id="B")])
    found, ((problem),) = read(path)
    assert [r.id for r in found] == ["A", "B"]
    assert problem.line == 2 and says in problem.text
    assert line.encode("utf-8", "surrogateescape") in path.read_bytes()


def test_fields_of_later_writers_are_no_matter(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({**dataclasses.asdict(record()), "more": 1}) + "\n")
    assert read(path) == ([record()], [])


def _write(path, name):
    for number in range(50):
        append(path, [record(id=f"{name}-{number}-{i}", detail="x" * 5000) for i in range(3)])


def test_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    found, problems = read(path)
    assert problems == [] and {w.exitcode for w in writers} == {0}
    assert sorted(r.id for r in found) == sorted(
        f"{name}-{number}-{i}" for name in "abc" for number in range(50) for i in range(3)
    )


def test_a_ledger_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ContractError, match="cannot be written"):
        append(tmp_path / "file" / "ledger.jsonl", [record()])


def test_the_host_is_a_hash_and_the_revision_is_gits(tmp_path):
    import platform

    fingerprint = host_fingerprint()
    assert fingerprint == host_fingerprint() and len(fingerprint) == 12
    assert platform.node() not in fingerprint
    assert git_revision(tmp_path) is None


CONTRACT = """
metadata: {version: 1.0.0, kind: pattern, references: [a]}
falsification_tests:
  - {id: FALSIFY-A-001, rule: r, prediction: p, if_fails: f, check: {kind: header_format}STATUS}
  - {id: FALSIFY-A-002, rule: r, prediction: p, if_fails: f}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a contract; returns what writes its status and the ledger's records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contracts").mkdir()
    path = tmp_path / "contracts" / "a.yaml"

    def write(status, *outcomes):
        path.write_text(CONTRACT.replace("STATUS", f", status: {status}" if status else ""))
        falsifier = parse(path.read_text(), path).falsifiers[0]
        bound = bind(falsifier, NO_SHELL)
        hashes = {"claim": claim_hash(falsifier), "check": text_hash(bound.by, bound.source)}
        (tmp_path / "l.jsonl").unlink(missing_ok=True)
        append(Path("l.jsonl"), [record(**{**hashes, **o}) for o in outcomes])

    return write


def shown(capsys, *args):
    code = main(["ledger", "l.jsonl", *args])
    return code, capsys.readouterr().out


def test_deleting_evidence_lowers_the_status(project, capsys):
    project(PARTIAL, {}, {"outcome": "unbound", "id": "FALSIFY-A-002"})
    code, text = shown(capsys)
    assert code == 0 and "tally 0+1 of 2 falsifiers" in text
    Path("l.jsonl").write_text(Path("l.jsonl").read_text().splitlines()[1] + "\n")
    code, text = shown(capsys)
    assert code == 1 and "overstated: FALSIFY-A-001" in text and "tally 0+0" in text


@pytest.mark.parametrize(("declared", "flagged"), [
    (None, False), ("PROPOSED", False), (PARTIAL, False), ("FUNCTIONAL", True),
    ("DISCHARGED", True),
])  # fmt: skip
def test_a_status_edited_up_is_flagged(declared, flagged, project, capsys):
    project(declared, {})
    code, text = shown(capsys)
    assert code == int(flagged) and ("OVERSTATED  FALSIFY-A-001" in text) is flagged


def test_a_falsified_claim_is_told_first_and_fails(project, capsys):
    project(None, {"outcome": "failed", "detail": "it broke"}, {"id": "FALSIFY-A-002"})
    code, text = shown(capsys)
    assert code == 1
    rows = text.splitlines()
    assert "falsified: FALSIFY-A-001" in rows
    first = rows.index("FALSIFIED  FALSIFY-A-001  contracts/a.yaml")
    assert rows[first + 1].startswith("  declared nothing, supported FALSIFIED (1 run, last 20")
    assert rows[first + 2] == "  falsified: it broke" and first < text.index("FALSIFY-A-002")
    assert max(map(len, rows)) <= 80


def test_stale_and_blocked_are_told(project, capsys):
    project(None, {"check": "older"}, {"outcome": "blocked", "id": "FALSIFY-A-002", "check": ""},
            {"id": "FALSIFY-OLD-001"})  # fmt: skip
    code, text = shown(capsys, "--json")
    rows = {row["id"]: row for row in json.loads(text)["falsifiers"]}
    assert rows["FALSIFY-A-001"]["stale"] and rows["FALSIFY-A-001"]["expired"] == [
        "the check changed"
    ]
    assert rows["FALSIFY-OLD-001"]["why"] == "it is in no contract any more"
    assert json.loads(text)["counts"]["PROPOSED"] == 2 and code == 0


def test_changes_are_sets_of_ids(project, capsys):
    old, new = "2026-11-01T00:00:00+00:00", "2026-11-20T00:00:00+00:00"
    unbound = parse(CONTRACT.replace("STATUS", ""), Path("a.yaml")).falsifiers[1]
    other = {"id": "FALSIFY-A-002", "check": "", "claim": claim_hash(unbound), "time_utc": new}
    project(None, {"time_utc": old}, {"time_utc": new, "outcome": "failed"}, other)
    _, text = shown(capsys, "--since", "2026-11-10", "--json")
    assert json.loads(text)["changes"] == {
        "raised": [f"contracts/a.yaml::FALSIFY-A-002: PROPOSED -> {PARTIAL}"],
        "lowered": [f"contracts/a.yaml::FALSIFY-A-001: {PARTIAL} -> FALSIFIED"],
        "new": [],
    }
    Path("base.jsonl").write_text(Path("l.jsonl").read_text())
    _, text = shown(capsys, "--since", "base.jsonl")
    assert "since base.jsonl: no change" in text


@pytest.mark.parametrize(("args", "text", "says"), [
    ((), "", "no record that counts"),
    ((), "{broken\n", "no record that counts"),
    (("--contracts", "nowhere"), None, "no such folder"),
    (("--since", "yesterday"), None, "--since=yesterday is not valid"),
])  # fmt: skip
def test_what_cannot_be_summarised_is_refused(args, text, says, project, capsys):
    project(None, {})
    if text is not None:
        Path("l.jsonl").write_text(text)
    assert main(["ledger", "l.jsonl", *args]) == 2
    assert says in capsys.readouterr().err


def test_markdown_changes_by_the_rows_that_change(project, capsys):
    project(None, {})
    _, before = shown(capsys, "--markdown")
    project(None, {}, {"outcome": "failed", "detail": "a | b <c>"})
    _, after = shown(capsys, "--markdown")
    old, new = before.splitlines(), after.splitlines()
    table = [line for line in set(new) - set(old) if line.startswith("|")]
    assert len(table) == 1 and "a \\| b &lt;c>" in table[0]


def test_the_committed_ledger_supports_what_our_contracts_declare():
    """Each claim, its check and its version are those of the committed runs."""
    records, problems = read(COMMITTED)
    assert problems == []
    summary = summarise(contracts_by_name(ROOT, [ROOT / "contracts"]), records)
    assert summary.flagged == []
    assert [row.name for row in summary.rows if row.stale] == []
    count = sum(len(contract.falsifiers) for contract in CONTRACTS.values())
    assert summary.tally == (0, count) and len(summary.rows) == count
    assert {row.declared for row in summary.rows} == {PARTIAL}


def test_the_committed_page_is_that_of_the_committed_ledger():
    from pytest_aprt.ledger.render import markdown

    summary = summarise(contracts_by_name(ROOT, [ROOT / "contracts"]), read(COMMITTED)[0])
    assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == markdown(summary)
