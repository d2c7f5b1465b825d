"""A family that the table does not have: a row in conftest.py, and the suite runs."""

from __future__ import annotations

import pytest
from families import NEW_CONFIGURATIONS, NEW_ROWS

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.testing import write_random_pair

ROW = """
from dataclasses import replace

from pytest_aprt.architectures import ARCHITECTURES

row = ARCHITECTURES["ernie4_5"] = replace(
    ARCHITECTURES["llama"],
    name="ernie4_5",
    model_types=("ernie4_5",),
    rotated_pairs="adjacent",
    permuted_qk=False,
    parameter_tensors=(),
)
"""
FAULT = """

def pytest_aprt_model(config):
    from pytest_aprt.facts import Facts
    from pytest_aprt.sources.gguf import GgufFile
    from pytest_aprt.testing import NumpyEngine
    from pytest_aprt.weights import GgufWeights

    def in_halves(value, work):
        return work.rope(work.normed("k"), pairs="half").reshape(value.shape)

    file = GgufFile.open({gguf!r})
    facts = Facts.from_gguf(file.metadata, file.tensors, row)
    return NumpyEngine(GgufWeights(file, row, facts), facts, row, {{(1, "k_post_rope"): in_halves}})
"""


@pytest.fixture
def run(pytester, tmp_path):
    """Run pytest on a random pair of the new family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "ernie4_5", NEW_ROWS["ernie4_5"])
        gguf, hf = write_random_pair(tmp_path, NEW_CONFIGURATIONS["ernie4_5"](), seed=5)

    def start(conftest, *args):
        pytester.makeconftest(conftest.format(gguf=str(gguf)))
        return pytester.runpytest_subprocess(
            "-pno:randomly", f"--aprt-model={gguf}", f"--aprt-oracle={hf}",
            "--aprt-tokens=5,9,3,77", *args,
        )  # fmt: skip

    return start


def test_without_its_row_a_family_is_refused(run):
    unknown = run("")
    assert unknown.ret == 4
    unknown.stderr.fnmatch_lines(["*model architecture 'ernie4_5' is unknown: expected one of *"])


def test_with_its_row_a_healthy_model_passes(run):
    clean = run(ROW)
    assert clean.ret == 0
    clean.stdout.fnmatch_lines(["PARITY: *"])


def test_with_its_row_a_fault_is_found(run):
    faulty = run(ROW + FAULT, "-n2")
    assert faulty.ret == 1
    faulty.stdout.fnmatch_lines(["DIVERGED: first at L01-k_post_rope *"])
    failed = {line.split()[1] for line in faulty.outlines if line.startswith("FAILED")}
    assert failed == {"aprt::L01-k_post_rope", "aprt::gate"}
