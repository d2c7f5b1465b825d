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
from pytest_aprt.pair import gguf_facts
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
facts = gguf_facts(file, row)
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
    assert "apr ended with exit code 2: usage: apr trace" in said
