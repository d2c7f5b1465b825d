"""Whole runs of pytest in a process of their own, on the fixture pair."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_aprt import report as reports
from pytest_aprt.render import failure
from pytest_aprt.sources.gguf import GgufFile

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tiny-qwen2"
GGUF, HF = FIXTURES / "q4_k_m.gguf", FIXTURES / "hf"
PAIR = (f"--aprt-model={GGUF}", f"--aprt-oracle={HF}")
TOKENS = "--aprt-tokens=3,77,500,12,640,9"
PROMPT = (*PAIR, TOKENS)
NO_CACHE = ("-p", "no:cacheprovider")
TESTS = {"selftest": 7, "config": 14, "weights": 51, "point": 71, "gate": 1}
ALL = sum(TESTS.values())

ENGINE = """
from pathlib import Path
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.testing import NumpyEngine

class Counted(NumpyEngine):
    def layers(self, tokens):
        with Path(__file__).with_name("runs.txt").open("a") as file:
            file.write("run\\n")
        yield from super().layers(tokens)

def engine(gguf, hf):
    pair = open_pair(open_headers(gguf, hf))
    faults = {(2, "attn_out"): lambda value, work: value * 2,
              (3, "ffn_up"): lambda value, work: value * 1.5}
    return Counted(pair.model_weights, pair.oracle_facts, pair.architecture, faults)
"""
FAULTY = (
    ENGINE
    + f"""
def pytest_aprt_model(config):
    return engine({str(GGUF)!r}, {str(HF)!r})
"""
)
FACTORY = (
    ENGINE
    + f"""
def make():
    return engine({str(GGUF)!r}, {str(HF)!r})
"""
)
BROKEN = """
class Engine:
    def layers(self, tokens):
        yield 0, {}
        raise RuntimeError("out of memory on device 0")

def pytest_aprt_model(config):
    return Engine()
"""


def run(folder, *args, columns=250, **files):
    """Run pytest in ``folder`` with ``files`` (name without .py -> text) beside it."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "tmp").mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    env |= {
        "HF_HUB_OFFLINE": "1", "COLUMNS": str(columns), "TMPDIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1", "PY_COLORS": "0",
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, args)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    result = pytest.RunResult(
        done.returncode, done.stdout.splitlines(), done.stderr.splitlines(),
        time.monotonic() - start,
    )  # fmt: skip
    text = done.stdout + done.stderr
    return SimpleNamespace(result=result, code=done.returncode, text=text, folder=folder)


def outcomes(done):
    found = dict(done.result.parseoutcomes())
    found.pop("warnings", None)
    return found


def junit(done):
    """Return test name -> (outcome, message) of ``--junitxml=junit.xml``."""
    found = {}
    for case in ElementTree.parse(done.folder / "junit.xml").iter("testcase"):
        outcome = next((c for c in case if c.tag in ("failure", "skipped", "error")), None)
        name = case.get("name")
        found[name] = ("passed", "") if outcome is None else (outcome.tag, outcome.get("message"))
    return found


def engine_runs(done):
    path = done.folder / "runs.txt"
    return path.read_text().count("run") if path.exists() else 0


def kind_of(name):
    kind, dash, _ = name.partition("-")
    return kind if name == "gate" or (dash and kind in TESTS) else "point"


def refusal(done):
    """Return the one line of a run that could not be."""
    assert done.code == 4, done.text
    assert "Traceback" not in done.text
    assert "INTERNALERROR" not in done.text
    lines = [line for line in done.result.errlines if line.strip()]
    assert len(lines) == 1, done.text
    assert lines[0].startswith("ERROR: ")
    return lines[0]


# A healthy pair


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    args = ("-v", "--aprt-report=out", "--junitxml=junit.xml", "--strict-markers", "-W", "error")
    return run(folder, *PAIR, *args, *NO_CACHE)


def test_a_clean_run_passes_every_test(clean):
    assert clean.code == 0, clean.text
    assert outcomes(clean) == {"passed": ALL}
    kinds = [kind_of(name) for name in junit(clean)]
    assert {kind: kinds.count(kind) for kind in TESTS} == TESTS


