"""Runs a pair in process and returns the verdict, for tests that need no pytest inside pytest."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from pytest_aprt.arithmetic import profile_named
from pytest_aprt.capture import CheckedEngine
from pytest_aprt.compiled import PROCESSOR
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.measure import Stop, measure_pair
from pytest_aprt.pair import Pair, open_headers, open_pair
from pytest_aprt.readings import Prompt
from pytest_aprt.rungs.config import fact_rows
from pytest_aprt.settings import Settings, read_settings
from pytest_aprt.sources.aprt import WHOLE_MODEL, write_tensor
from pytest_aprt.stages import STAGES
from pytest_aprt.testing import NumpyEngine
from pytest_aprt.verdict import Threshold, Verdict, conclude

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENS = (3, 77, 500, 12, 12, 640, 9)
PROCESSORS = {"avx512": ("avx2", "avx512"), "avx2": ("avx2",), "": ()}[PROCESSOR]
"""Whose versions of the compiled functions this machine can run."""

THRESHOLDS = dict.fromkeys(STAGES, Threshold(cosine=0.999, source="default"))


def fixture_pair(family: str = "qwen2", gguf: Path | None = None) -> Pair:
    """Open a fixture pair."""
    folder = FIXTURES / f"tiny-{family}"
    return opened(gguf or folder / "q4_k_m.gguf", folder / "hf")


def opened(gguf: Path, hf: Path) -> Pair:
    """Open a small pair; its few layers are dequantised once for all runs of a test."""
    pair = open_pair(open_headers(str(gguf), str(hf)))
    for weights in (pair.model_weights, pair.oracle_weights):
        weights.layer = cache(weights.layer)
    return pair


def builtin(pair: Pair) -> BuiltinRunner:
    return BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)


def faulty(pair: Pair, fault=None, **ways) -> CheckedEngine:
    """The NumPy engine on the model's weights, with a fault planted."""
    changes = {} if fault is None else {(fault.layer, s): c for s, c in fault.changes.items()}
    engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, changes, **ways)
    return checked(pair, engine)


def checked(pair: Pair, engine) -> CheckedEngine:
    return CheckedEngine(engine, pair.graph, pair.oracle_facts, type(engine).__name__)


def verdict_of(
    pair: Pair,
    engine,
    *prompts: tuple[int, ...],
    strict: bool = False,
    profile: str = "auto",
    stop: Stop | None = None,
) -> Verdict:
    asked = [Prompt(text="", tokens=tokens) for tokens in prompts or (TOKENS,)]
    points = pair.graph.points
    result = measure_pair(pair, engine, asked, points, profile_named(profile), stop=stop)
    facts = fact_rows(pair, max(len(prompt.tokens) for prompt in asked))
    return conclude(pair.graph, points, result, facts, THRESHOLDS, strict=strict)


def written(engine, folder: Path, tokens: tuple[int, ...] = TOKENS) -> Path:
    """Write an engine's run as other tools do, without a manifest."""
    for layer, stages in engine.layers(tokens):
        for name, value in stages.items():
            place = folder / (f"{name}.bin" if layer is None else f"layer-{layer}/{name}.bin")
            write_tensor(place, WHOLE_MODEL if layer is None else layer, np.asarray(value))
    return folder


class Changed:
    """An engine whose captures are changed on their way out: ``change(layer, stages)``."""

    def __init__(self, engine, change) -> None:
        self._engine, self._change = engine, change

    def layers(self, tokens):
        for layer, stages in self._engine.layers(tokens):
            yield layer, self._change(layer, dict(stages))


def origins_of(verdict: Verdict) -> list[str]:
    return [str(judged.point) for judged in verdict.origins]


def settings_on(pair: Pair, model, oracle=None, *, weights: bool = True) -> Settings:
    """The settings of a run on a dump of TOKENS."""
    given = {"aprt_model": str(model), "aprt_oracle": str(oracle or pair.oracle.path)}
    given |= {"aprt_weights": str(pair.model.file.path)} if weights else {}
    return read_settings({**given, "aprt_tokens": [",".join(map(str, TOKENS))]}.get, command="")


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody sees."""
