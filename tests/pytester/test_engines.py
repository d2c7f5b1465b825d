"""Whole runs with other engines than the builtin one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from short_summary import one_line

TOKENS = "1,2,3,4,5"
README = (Path(__file__).parent.parent.parent / "README.md").read_text("utf-8")
(PROFILE,) = re.findall(r"```ini\n# pytest.ini\n(.*?)```", README, re.S)

APR = """#!{python}
# Stands in for apr: its options, its one prompt, no manifest.
import argparse
from pathlib import Path
from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.checkpoints import GgufCheckpoint
from pytest_aprt.sources.aprt import WHOLE_MODEL, write_tensor
from pytest_aprt.sources.gguf import GgufFile
from pytest_aprt.testing import NumpyEngine
from pytest_aprt.weights import GgufWeights

parser = argparse.ArgumentParser(prog="apr")
trace = parser.add_subparsers(required=True).add_parser("trace")
trace.add_argument("file", type=Path)
trace.add_argument("--save-tensor", required=True)
trace.add_argument("--save-tensor-dir", type=Path, required=True)
trace.add_argument("--save-tensor-layers", default="0..1")
asked = parser.parse_args()
if asked.file.suffix != ".apr":
    parser.error(f"{{asked.file}}: unknown format")
start, stop = map(int, asked.save_tensor_layers.split(".."))
file, row = GgufFile.open(asked.file), ARCHITECTURES["qwen2"]
facts = GgufCheckpoint(file, row).facts
engine = NumpyEngine(GgufWeights(file, row, facts), facts, row)
for layer, stages in engine.layers([{tokens}]):
    if layer is None or start <= layer < stop:
        folder = asked.save_tensor_dir / ("" if layer is None else f"layer-{{layer}}")
        for name in set(stages) & set(asked.save_tensor.split(",")):
            number = WHOLE_MODEL if layer is None else layer
            write_tensor(folder / f"{{name}}.bin", number, stages[name])
"""


@pytest.fixture
def start(pytester, pair, monkeypatch):
    """Run the profile of README with a stand-in for apr in PATH."""
    for name in ("model.apr", "model.gguf"):
        (pytester.path / name).symlink_to(pair[0])
    apr = pytester.mkdir("bin") / "apr"
    monkeypatch.setenv("PATH", str(apr.parent), prepend=os.pathsep)
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    monkeypatch.setenv("PYTHONPATH", paths)  # of this pytest's own package

    def start(*args, profile=PROFILE, runs=TOKENS):
        pytester.makeini(profile)
        apr.write_text(APR.format(python=sys.executable, tokens=runs))
        apr.chmod(0o700)
        given = (f"--aprt-oracle={pair[1]}", f"--aprt-tokens={TOKENS}")
        return pytester.runpytest_inprocess("-pno:randomly", *given, *args)

    return start


def test_the_profile_for_apr(start):
    result = start("-k", "L0 or final_norm or lm_head")
    result.assert_outcomes(passed=54, deselected=None)
    result.stdout.fnmatch_lines(["PARITY: *"])


def test_a_model_that_only_the_command_reads_without_weights(start):
    result = start(profile=PROFILE.replace("aprt_weights = model.gguf\n", ""))
    assert result.ret == 0
    result.stdout.fnmatch_lines(["PARITY: all *points agree on total alone*"])


def test_another_prompt_than_that_of_the_program(start):
    result = start(runs="5,4,3,2,1")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["INCONCLUSIVE: *the dump is another prompt's*"])


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_a_program_that_fails_is_one_line(start, workers):
    bad = "--aprt-engine-command=apr trace {model} --dump {out}"
    said = one_line(start(bad, *workers))
    usage = "usage: apr trace" if sys.version_info < (3, 13) else "--save-tensor-dir"
    assert f"apr ended with exit code 2: {usage}" in said  # its last lines: newer ones are shorter
    assert " --dump " in said


# transformers, and two engines


def test_a_hugging_face_model_under_test(healthy, pair):
    given = [f"--aprt-model={pair[1]}", "--aprt-engine-option=dtype=bfloat16"]
    result = healthy(*given, "-k", "L0 or weights or gate or path or decode")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["PARITY: all 51 points agree *"])


def test_weights_that_are_a_hugging_face_model(faulty, pair):
    result = faulty(f"--aprt-model={pair[1]}", "-k", "L01-ffn_silu or gate")
    result.assert_outcomes(failed=2, passed=5, xfailed=1, deselected=None)
    result.stdout.fnmatch_lines(["DIVERGED: first at L01-ffn_silu *"])


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_a_device_that_is_not_there_is_one_line(healthy, pair, workers):
    result = healthy(f"--aprt-model={pair[1]}", "--aprt-device=cuda:99", *workers)
    assert "--aprt-device=cuda:99: torch " in one_line(result)


def test_a_device_that_an_engine_does_not_use_is_one_line(healthy):
    said = one_line(healthy("--aprt-device=meta"))
    assert said == (
        "ERROR: --aprt-device=meta is not valid with the engine builtin: expected "
        "--aprt-engine=transformers, which runs there"
    )


def test_what_transformers_does_not_load_is_one_line(healthy, pair):
    result = healthy(f"--aprt-model={pair[1]}", "--aprt-engine-option=dtype=float17")
    assert "transformers does not load " in one_line(result)


def test_one_line_compares_two_engines(faulty, pair):
    """The model is the faulty engine of conftest.py, the oracle the builtin one."""
    result = faulty(f"--aprt-oracle={pair[0]}", "-k", "L0 or gate")
    result.assert_outcomes(failed=2, passed=33, xfailed=18, deselected=None)
    result.stdout.fnmatch_lines(["DIVERGED: first at L01-ffn_silu *"])


def test_an_oracle_of_ones_own(faulty, pair):
    conftest = faulty.path / "conftest.py"
    text = conftest.read_text().partition("def pytest_aprt_model")[0]
    (faulty.path / "old.py").write_text(text)
    conftest.unlink()
    result = faulty("--aprt-oracle=python:old:engine", "-k", "L0 or selftest or gate")
    result.stdout.fnmatch_lines(["INCONCLUSIVE: the self-test 'replay' failed: L01-ffn_silu of *"])