def test_ids_are_readable(clean):
    for name in ("L00-attn_norm", "lm_head", "config-rope_theta", "selftest-tokens", "gate",
                 "weights-blk.0.attn_q.weight"):  # fmt: skip
        assert f"\naprt::{name} PASSED " in clean.text


def test_the_head_says_what_is_compared(clean):
    assert f"aprt: {GGUF} against {HF}, {ALL} tests" in clean.text


def test_the_summary_says_what_the_run_concludes(clean):
    assert " forward-pass parity =" in clean.text
    assert "\nQUANTISATION_NOISE: no stage adds error of its own; the weights" in clean.text
    assert "\nreport: out\n" in clean.text


def test_the_reports_are_written_and_nothing_else(clean):
    assert {p.name for p in clean.folder.iterdir()} == {"out", "junit.xml", "tmp"}
    assert {p.name for p in (clean.folder / "out").iterdir()} == {"report.json", "report.md"}
    assert list((clean.folder / "tmp").glob("aprt-*")) == []
    report = reports.read(clean.folder / "out" / "report.json")
    assert report["run"]["prompts"][0]["text"] == "What is 2+2?"
    assert len(report["points"]) == TESTS["point"]
    json.loads((clean.folder / "out" / "report.json").read_text(), parse_constant=pytest.fail)


def test_junit_holds_the_numbers(clean):
    cases = ElementTree.parse(clean.folder / "junit.xml").iter("testcase")
    case = next(c for c in cases if c.get("name") == "L00-attn_norm")
    found = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert found["status"] in ("pass", "noise")
    assert 0.99 < float(found["total_cosine"]) <= 1
    assert float(found["local_rel_l2"]) < 1e-5


# Two faults in an engine of one's own, from conftest.py


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    return run(folder, *PROMPT, "--junitxml=junit.xml", "--aprt-report=out", conftest=FAULTY)


@pytest.fixture(scope="module")
def on_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return run(folder, *PROMPT, "-n2", "--junitxml=junit.xml", "--aprt-report=out", conftest=FAULTY)


def test_faults_fail_at_their_points_and_at_the_gate(faulty):
    assert faulty.code == 1, faulty.text
    found = junit(faulty)
    failed = [name for name, (outcome, _) in found.items() if outcome == "failure"]
    assert failed == ["L02-attn_out", "L03-ffn_up", "gate"]
    assert outcomes(faulty)["failed"] == 3
    assert sum(outcomes(faulty).values()) == ALL


def test_what_follows_is_expected_to_fail_and_names_the_first(faulty):
    outcome, message = junit(faulty)["L02-post_attn_residual"]
    assert outcome == "skipped"  # JUnit's word for an expected failure
    assert "follows from L02-attn_out" in message
    assert outcomes(faulty)["xfailed"] > 10


def test_the_short_summary_is_the_headline(faulty):
    report = reports.read(faulty.folder / "out" / "report.json")
    summary = faulty.text.rpartition(" short test summary info ")[2].splitlines()
    for name in ("L02-attn_out", "L03-ffn_up"):
        point = next(p for p in report["points"] if p["point"] == name)
        assert f"FAILED aprt::{name} - {failure.headline(report, point)}" in summary
    first = next(line for line in summary if line.startswith("FAILED"))
    assert first.startswith("FAILED aprt::L02-attn_out - L02-attn_out: local rel_l2 1.0e+00 > 1.0e")
    assert "(first divergence; L02-attention was " in first
    gate = next(line for line in summary if line.startswith("FAILED aprt::gate"))
    assert gate == f"FAILED aprt::gate - {report['verdict']['summary']}"


def test_a_failure_has_no_traceback_and_its_command_can_be_typed(faulty):
    assert "Traceback" not in faulty.text
    assert "items.py" not in faulty.text
    again = [line for line in faulty.text.splitlines() if line.startswith("again: ")]
    assert len(again) == 2
    assert all(a.startswith(("again: pytest --aprt", "again: python -m pytest --")) for a in again)


def test_models_run_once(faulty, on_workers):
    assert engine_runs(faulty) == 1
    assert engine_runs(on_workers) == 1


