"""How the plugin behaves among pytest's options, in a user's own suite.

The faulty project has 141 tests: 2 fail (the fault and the gate), 20 inherit, 24 are skipped, 95
pass. Its engine counts its runs: one, whatever the options.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from short_summary import summary

ALL = {"failed": 2, "passed": 95, "skipped": 24, "xfailed": 20}
FAULT = "aprt::L01-ffn_silu"


def outcomes(result):
    """What a run came to, having made sure that nothing broke inside."""
    text = "\n".join([*result.outlines, *result.errlines])
    assert "INTERNALERROR" not in text
    assert "Traceback" not in text
    found = result.parseoutcomes()
    for word in ("warnings", "warning", "deselected"):
        found.pop(word, None)
    return found


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["-v"],
        ["-q"],
        ["-qq"],
        ["-s"],
        ["--ff"],
        ["--nf"],
        ["-p", "no:cacheprovider"],
        ["-p", "no:xdist"],
        ["-p", "no:skipping", "-p", "no:warnings"],
        ["--tb=no", "--show-capture=no", "-rA"],
        ["--setup-show"],
        ["--import-mode=importlib", "-W", "error"],
        ["--maxfail=5"],
        ["--color=yes"],
        ["--strict-markers", "--strict-config"],
    ],
    ids=" ".join,
)
def test_any_option_gives_the_same_outcomes_from_one_run(faulty, args):
    result = faulty(*args)
    expected = dict(ALL)
    if "no:skipping" in args:  # pytest.xfail then is an exception like any other
        expected = {"failed": 22, "passed": 95, "skipped": 24}
    if "-qq" not in args:  # which prints no counts
        assert outcomes(result) == expected
    assert result.ret == 1
    assert faulty.runs() == 1


@pytest.mark.parametrize("dist", ["load", "loadscope", "loadfile", "loadgroup", "worksteal"])
def test_two_workers_read_what_the_controller_ran(faulty, dist):
    result = faulty("-n2", f"--dist={dist}", "-v", "--aprt-report=out")
    assert outcomes(result) == ALL
    assert result.ret == 1
    assert faulty.runs() == 1
    result.stdout.fnmatch_lines([summary(FAULT, "L01-ffn_silu: local rel_l2 2.5e-01 > *")])
    assert (faulty.path / "out" / "report.json").exists()


def test_each_worker_runs_every_test(faulty):
    result = faulty("--tx=2*popen", "--dist=each")
    assert outcomes(result) == {name: 2 * count for name, count in ALL.items()}
    assert faulty.runs() == 1


def test_last_failed_and_failed_first(faulty):
    assert outcomes(faulty()) == ALL
    assert outcomes(faulty("--lf")) == {"failed": 2}
    assert outcomes(faulty("--lf", "-n2")) == {"failed": 2}
    first = faulty("--ff", "-v", "-x")
    assert outcomes(first) == {"failed": 1}
    assert [line.split()[0] for line in first.outlines if " FAILED" in line] == [FAULT]
    assert faulty.runs() == 4


def test_stepwise_goes_on_where_it_stopped(faulty):
    stopped = faulty("--stepwise")
    assert outcomes(stopped)["failed"] == 1
    passed = outcomes(stopped)["passed"]
    on = faulty("--stepwise", "--stepwise-skip")
    left = {"failed": 2, "passed": 95 - passed, "skipped": 6, "xfailed": 20}  # one is let off
    assert outcomes(on) == left


def test_last_failed_with_a_users_test_that_failed_too(faulty):
    faulty.pytester.makepyfile(test_mine="def test_mine():\n    assert 0\n")
    assert outcomes(faulty("test_mine.py")) == {"failed": 1}
    assert outcomes(faulty()) == ALL
    assert faulty.runs() == 1
    assert outcomes(faulty("--lf")) == {"failed": 2}


def test_stopping_at_the_first_failure(faulty):
    assert outcomes(faulty("-x"))["failed"] == 1
    assert outcomes(faulty("--maxfail=2"))["failed"] == 2
    assert outcomes(faulty("-x", "-n2"))["failed"] in (1, 2)  # both workers may be in one
    assert faulty.runs() == 3


def test_selecting(faulty):
    assert outcomes(faulty("-k", "ffn_silu and L01")) == {"failed": 1}
    assert outcomes(faulty("-k", "ffn_silu and L01", "-n2")) == {"failed": 1}
    assert outcomes(faulty("--deselect", FAULT, "--deselect=aprt::gate")) == {
        "passed": 95,
        "skipped": 24,
        "xfailed": 20,
    }
    assert faulty.runs() == 3


def test_an_id_from_the_summary_can_be_given_back(faulty):
    faulty.pytester.makepyfile(test_mine="def test_mine():\n    pass\n")
    assert outcomes(faulty(FAULT)) == {"failed": 1}
    assert outcomes(faulty(FAULT, "aprt::gate", "test_mine.py", "-n2")) == {
        "failed": 2,
        "passed": 1,
    }
    assert faulty.runs() == 2
    unknown = faulty("aprt::L77-ffn_silu")
    assert unknown.ret == 4
    unknown.stderr.fnmatch_lines(["*aprt::L77-ffn_silu: there is no such test; *"])


@pytest.mark.parametrize("args", [["-k", "nothing"], ["-k", "nothing", "-n2"]], ids=" ".join)
def test_no_model_runs_where_no_test_is_selected(faulty, args):
    assert faulty(*args).ret == 5
    assert faulty.runs() == 0


@pytest.mark.parametrize(
    "args", [["--collect-only"], ["--collect-only", "-q", "-n2"], ["--setup-plan"], ["--fixtures"],
             ["--markers"]], ids=" ".join,
)  # fmt: skip
def test_no_model_runs_where_nothing_is_tested(faulty, args):
    result = faulty(*args)
    assert result.ret == 0
    assert faulty.runs() == 0
    if args == ["--collect-only", "-q", "-n2"]:
        result.stdout.fnmatch_lines(["aprt::selftest-tokens", FAULT, "aprt::gate", "141 tests *"])


def test_without_a_terminal_reporter(faulty):
    result = faulty("-p", "no:terminal", "--junitxml=junit.xml")
    assert result.ret == 1
    assert faulty.runs() == 1
    suite = ET.parse(faulty.path / "junit.xml").getroot().find("testsuite")
    assert (suite.get("failures"), suite.get("skipped"), suite.get("tests")) == ("2", "44", "141")


@pytest.mark.parametrize("args", [[], ["-n2"]], ids=["alone", "-n2"])
def test_runxfail_does_not_let_what_is_inherited_pass(faulty, args):
    result = faulty("--runxfail", *args)
    assert outcomes(result) == {"failed": 22, "passed": 95, "skipped": 24}


@pytest.mark.parametrize("args", [[], ["-n2"], ["-o", "junit_family=xunit1"]], ids=" ".join)
def test_junit_xml(faulty, args):
    faulty("--junitxml=junit.xml", *args)
    cases = {
        case.get("name"): case for case in ET.parse(faulty.path / "junit.xml").iter("testcase")
    }
    assert len(cases) == 141
    classes = {name: case.get("classname") for name, case in cases.items()}
    assert classes["L01-ffn_silu"] == classes["L01-attn_norm"] == "aprt.L01"
    assert classes["lm_head"] == classes["gate"] == "aprt.model"
    assert classes["weights-blk.0.attn_q.weight"] == "aprt.weights"
    assert classes["config-rope_theta"] == "aprt.config"
    properties = {p.get("name"): p.get("value") for p in cases["L01-ffn_silu"].iter("property")}
    assert properties["status"] == "diverged"
    assert float(properties["local_rel_l2"]) == pytest.approx(0.25, rel=1e-3)
    failure = cases["L01-ffn_silu"].find("failure")
    assert failure.text.startswith("L01-ffn_silu: local rel_l2 2.5e-01 > ")
    assert "L01-ffn_silu" in cases["L02-attn_norm"].find("skipped").get("message")


def test_ids_and_headings_are_readable(faulty):
    result = faulty("-v")
    result.stdout.fnmatch_lines(
        [
            "aprt::selftest-tokens PASSED*",
            "aprt::weights-blk.0.attn_q.weight PASSED*",
            f"{FAULT} FAILED*",
            "aprt::L02-attn_norm XFAIL (follows from L01-ffn_silu)*",
            "aprt::gate FAILED*",
            "*_ aprt L01-ffn_silu _*",
            "L01-ffn_silu: local rel_l2 *",
        ]
    )
    assert "<-" not in result.stdout.str()


def test_addopts_of_the_environment(faulty, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k L01 --aprt-layers=1 -p no:cacheprovider")
    assert outcomes(faulty()) == {"failed": 1, "passed": 15, "xfailed": 1}
    assert faulty.runs() == 1
    assert not (faulty.path / ".pytest_cache").exists()


def test_progress_is_one_line_without_a_terminal(faulty):
    lines = [line for line in faulty().outlines if line.startswith("aprt: ") and " MB" in line]
    assert len(lines) == 1
    assert not [line for line in faulty("-q").outlines if " MB" in line]


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_a_broken_module_of_the_users_is_no_reason_to_run_models(faulty, workers):
    faulty.pytester.makepyfile(
        test_broken="import absent\n", test_mine="def test_mine(aprt_run):\n    pass\n"
    )
    broken = faulty("test_broken.py", "test_mine.py", *workers)
    assert broken.ret in (1, 2)
    assert "passed" not in broken.parseoutcomes()
    assert faulty.runs() == 0
    go_on = faulty("test_broken.py", "test_mine.py", "--continue-on-collection-errors", *workers)
    assert go_on.parseoutcomes() == {"errors": 1, "passed": 1}
    assert faulty.runs() == 1


def test_the_worst_of_several_prompts_decides_and_all_are_kept(faulty):
    conftest = faulty.path / "conftest.py"
    planted = "value * (1.25 if len(value) == 3 else 1.0)"  # seen by the shorter prompt alone
    conftest.write_text(conftest.read_text().replace("value * 1.25", planted))
    assert outcomes(faulty())["passed"] == 117
    assert faulty.runs() == 1
    result = faulty("--aprt-tokens=7,8,9", "--aprt-report=out")
    assert outcomes(result)["failed"] == 2
    assert faulty.runs() == 2  # one for each prompt
    report = json.loads((faulty.path / "out" / "report.json").read_text())
    assert [p["tokens"] for p in report["run"]["prompts"]] == [[1, 2, 3, 4, 5], [7, 8, 9]]
    point = next(p for p in report["points"] if p["point"] == "L01-ffn_silu")
    assert (point["prompt"], point["status"], point["shape"]) == (1, "diverged", [3, 80])
    assert [p["prompt"] for p in point["prompts"]] == [0, 1]
    sound, faulted = point["prompts"]
    assert sound["shape"] == [5, 80]
    assert sound["local"]["rel_l2"] < 1e-5 < faulted["local"]["rel_l2"]
    for error in ("total", "weights", "engine", "local", "worst_slice"):
        assert faulted[error] == point[error]
