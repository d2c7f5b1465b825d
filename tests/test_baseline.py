"""A run against an earlier one: only what is worse fails."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from report_cases import point_of, report_of, with_later_rungs

from pytest_aprt.baseline import GROWTH, compare, failures
from pytest_aprt.errors import SettingsError
from pytest_aprt.outcomes import GATE, outcome_of
from pytest_aprt.render import github, html, markdown, terminal
from pytest_aprt.render.words import passes

PATH = Path("earlier.json")


def against(report, baseline):
    report["baseline"] = compare(report, baseline, PATH)
    return report


def without_one_origin(report):
    """The same run, had `attn_out` been sound."""
    point = point_of(report, "L02-attn_out")
    point.update(status="inherited", outcome="xfailed", reason="follows from L02-k_post_rope")
    report["verdict"]["origins"].pop()
    return report


def test_failures_are_the_tests_that_failed():
    assert list(failures(report_of("clean"))) == []
    assert list(failures(report_of("fault"))) == ["L02-k_post_rope", "L02-attn_out"]
    report = report_of("clean")
    report["ladder"]["config"][2]["status"] = report["ladder"]["weights"][1]["status"] = "broken"
    report["self_test"][0]["passed"] = False
    names = list(failures(report))
    assert names == [
        f"selftest-{report['self_test'][0]['name']}",
        f"config-{report['ladder']['config'][2]['name']}",
        f"weights-{report['ladder']['weights'][1]['name']}",
    ]
    assert [outcome_of(report, name).outcome for name in names] == ["failed"] * 3


def test_the_same_faults_are_known_and_pass_the_gate():
    report = against(report_of("fault"), report_of("fault"))
    assert report["baseline"]["known"] == ["L02-k_post_rope", "L02-attn_out"]
    assert report["baseline"]["worse"] == report["baseline"]["better"] == []
    assert outcome_of(report, GATE).outcome == "passed"
    known = outcome_of(report, "L02-attn_out")
    assert known.outcome == "xfailed"
    assert known.reason.startswith("known: the baseline fails likewise; L02-attn_out: local rel_l2")


def test_a_new_fault_fails_and_the_old_one_does_not():
    report = against(report_of("fault"), without_one_origin(report_of("fault")))
    assert report["baseline"]["worse"] == ["L02-attn_out"]
    assert outcome_of(report, "L02-attn_out").outcome == "failed"
    assert outcome_of(report, "L02-k_post_rope").outcome == "xfailed"
    gate = outcome_of(report, GATE)
    assert gate.outcome == "failed"
    assert gate.text.startswith("worse than the baseline: L02-attn_out; DIVERGED: first at L02-k_")


def test_what_is_mended_is_named():
    report = against(without_one_origin(report_of("fault")), report_of("fault"))
    assert report["baseline"]["better"] == ["L02-attn_out"]
    assert outcome_of(report, GATE).outcome == "passed"
    assert against(report_of("clean"), report_of("fault"))["baseline"]["better"] == [
        "L02-k_post_rope", "L02-attn_out",
    ]  # fmt: skip


@pytest.mark.parametrize(("factor", "worse"), [(1.05, []), (GROWTH * 1.05, ["L02-attn_out"])])
def test_an_error_that_grows_is_worse_but_not_by_another_machines_rounding(factor, worse):
    report = report_of("fault")
    point_of(report, "L02-attn_out")["worst_slice"]["rel_l2"] *= factor
    assert against(report, report_of("fault"))["baseline"]["worse"] == worse


def test_no_baseline_lets_an_inconclusive_run_pass():
    report = report_of("fault")
    report["verdict"]["status"] = "INCONCLUSIVE"
    report = against(report, copy.deepcopy(report))
    assert outcome_of(report, GATE).outcome == "failed"
    assert not passes(report)


@pytest.mark.parametrize("what", ["model", "oracle", "prompt"])
def test_a_baseline_of_another_run_is_refused(what):
    earlier = report_of("fault")
    if what == "prompt":
        earlier["run"]["prompts"][0]["tokens"].append(1)
    else:
        earlier[what]["sha256"] = "0" * 64
    with pytest.raises(SettingsError, match=rf"^--aprt-baseline=earlier.json is of another {what}"):
        compare(report_of("fault"), earlier, PATH)


def test_every_rendering_says_what_changed():
    report = against(report_of("fault"), without_one_origin(report_of("fault")))
    lines = [line.text for line in terminal.render(report, None)]
    assert "worse than the baseline: L02-attn_out" in lines
    assert len(lines) <= 25
    assert "- worse: 1 (L02-attn_out)" in markdown.render(report)
    assert "<b>1 worse</b> (L02-attn_out)" in html.render(report)
    known = against(report_of("fault"), report_of("fault"))
    lines = terminal.render(known, None)
    assert "nothing is worse than the baseline; 2 known" in [line.text for line in lines]
    assert lines[0].markup["green"]
    assert github.commands(known)[0].startswith("::notice ")


# GitHub


def test_annotations_tell_the_verdict_then_the_origins():
    report = report_of("fault")
    report["verdict"]["origins"][1]["hint"] = "100%\nsure: a,b"
    lines = github.commands(report)
    assert lines[0].startswith("::error title=forward-pass parity::DIVERGED: first at L02-k_post_")
    assert lines[1].startswith("::error title=L02-k_post_rope::error is born here: local rel_l2 ")
    assert lines[2].endswith("; likely: 100%25%0Asure: a,b")
    assert github.commands(report_of("clean")) == [
        f"::notice title=forward-pass parity::{report_of('clean')['verdict']['summary']}"
    ]
    claims = with_later_rungs(report_of("clean"))
    claims["contracts"].append({**claims["contracts"][0], "id": "X-2", "outcome": "passed",
                                "supported": "PROPOSED"})  # fmt: skip
    _, falsified, overstated = github.commands(claims)
    assert falsified.startswith("::error title=FALSIFY-X-001::falsified: a < b; <script>")
    assert overstated.startswith("::warning title=X-2::overstated: ")
    report["contracts"] = claims["contracts"]
    assert github.commands(report)[-1] == overstated
    report["verdict"]["origins"] *= 30
    assert len(github.commands(report)) == 10
    assert all("\n" not in line for line in github.commands(report))
