"""The files that a run leaves, what GitHub is told, and runs against an earlier one."""

from __future__ import annotations

import json


def test_a_run_leaves_three_files_and_can_be_held_against_them(faulty, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    first = faulty("--aprt-report=out")
    assert first.ret == 1
    kept = faulty.path / "out"
    assert {p.name for p in kept.iterdir()} == {"report.json", "report.md", "report.html"}
    assert "A bug, first seen in layer 1 at ffn_silu" in (kept / "report.html").read_text()
    assert "::error" not in first.stdout.str()

    summary = faulty.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    again = faulty("--aprt-baseline=out/report.json")
    assert again.ret == 0
    again.stdout.fnmatch_lines(
        ["nothing is worse than the baseline; 1 known", "::notice title=forward-pass parity::*"]
    )
    assert "failed" not in again.parseoutcomes()
    assert "- known: 1 (L01-ffn_silu)" in summary.read_text()


def test_a_baseline_of_another_prompt_is_one_line_and_exit_4(faulty):
    faulty("--aprt-report=out")
    report = json.loads((faulty.path / "out" / "report.json").read_text())
    report["run"]["prompts"][0]["tokens"] = [1]
    (faulty.path / "other.json").write_text(json.dumps(report))
    result = faulty("--aprt-baseline=other.json")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--aprt-baseline=other.json is of another prompt: expected *"])


def test_a_baseline_that_is_none_stops_before_the_models_run(faulty):
    (faulty.path / "none.json").write_text("{}")
    result = faulty("--aprt-baseline=none.json")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*none.json is no aprt-report-v1 report: its schema is None*"])
    assert faulty.runs() == 0


CONTRACT = """
metadata: {version: 1.0.0, kind: pattern, references: [a]}
falsification_tests:
  - {id: FALSIFY-C-001, rule: near, prediction: p, if_fails: f,
     check: {kind: stage_cosine, at_least: 0.9999}}
"""


def test_github_is_told_of_contracts_too(faulty, monkeypatch):
    (faulty.path / "contracts").mkdir()
    (faulty.path / "contracts" / "c.yaml").write_text(CONTRACT)
    summary = faulty.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    result = faulty()
    result.stdout.fnmatch_lines(["::error title=FALSIFY-C-001::falsified: near; lowest total *"])
    assert summary.read_text().count("# Forward-pass parity") == 1
    assert "FALSIFY-C-001 | falsified" in summary.read_text()


def test_a_summary_that_cannot_be_written_stops_before_the_models_run(faulty, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(faulty.path / "nowhere" / "summary.md"))
    result = faulty()
    assert result.ret == 4 and faulty.runs() == 0
    result.stderr.fnmatch_lines(["*cannot write GITHUB_STEP_SUMMARY=*: No such file or directory*"])
