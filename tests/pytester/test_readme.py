"""The Python in README.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent.parent / "README.md"
BLOCKS = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README.read_text("utf-8"), re.S))


def test_every_example_names_its_file():
    assert len(BLOCKS) == README.read_text("utf-8").count("```python") >= 2


def code_lines(name):
    return [line for line in BLOCKS[name].splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["conftest.py", "numpy_engine.py"])
def test_an_engine_is_less_than_30_lines(name):
    assert len(code_lines(name)) < 30


def test_a_module_and_tests_of_ones_own(healthy):
    for name in ("conftest.py", "test_parity.py"):
        (healthy.path / name).write_text(BLOCKS[name])
    # The map has eleven stages of a layer, the embedding, the final norm and the logits.
    shown, points = 3 * 11 + 3, 54
    suite = healthy("-k", "L00 or L01 or L02 or final_norm or lm_head")
    suite.assert_outcomes(passed=shown, skipped=points - shown, deselected=None)
    suite.stdout.fnmatch_lines(["PARITY: *"])
    own = healthy("test_parity.py")
    own.assert_outcomes(passed=2 + shown, skipped=points - shown)


def test_an_engine_in_numpy(healthy, pair):
    gguf, hf = pair
    (healthy.path / "numpy_engine.py").write_text(BLOCKS["numpy_engine.py"])
    (healthy.path / "hf").symlink_to(hf)
    given = ["--aprt-model=python:numpy_engine:Engine", f"--aprt-weights={gguf}"]
    shown, points = 3 * 4 + 1, 54
    suite = healthy(*given, "-k", "L00 or L01 or L02 or final_norm or lm_head")
    suite.assert_outcomes(passed=shown, skipped=points - shown, deselected=None)
    suite.stdout.fnmatch_lines(["PARITY: *"])
