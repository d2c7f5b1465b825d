"""Our contracts held against engines in this process, healthy or with a fault planted."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from pathlib import Path

from harness import FIXTURES, fixture_pair

from pytest_aprt.capture import CheckedEngine
from pytest_aprt.captures import Captures, CaptureWriter
from pytest_aprt.contracts.bindings import ShellSettings, bind
from pytest_aprt.contracts.contract import load
from pytest_aprt.contracts.evaluate import evaluate
from pytest_aprt.contracts.subject import Bench, Opened, Subject
from pytest_aprt.engines.choose import engine_of
from pytest_aprt.pair import open_headers
from pytest_aprt.run import prompts_of, run
from pytest_aprt.settings import read_settings
from pytest_aprt.testing import NumpyEngine

ROOT = Path(__file__).parent.parent
NO_SHELL = ShellSettings(False, 60.0)
CONTRACTS = {path.name: load(path) for path in sorted((ROOT / "contracts").glob("*.yaml"))}
IDS = {f.id: name for name, contract in CONTRACTS.items() for f in contract.falsifiers}
PROMPTS = ["3,77,500,12,640,9", "5,6,7,8"]


def numpy_engine(faults):
    """An engine on the fixture's weights; ``faults`` maps (layer, stage) to what goes wrong."""
    pair = _pair()
    return NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, faults)


@functools.cache
def _headers():
    return open_headers(str(FIXTURES / "tiny-qwen2" / "q4_k_m.gguf"),
                        str(FIXTURES / "tiny-qwen2" / "hf"))  # fmt: skip


@functools.cache
def _pair():
    return fixture_pair()


def bench_of(engine=None):
    """The bench of a run on the fixture: the builtin engine, or another."""
    gguf, hf = FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", FIXTURES / "tiny-qwen2" / "hf"
    given = {"aprt_model": str(gguf), "aprt_oracle": str(hf), "aprt_tokens": PROMPTS}
    settings = read_settings(given.get, command="pytest")
    folder = Path(tempfile.mkdtemp(prefix="aprt-test-"))
    report = run(_headers(), settings, engine, lambda *a: None, keep=CaptureWriter(folder))

    def opened():
        pair = _pair()
        if engine is None:
            prompts = prompts_of(settings, pair)
            return Opened(pair, engine_of(pair, settings.model_side, None, prompts).engine, prompts)
        checked = CheckedEngine(engine, pair.graph, pair.oracle_facts, "test")
        return Opened(pair, checked, prompts_of(settings, pair))

    bench = Bench(lambda: report, lambda side: Captures(folder / side, report), opened)
    weakref.finalize(bench, shutil.rmtree, folder)
    return bench


@functools.cache
def healthy():
    return bench_of()


def judge(falsifier_id, folder, bench, contract=None):
    """Evaluate a falsifier of ours."""
    contract = contract or CONTRACTS[IDS[falsifier_id]]
    falsifier = contract.named(falsifier_id)
    subject = Subject(contract=contract, falsifier=falsifier, folder=folder, root=ROOT, bench=bench)
    return evaluate(subject, bind(falsifier, NO_SHELL), contract.path.name)
