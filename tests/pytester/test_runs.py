"""Whole runs of pytest in a subprocess, as a user starts them."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
from short_summary import summary

from pytest_aprt.sources.gguf import GgufFile

FAULTY = """
    import numpy as np
    from pytest_aprt.architectures import ARCHITECTURES
    from pytest_aprt.facts import Facts
    from pytest_aprt.sources.gguf import GgufFile
    from pytest_aprt.testing import NumpyEngine
    from pytest_aprt.weights import GgufWeights

    def wrong_base(part):
        return lambda v, w: w.rope(w.normed(part), theta=10_000.0).reshape(v.shape)

    def engine():
        file, row = GgufFile.open({gguf!r}), ARCHITECTURES["qwen2"]
        facts = Facts.from_gguf(file.metadata, file.tensors, row)
        faults = {{(2, "q_post_rope"): wrong_base("q"), (2, "k_post_rope"): wrong_base("k")}}
        return NumpyEngine(GgufWeights(file, row, facts), facts, row, faults)
"""


@pytest.fixture
def files(request):
    return request.config.rootpath / "fixtures" / "tiny-qwen2"


@pytest.fixture
def run(pytester, files):
    """Run pytest on the fixture pair; keyword arguments name another model or oracle."""

    def start(*args, model=None, oracle=None):
        return pytester.runpytest_subprocess(
            "-pno:randomly",
            f"--aprt-model={model or files / 'q4_k_m.gguf'}",
            f"--aprt-oracle={oracle or files / 'hf'}",
            *args,
        )

    return start


def test_the_main_job(run, pytester):
    result = run("--aprt-report=out", "-v", "--junitxml=junit.xml")
    assert result.ret == 0
    # 71 points, 51 tensors, 14 facts, 7 self-tests, the gate; tokens, logits and decode
    result.assert_outcomes(passed=144 + 18 + 2 + 5, skipped=1)  # the builtin engine has one path
    result.stdout.fnmatch_lines(
        ["aprt::weights-blk.0.attn_q.weight PASSED*", "aprt::L00-embedding PASSED*",
         "aprt::gate PASSED*", "QUANTISATION_NOISE: *"]
    )  # fmt: skip
    report = json.loads((pytester.path / "out" / "report.json").read_text())
    assert len(report["points"]) == 71
    for point in report["points"]:
        assert point["status"] in ("pass", "noise")
        assert all(point[error] for error in ("total", "weights", "engine", "local"))
    assert "QUANTISATION_NOISE" in (pytester.path / "out" / "report.md").read_text()
    assert 'name="L00-attn_norm"' in (pytester.path / "junit.xml").read_text()


def test_a_fault_in_an_engine_of_ones_own(run, pytester, files):
    engine = FAULTY.format(gguf=str(files / "q4_k_m.gguf"))
    pytester.makeconftest(
        engine + "\n    def pytest_aprt_model(config):\n        return engine()\n"
    )
    result = run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*_ aprt L02-q_post_rope _*",
            "DIVERGED: first at L02-q_post_rope (*",
            summary("aprt::L02-q_post_rope", "L02-q_post_rope: local rel_l2 *"),
            summary("aprt::gate", "DIVERGED: first at L02-q_post_rope*"),
        ]
    )
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 3  # Q, K and the gate
    again = run("--lf", "-k", "q_post_rope")
    assert again.parseoutcomes()["failed"] == 1
    assert "passed" not in again.parseoutcomes()
    first = run("-x")
    assert first.parseoutcomes()["failed"] == 1
    plain = run("--runxfail")
    assert plain.parseoutcomes()["passed"] == outcomes["passed"]  # what is inherited never passes
    spread = run("-n", "2")
    assert spread.parseoutcomes()["failed"] == 3
    assert spread.parseoutcomes()["passed"] == outcomes["passed"]


def test_an_engine_by_its_name(run, pytester, files):
    gguf = str(files / "q4_k_m.gguf")
    pytester.makepyfile(broken=FAULTY.format(gguf=gguf))
    pytester.syspathinsert()
    result = run(f"--aprt-weights={gguf}", model="python:broken:engine")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["DIVERGED: first at L02-q_post_rope *"])


def test_two_tensors_swapped(run, files, tmp_path):
    broken = shutil.copy(files / "q4_k_m.gguf", tmp_path / "swapped.gguf")
    with GgufFile.open(broken) as file:
        a, b = (file.tensors[f"blk.{layer}.attn_q.weight"] for layer in (0, 1))
        assert (a.type, a.n_bytes) == (b.type, b.n_bytes)
    data = bytearray(broken.read_bytes())
    left, right = (slice(t.offset, t.offset + t.n_bytes) for t in (a, b))
    data[left], data[right] = data[right], data[left]
    broken.write_bytes(data)
    result = run("--aprt-report=out", model=broken)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["DIVERGED: weights blk.0.attn_q.weight is swapped with blk.1.attn_q.weight (1.4*",
         "FAILED aprt::weights-blk.0.attn_q.weight*", "FAILED aprt::weights-blk.1.attn_q.weight*",
         "FAILED aprt::gate*"]
    )  # fmt: skip
    assert result.parseoutcomes()["failed"] == 3


def test_a_wrong_rope_base_in_the_metadata(run, files, tmp_path):
    broken = shutil.copy(files / "q4_k_m.gguf", tmp_path / "theta.gguf")
    data = broken.read_bytes()
    place = data.index(b"qwen2.rope.freq_base") + len("qwen2.rope.freq_base") + 4
    assert struct.unpack_from("<f", data, place) == (1e6,)
    broken.write_bytes(data[:place] + struct.pack("<f", 1e4) + data[place + 4 :])
    result = run(model=broken)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["DIVERGED: config rope_theta is 10000.0 in the model, 1000000.0*"])
    failed = [line for line in result.outlines if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["aprt::config-rope_theta", "aprt::gate"]


def test_strict_allows_nothing_for_the_weights(run):
    result = run("--aprt-strict", "--aprt-stages=lm_head,attn_norm", "--aprt-layers=0..2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [summary("aprt::L00-attn_norm", "L00-attn_norm: total cosine 0.99*")]
    )


def test_ini_twins_and_the_command_line_before_them(run, pytester):
    pytester.makeini("[pytest]\naprt_stages = attn_norm\naprt_layers = 0\naprt_min_cosine = 0.5\n")
    result = run("--aprt-stages=attn_out")
    assert result.ret == 0
    # the point, the other rungs, the gate
    result.assert_outcomes(passed=1 + 51 + 14 + 7 + 1 + 18 + 2 + 5, skipped=1)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--aprt-stages=attn_nrom"], "*stage 'attn_nrom' is unknown: expected 'all' or one of *"),
        (["--aprt-layers=4..2"], "*--aprt-layers=4..2 is not valid: expected all, *"),
        (["--aprt-min-cosine=2"], "*--aprt-min-cosine=2 is not valid: expected a cosine*"),
        (["--aprt-model=absent.gguf"], "*absent.gguf: no such file or folder; expected a GGUF*"),
        (["--aprt-oracle=absent"], "*absent*"),
        (["--aprt-layers=9", "-n2"], "*--aprt-layers=9 is not valid*"),
        (["--aprt-tokens=99999", "-n2"], "*token id 99999 is outside the vocabulary*"),
        (["--aprt-tokens=99999"], "*token id 99999 is outside the vocabulary*"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_4(run, args, says):
    result = run(*args)
    assert result.ret == 4
    text = [*result.outlines, *result.errlines]
    assert not any("Traceback" in line or "INTERNALERROR" in line for line in text)
    result.stderr.fnmatch_lines([says])


def test_a_truncated_model(run, files, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes((files / "q4_k_m.gguf").read_bytes()[:-5000])
    result = run(model=short)
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*short.gguf*"])


def test_collect_only_runs_no_model(run):
    result = run("--collect-only", "-q", "-p", "no:cacheprovider")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["aprt::gate", "170 tests collected*"])
    assert "final norm" not in result.stdout.str()


def test_paths_mean_the_users_own_tests(run, pytester):
    pytester.makepyfile("def test_mine():\n    pass\n")
    run("test_paths_mean_the_users_own_tests.py").assert_outcomes(passed=1)


def test_without_a_model_the_plugin_imports_neither_numpy_nor_torch(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_unused():
            assert "pytest_aprt.plugin" in sys.modules
            heavy = {"numpy", "torch", "transformers", "gguf", "safetensors"}
            assert heavy & set(sys.modules) == set()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:randomly")
    result.assert_outcomes(passed=1)