def test_workers_report_what_one_process_reports(faulty, on_workers):
    assert on_workers.code == faulty.code
    assert outcomes(on_workers) == outcomes(faulty)
    assert junit(on_workers) == {
        name: (outcome, message.replace(str(faulty.folder), str(on_workers.folder)))
        for name, (outcome, message) in junit(faulty).items()
    }
    assert "2 workers [144 items]" in on_workers.text
    assert "\nDIVERGED: first at L02-attn_out" in on_workers.text
    assert list((on_workers.folder / "tmp").glob("aprt-*")) == []


def test_lf_runs_what_failed(faulty):
    again = run(faulty.folder, *PROMPT, "--lf", "-q")
    assert again.code == 1
    assert outcomes(again) == {"failed": 3, "deselected": ALL - 3}


def test_x_deselect_and_maxfail(tmp_path):
    done = run(tmp_path, *PROMPT, "-x", "--deselect=aprt::L02-attn_out", *NO_CACHE, conftest=FAULTY)
    assert done.code == 1, done.text
    assert outcomes(done)["failed"] == outcomes(done)["deselected"] == 1
    assert "FAILED aprt::L03-ffn_up - " in done.text
    assert "aprt::gate" not in done.text


def test_runxfail_does_not_turn_inherited_points_into_passes(tmp_path):
    done = run(
        tmp_path, *PROMPT, "--runxfail", "-k", "L02 and residual or L02-attention", *NO_CACHE,
        conftest=FAULTY,
    )  # fmt: skip
    assert done.code == 1, done.text
    assert outcomes(done) == {"failed": 2, "passed": 1, "deselected": ALL - 3}
    assert "FAILED aprt::L02-post_ffn_residual - " in done.text


def test_a_factory_is_an_engine(tmp_path):
    done = run(
        tmp_path, "--aprt-model=python:mine:make", f"--aprt-weights={GGUF}", f"--aprt-oracle={HF}",
        TOKENS, "-q", "-k", "L02-attn_out or gate", *NO_CACHE, mine=FACTORY,
    )  # fmt: skip
    assert done.code == 1, done.text
    assert outcomes(done) == {"failed": 2, "deselected": ALL - 2}
    assert "FAILED aprt::L02-attn_out - L02-attn_out: local rel_l2 1.0e+00" in done.text


def test_an_engine_that_breaks_is_inconclusive_and_says_why(tmp_path):
    done = run(tmp_path, *PROMPT, *NO_CACHE, conftest=BROKEN)
    assert done.code == 1, done.text
    assert "INTERNALERROR" not in done.text
    assert "INCONCLUSIVE: the self-test 'capture' failed" in done.text
    assert "RuntimeError: out of memory on device 0 (conftest.py:5 in layers)" in done.text


# Faults of the file


def swapped(path, first, second):
    """A copy of the GGUF in which two tensors have each other's bytes."""
    with GgufFile.open(GGUF) as file:
        a, b = file.info(first), file.info(second)
    assert (a.type, a.shape) == (b.type, b.shape)
    data = bytearray(GGUF.read_bytes())
    one, two = (slice(t.offset, t.offset + t.n_bytes) for t in (a, b))
    data[one], data[two] = data[two], data[one]
    path.write_bytes(data)


def with_rope_base(path, value):
    """A copy of the GGUF with another rope.freq_base."""
    data = bytearray(GGUF.read_bytes())
    key = b"qwen2.rope.freq_base"
    at = data.index(key) + len(key)
    assert struct.unpack_from("<If", data, at) == (6, 1e6)
    struct.pack_into("<f", data, at + 4, value)
    path.write_bytes(data)


