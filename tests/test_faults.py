"""The instrument itself: every planted fault is found where it was born; clean runs are silent."""

from __future__ import annotations

import numpy as np
import pytest
from faults.corpus import FAULTS, Fault
from faults.engines import ARITHMETICS, bfloat16, q8_k
from faults.score import (
    RIGHT,
    broken_cases,
    fault_cases,
    sample,
    shaped_cases,
    streamed_cases,
)
from faults.shapes import written_shapes
from faults.variants import ENGINES, SHAPED_FAULTS
from harness import TOKENS, builtin, faulty, fixture_pair, origins_of, verdict_of
from transformers import Qwen2Config

from pytest_aprt.capture import CheckedEngine
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.stages import Point
from pytest_aprt.testing import NumpyEngine, write_random_pair


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


SAMPLE = sample([*fault_cases(), *streamed_cases(), *broken_cases()])


@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: f"{c.what}-{c.family}-{c.arithmetic}")
def test_a_case_of_the_corpus(case):
    """Each fault and each broken capture once; ``tests/faults/score.py`` runs them all."""
    row = case()
    assert row.outcome in RIGHT, row


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    cases = sample([*shaped_cases(written_shapes(tmp_path_factory.mktemp("shapes")))])
    return {case.what: case for case in cases}


@pytest.mark.parametrize("name", [*(fault.name for fault in SHAPED_FAULTS), *ENGINES])
def test_a_fault_or_a_healthy_engine_on_another_shape(shaped, name):
    row = shaped[name]()
    assert row.outcome in RIGHT, row


def test_fault_names_are_unique():
    names = {fault.name for fault in (*FAULTS, *SHAPED_FAULTS)}
    assert len(names) == len(FAULTS) + len(SHAPED_FAULTS) >= 120


@pytest.mark.parametrize("length", [1, 2, 7, 64, 512])
def test_clean_engines_raise_no_alarm(pair, length):
    tokens = tuple(np.random.default_rng(length).integers(0, 1000, length).tolist())
    for engine in (builtin(pair), faulty(pair)):
        verdict = verdict_of(pair, engine, tokens)
        assert verdict.status in ("QUANTISATION_NOISE", "PARITY")
        assert all(judged.status in ("pass", "noise") for judged in verdict.points)
        excess = [judged.errors.worst.excess for judged in verdict.points]
        assert max(excess) < 0.3


@pytest.mark.parametrize("name", [name for name in ARITHMETICS if name != "float32"])
def test_other_arithmetics_raise_no_alarm(pair, name):
    verdict = verdict_of(pair, faulty(pair, **ARITHMETICS[name]))
    assert origins_of(verdict) == []
    assert max(judged.errors.worst.excess for judged in verdict.points) < 0.6


def test_one_layer_in_another_arithmetic_is_a_fault(pair):
    """The same rounding in every layer is an arithmetic; in one alone it is a fault."""

    def rounded(value, work):
        return q8_k(work.stages["ffn_swigl"]) @ work.weights["mlp.down_proj.weight"].T

    fault = Fault(name="one-layer-in-q8_k", like="", changes={"ffn_out": rounded}, layer=1)
    assert origins_of(verdict_of(pair, faulty(pair, fault))) == ["L01-ffn_out"]
    fault = Fault(name="one-layer-kept-in-bfloat16", like="", changes={
        "ffn_norm": lambda value, work: bfloat16(value)}, layer=1)  # fmt: skip
    assert origins_of(verdict_of(pair, faulty(pair, fault))) == ["L01-ffn_norm"]


def test_an_error_behind_an_attention_sink_is_found(tmp_path):
    """Token 0 at 1000 times the norm hides 3 % on all others from whole-tensor numbers."""

    def sink(state):
        state["model.embed_tokens.weight"][0] *= 3000

    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    gguf, hf = write_random_pair(tmp_path, config, adjust=sink)
    pair = open_pair(open_headers(str(gguf), str(hf)))
    tokens = (0, 5, 9, 33, 21, 7)
    assert origins_of(verdict_of(pair, faulty(pair), tokens)) == []

    def change(value, work):
        value[1:] *= 1.03
        return value

    faults = {(1, "post_attn_residual"): change}
    engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, faults)
    checked = CheckedEngine(engine, pair.graph, pair.oracle_facts, "numpy")
    verdict = verdict_of(pair, checked, tokens)
    assert origins_of(verdict) == ["L01-post_attn_residual"]
    local = verdict.origins[0].errors.local
    assert local.rel_l2 < 1e-4 and local.cosine > 1 - 1e-8


def test_cosine_alone_would_have_missed_them(pair):
    """Faults that leave the cosine at 1 are found by the size of the error."""
    for name in ("scale-missing", "embedding-scaled", "final-norm-weight"):
        fault = next(f for f in FAULTS if f.name == name)
        (origin,) = verdict_of(pair, faulty(pair, fault)).origins
        assert origin.errors.local.cosine > 1 - 1e-9
        assert "length is not" in origin.hint


def test_a_missing_stage_gives_a_bracket(pair):
    """A fault in a stage that the engine does not expose is born in the bracket that spans it."""
    fault = next(f for f in FAULTS if f.name == "rope-theta-10k")
    engine = faulty(pair, fault)

    class Hiding:
        def layers(self, tokens):
            for layer, stages in engine.layers(tokens):
                hidden = ("q_post_rope", "k_post_rope", "attn_scores")
                yield layer, {n: v for n, v in stages.items() if layer != 2 or n not in hidden}

    verdict = verdict_of(pair, CheckedEngine(Hiding(), pair.graph, pair.oracle_facts, "hiding"))
    assert origins_of(verdict) == ["L02-attn_softmax"]
    assert [str(p) for p in verdict.origins[0].errors.bracket] == [
        "L02-q_post_rope",
        "L02-k_post_rope",
        "L02-attn_scores",
    ]
    by_name = {str(judged.point): judged.status for judged in verdict.points}
    assert by_name["L02-q_post_rope"] == "missing"


def test_an_engine_that_shows_layer_outputs_only_is_judged_by_whole_layers(pair):
    fault = next(f for f in FAULTS if f.name == "gelu-for-silu")
    engine = faulty(pair, fault)

    class Outputs:
        def layers(self, tokens):
            for layer, stages in engine.layers(tokens):
                yield (
                    layer,
                    {n: v for n, v in stages.items() if n in ("post_ffn_residual", "lm_head")},
                )

    verdict = verdict_of(pair, CheckedEngine(Outputs(), pair.graph, pair.oracle_facts, "outputs"))
    assert origins_of(verdict) == ["L02-post_ffn_residual"]
    assert verdict.origins[0].errors.bracket[0] == Point(2, "attn_norm")


def test_several_prompts_give_the_worst(pair):
    def only_at_ten_tokens(value, work):
        return value * 1.01 if len(value) == 10 else value

    engine = NumpyEngine(
        pair.model_weights,
        pair.oracle_facts,
        pair.architecture,
        {(1, "ffn_up"): only_at_ten_tokens},
    )
    checked = CheckedEngine(engine, pair.graph, pair.oracle_facts, "numpy")
    verdict = verdict_of(pair, checked, TOKENS, tuple(range(10, 20)))
    assert origins_of(verdict) == ["L01-ffn_up"]
    assert verdict.origins[0].errors.prompt == 1
