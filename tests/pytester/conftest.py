"""A tiny random pair, and runs of pytest on it within this process, where torch is loaded already.

The engine under test is one of the user's own, with a fault in layer 1; it counts its runs.
"""

from __future__ import annotations

import families
import harness
import pytest

import pytest_aprt.render.html  # loads matplotlib, for the same reason
import pytest_aprt.run
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.testing import write_random_pair

TOKENS = "1,2,3,4,5"
PLUGINS = ("anyio", "html", "hypothesispytest", "metadata", "pytest_cov", "randomly", "timeout")

ENGINE = """
from pathlib import Path

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.facts import Facts
from pytest_aprt.sources.gguf import GgufFile
from pytest_aprt.testing import NumpyEngine
from pytest_aprt.weights import GgufWeights

HERE = Path(__file__).parent


class Counted(NumpyEngine):
    def layers(self, tokens):
        with open(HERE / "runs.txt", "a") as file:
            print(len(tokens), file=file)
        yield from super().layers(tokens)


def engine():
    file, row = GgufFile.open({gguf!r}), ARCHITECTURES["qwen2"]
    facts = Facts.from_gguf(file.metadata, file.tensors, row)
    faults = {{(1, "ffn_silu"): lambda value, workings: value * 1.25}}
    return Counted(GgufWeights(file, row, facts), facts, row, faults)
"""
HOOK = """
def pytest_aprt_model(config):
    return engine()
"""


@pytest.fixture(autouse=True)
def _not_within_a_worker(monkeypatch):
    """Runs inside are told nothing of the xdist worker that this test may run in."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The paths of a GGUF and its Hugging Face folder.

    They are run once here: pytester forgets the modules that a run inside loads, and torch and
    transformers can hardly be loaded twice.
    """
    gguf, hf = write_random_pair(tmp_path_factory.mktemp("pair"), families.qwen2())
    opened = open_pair(open_headers(str(gguf), str(hf)))
    assert harness.verdict_of(opened, harness.builtin(opened), (1, 2, 3)).status == "PARITY"
    assert pytest_aprt.run.peak_rss() > 0
    return gguf, hf


class Suite:
    """A project of a user with a model under test."""

    def __init__(self, pytester, gguf, hf):
        self.pytester, self.path = pytester, pytester.path
        self.pair = (f"--aprt-model={gguf}", f"--aprt-oracle={hf}")

    def __call__(self, *args, subprocess=False, plugins=()):
        """Run pytest there, with no third-party plugin but xdist and those that are named."""
        without = [f"-pno:{name}" for name in PLUGINS if name not in plugins]
        start = self.pytester.runpytest_inprocess
        if subprocess:
            start = self.pytester.runpytest_subprocess
        return start(*without, *self.pair, f"--aprt-tokens={TOKENS}", *args)

    def runs(self):
        """How often the engine under test ran since the last time this was asked."""
        counted = self.path / "runs.txt"
        lines = counted.read_text().splitlines() if counted.exists() else []
        counted.unlink(missing_ok=True)
        return len(lines)


@pytest.fixture
def healthy(pytester, pair):
    """A project whose model agrees with its oracle."""
    return Suite(pytester, *pair)


@pytest.fixture
def faulty(pytester, pair):
    """A project whose own engine has a fault: 2 tests fail, and what follows is inherited."""
    pytester.makeconftest(ENGINE.format(gguf=str(pair[0])) + HOOK)
    return Suite(pytester, *pair)