def test_swapped_tensors_break_the_weights_rung(tmp_path):
    names = ("blk.1.attn_k.weight", "blk.2.attn_k.weight")
    swapped(tmp_path / "m.gguf", *names)
    done = run(
        tmp_path, "--aprt-model=m.gguf", f"--aprt-oracle={HF}", TOKENS, "--aprt-report=out",
        "--junitxml=junit.xml", *NO_CACHE,
    )  # fmt: skip
    assert done.code == 1, done.text
    failed = [name for name, (outcome, _) in junit(done).items() if outcome == "failure"]
    assert failed == [*(f"weights-{name}" for name in names), "gate"]
    verdict = reports.read(tmp_path / "out" / "report.json")["verdict"]
    assert (verdict["status"], verdict["rung"]) == ("DIVERGED", "weights")
    assert verdict["first_divergence"] is None
    assert f"FAILED aprt::weights-{names[0]} - weights {names[0]}: " in done.text


def test_wrong_metadata_breaks_the_config_rung(tmp_path):
    with_rope_base(tmp_path / "m.gguf", 10000.0)
    done = run(
        tmp_path, "--aprt-model=m.gguf", f"--aprt-oracle={HF}", TOKENS, "--aprt-report=out",
        "--junitxml=junit.xml", *NO_CACHE,
    )  # fmt: skip
    assert done.code == 1, done.text
    failed = [name for name, (outcome, _) in junit(done).items() if outcome == "failure"]
    assert failed == ["config-rope_theta", "gate"]
    verdict = reports.read(tmp_path / "out" / "report.json")["verdict"]
    assert (verdict["status"], verdict["rung"]) == ("DIVERGED", "config")
    assert "follows from config-rope_theta" in junit(done)["L00-q_post_rope"][1]
    assert "10000.0 in the model (rope.freq_base), 1000000.0 in the oracle" in done.text


# Strict, and the ini


INI = f"""
[pytest]
aprt_model = {{model}}
aprt_oracle = {HF}
aprt_tokens =
    3,77,500,12,640,9
    1 2 3
aprt_layers = 0..2
aprt_stages = ffn_out,lm_head
aprt_strict = true
aprt_threshold =
    lm_head=0.5
aprt_min_cosine = 0.9
aprt_report = out
"""


def test_ini_twins_and_strict(tmp_path):
    shutil.copy(GGUF, tmp_path / "own.gguf")
    (tmp_path / "pytest.ini").write_text(INI.format(model="own.gguf"))
    done = run(tmp_path, "--aprt-min-cosine=0.99999", "--junitxml=junit.xml", *NO_CACHE)
    assert done.code == 1, done.text
    found = junit(done)
    assert [name for name in found if kind_of(name) == "point"] == [
        "L00-ffn_out", "L01-ffn_out", "lm_head",
    ]  # fmt: skip
    failed = [name for name, (outcome, _) in found.items() if outcome == "failure"]
    assert failed == ["L00-ffn_out", "L01-ffn_out"]
    assert "< 0.99999 (--aprt-min-cosine); --aprt-strict: total below its threshold" in done.text
    report = reports.read(tmp_path / "out" / "report.json")
    assert [p["tokens"] for p in report["run"]["prompts"]] == [[3, 77, 500, 12, 640, 9], [1, 2, 3]]
    assert report["points"][-1]["threshold"] == {
        "cosine": 0.5, "source": "--aprt-threshold=lm_head",
    }  # fmt: skip


def test_a_run_without_a_terminal(tmp_path):
    done = run(
        tmp_path, *PROMPT, "-p", "no:terminal", "--junitxml=junit.xml", "-k", "gate or L00-ffn_up",
        *NO_CACHE,
    )  # fmt: skip
    assert done.code == 0, done.text
    assert [outcome for outcome, _ in junit(done).values()] == ["passed", "passed"]


# What needs no model run


def test_collect_only_runs_no_model(tmp_path):
    done = run(tmp_path, *PROMPT, "--collect-only", "-q", *NO_CACHE, conftest=FAULTY)
    assert done.code == 0, done.text
    assert engine_runs(done) == 0
    ids = [line for line in done.result.outlines if line.startswith("aprt::")]
    assert len(ids) == ALL
    assert "forward-pass parity" not in done.text


def test_a_selection_without_points_of_the_suite_runs_no_model(tmp_path):
    done = run(tmp_path, *PROMPT, "-k", "nothing_like_it", *NO_CACHE, conftest=FAULTY)
    assert done.code == 5
    assert outcomes(done) == {"deselected": ALL}
    assert engine_runs(done) == 0


