"""Proves the rows of the table: our forward and the replay against transformers, and streaming."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import CONFIGURATIONS, NEW_CONFIGURATIONS, NEW_ROWS, llama
from transformers import AutoModelForCausalLM

from pytest_aprt.architectures import ARCHITECTURES, architecture_of
from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.capture import CheckedEngine
from pytest_aprt.errors import ArchitectureError
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.measure import measure_pair
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.readings import Prompt
from pytest_aprt.rungs.config import fact_rows
from pytest_aprt.testing import NumpyEngine, write_random_pair

TOKENS = (5, 9, 3, 3, 77, 12, 50, 1, 2, 3, 9, 90, 41)


MADE = {**CONFIGURATIONS, **NEW_CONFIGURATIONS}


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """A random pair of one configuration, opened; a new family comes with its row."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        if request.param in NEW_ROWS:
            patch.setitem(ARCHITECTURES, request.param, NEW_ROWS[request.param])
        gguf, hf = write_random_pair(folder, MADE[request.param](), seed=3)
        pair = open_pair(open_headers(str(gguf), str(hf)))
    return SimpleNamespace(name=request.param, pair=pair, hf=hf)


def measured(pair, engine):
    prompt = Prompt(text="", tokens=TOKENS)
    return measure_pair(pair, engine, [prompt], pair.graph.points, PROFILES["float32"])


def test_every_stage_of_our_forward_is_that_of_transformers(made):
    pair = made.pair
    engine = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
    result = measured(pair, engine)
    assert {e.point for e in result.errors} == set(pair.graph.points)
    assert max(e.total.rel_l2 for e in result.errors) < 1e-6
    assert not any(e.total.non_finite_a for e in result.errors)


def test_an_independent_engine_has_no_local_error(made):
    pair = made.pair
    engine = NumpyEngine(pair.model_weights, pair.model_facts, pair.architecture)
    result = measured(pair, CheckedEngine(engine, pair.graph, pair.oracle_facts, "numpy"))
    assert [test for test in result.self_tests if not test.passed] == []
    assert max(e.total.rel_l2 for e in result.errors) < 1e-6
    # threefold below the tolerance; the most seen is 0.23, with NumPy 1.26
    assert max(e.worst.excess for e in result.errors) < 0.3


def test_both_sides_state_the_same_facts(made):
    assert [row for row in fact_rows(made.pair, 1000) if not row.agree] == []


def test_the_streamed_oracle_is_bit_identical_to_from_pretrained(made):
    runner = TransformersRunner(made.pair.config, made.pair.oracle_weights)
    layers = list(runner.layers(TOKENS))
    whole = AutoModelForCausalLM.from_pretrained(
        made.hf, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        expected = whole(
            torch.tensor([TOKENS]),
            output_hidden_states=True,
            output_attentions=True,
        )
    states = [layer.stages["post_ffn_residual"] for layer in layers[:-1]]
    for state, hidden in zip(states[:-1], expected.hidden_states[1:-1], strict=True):
        assert torch.equal(state, hidden[0])
    for layer, attention in zip(layers[:-1], expected.attentions, strict=True):
        assert torch.equal(layer.stages["attn_softmax"], attention[0])
    assert torch.equal(layers[-1].stages["final_norm"], expected.hidden_states[-1][0])
    assert torch.equal(layers[-1].stages["lm_head"], expected.logits[0, -1])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (llama(attention_bias=True), "self_attn.k_proj.bias"),
        (llama(mlp_bias=True), "mlp.down_proj.bias"),
    ],
)
def test_a_variant_with_more_tensors_than_its_row_is_refused(tmp_path, config, said):
    biases = {
        "self_attn.q_proj.bias": "attn_q.bias",
        "self_attn.k_proj.bias": "attn_k.bias",
        "self_attn.v_proj.bias": "attn_v.bias",
        "self_attn.o_proj.bias": "attn_output.bias",
        "mlp.gate_proj.bias": "ffn_gate.bias",
        "mlp.up_proj.bias": "ffn_up.bias",
        "mlp.down_proj.bias": "ffn_down.bias",
    }
    plain = ARCHITECTURES["llama"]
    wider = replace(plain, layer_tensors={**plain.layer_tensors, **biases})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "llama", wider)
        gguf, hf = write_random_pair(tmp_path, config)
    with pytest.raises(ArchitectureError, match=f"its layers hold .*{said}.* not supported"):
        open_headers(str(gguf), str(hf))


def test_a_new_family_is_none_that_the_table_has():
    assert not ARCHITECTURES.keys() & NEW_ROWS.keys()


def test_a_window_hides_what_lies_before_it():
    assert CONFIGURATIONS["qwen2-window"]().layer_types.count("sliding_attention") == 2


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ArchitectureError, match=r"'rwkv6' is unknown: expected one of qwen2"):
        architecture_of("rwkv6", "qwen2")


def test_another_family_is_refused():
    with pytest.raises(ArchitectureError, match="different families"):
        architecture_of("qwen2", "llama")


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_rows_name_their_source(row):
    assert row.source
    assert len(set(row.layer_tensors.values())) == len(row.layer_tensors)