OWN = """
import sys

def test_own():
    assert not {"numpy", "torch", "transformers", "gguf"} & set(sys.modules)
"""


@pytest.mark.parametrize("args", [(), ("test_own.py",), ("-v", "--fixtures-per-test")], ids=str)
def test_without_a_model_nothing_heavy_is_imported(tmp_path, args):
    done = run(tmp_path, *args, "-p", "no:hypothesispytest", *NO_CACHE, test_own=OWN)
    assert done.code == 0, done.text
    assert "aprt:" not in done.text


@pytest.mark.parametrize("args", [(), ("-n2",)], ids=["one process", "workers"])
def test_with_paths_the_users_tests_run_and_the_suite_does_not(tmp_path, args):
    own = "def test_own():\n    pass\n"
    done = run(tmp_path, *PROMPT, "test_own.py", *args, *NO_CACHE, test_own=own, conftest=FAULTY)
    assert done.code == 0, done.text
    assert outcomes(done) == {"passed": 1}
    assert engine_runs(done) == 0
    assert "forward-pass parity" not in done.text


def test_without_paths_the_users_tests_do_not_run(tmp_path):
    own = "def test_own():\n    assert False\n"
    done = run(tmp_path, *PROMPT, "--collect-only", "-q", *NO_CACHE, test_own=own)
    assert "test_own" not in done.text


# What cannot be run


@pytest.fixture
def bad(tmp_path):
    """A folder of damaged things."""
    (tmp_path / "short.gguf").write_bytes(GGUF.read_bytes()[:100_000])
    (tmp_path / "text.gguf").write_text("no model at all\n" * 10)
    (tmp_path / "empty").mkdir()
    for name, change in (("other", {"model_type": "gpt2"}), ("wide", {"hidden_size": 512})):
        shutil.copytree(HF, tmp_path / name)
        config = json.loads((HF / "config.json").read_text()) | change
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--aprt-min-cosine=2",
            "--aprt-min-cosine=2 is not valid: expected a cosine such as 0.999",
        ),
        (
            "--aprt-layers=9",
            "--aprt-layers=9 is not valid: expected all, A..B with 0 <= A < B <= 4",
        ),
        ("--aprt-stages=rope", "stage 'rope' is unknown: expected 'all' or one of embedding, "),
        ("--aprt-model=nowhere.gguf", "nowhere.gguf: no such file or folder; expected a GGUF "),
        ("--aprt-model=short.gguf", "short.gguf"),
        ("--aprt-model=text.gguf", "text.gguf"),
        ("--aprt-model=", "--aprt-model"),
        ("--aprt-stages=", "stage '' is unknown"),
        ("--aprt-oracle=empty", "config.json"),
        ("--aprt-oracle=org/not-in-the-cache", "org/not-in-the-cache"),
        ("--aprt-oracle=other", "different families: the model is 'qwen2'"),
        ("--aprt-oracle=wide", "model and oracle differ in hidden_size: 256 in "),
        ("--aprt-tokens=99999", "token id 99999 is outside the vocabulary: expected 0 to 1023"),
        ("--aprt-report=file", "cannot write file/report.json: "),
        (
            "--aprt-model=python:os:nothing",
            "--aprt-model=python:os:nothing is not valid: expected ",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_4(bad, option, said):
    done = run(bad, *PROMPT, f"--aprt-weights={GGUF}", option, *NO_CACHE)
    assert said in refusal(done)


@pytest.mark.parametrize("option", ["--aprt-min-cosine=2", "--aprt-model=short.gguf",
                                    "--aprt-oracle=wide"])  # fmt: skip
def test_bad_input_is_one_line_on_workers_too(bad, option):
    refusal(run(bad, *PROMPT, option, "-n2", *NO_CACHE))


def test_a_bad_value_of_the_ini_is_one_line_too(tmp_path):
    (tmp_path / "pytest.ini").write_text(INI.format(model=GGUF) + "aprt_arithmetic = f8\n")
    assert "--aprt-arithmetic=f8 is not valid: expected one of" in refusal(run(tmp_path, *NO_CACHE))
