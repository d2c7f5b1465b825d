"""from_module: an engine out of a PyTorch module and a map from its modules to stages."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import harness
import pytest
import torch
from harness import FIXTURES, TOKENS, fixture_pair, origins_of, verdict_of
from transformers import AutoModelForCausalLM

from pytest_aprt import from_module
from pytest_aprt.errors import CaptureError, SettingsError
from pytest_aprt.pair import open_headers, open_pair

LAYER = "model.layers.{layer}"
STAGES = {
    "model.embed_tokens": "embedding",
    f"{LAYER}.input_layernorm": "attn_norm",
    f"{LAYER}.self_attn.q_proj": "qkv_bias",
    f"{LAYER}.self_attn.k_proj": "qkv_bias",
    f"{LAYER}.self_attn.v_proj": "qkv_bias",
    f"{LAYER}.self_attn.o_proj": {"input": "attention", "output": "attn_out"},
    f"{LAYER}.mlp.down_proj": {"input": "ffn_swigl", "output": "ffn_out"},
    LAYER: "post_ffn_residual",
    "model.norm": "final_norm",
    "lm_head": "lm_head",
}
FOLDER = FIXTURES / "tiny-qwen2" / "hf"


@pytest.fixture(scope="module")
def pair():
    found = open_pair(open_headers(str(FOLDER), str(FOLDER)))
    for weights in (found.model_weights, found.oracle_weights):
        weights.layer = cache(weights.layer)
    return found


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")


def run(pair, model, stages=STAGES, **given):
    return verdict_of(pair, harness.checked(pair, from_module(model, stages, **given)))


def test_every_stage_of_the_map_is_judged(pair, model):
    verdict = run(pair, model)
    assert verdict.status == "PARITY"
    shown = {judged.point.stage for judged in verdict.points if judged.status != "missing"}
    named = [shows if isinstance(shows, dict) else {"output": shows} for shows in STAGES.values()]
    assert shown == {stage for shows in named for stage in shows.values()}


def test_projections_side_by_side_are_in_the_order_of_the_map(pair, model):
    q, k = (f"{LAYER}.self_attn.{p}_proj" for p in "qk")
    swapped = {name: STAGES[name] for name in (k, q, *(n for n in STAGES if n not in (q, k)))}
    assert "L00-qkv_bias" in origins_of(run(pair, model, swapped))


def test_a_fault_in_a_module_is_found(pair, model):
    model.model.layers[1].mlp.down_proj.weight.data *= 1.01
    assert origins_of(run(pair, model)) == ["L01-ffn_out"]


def test_the_dtype_is_the_arithmetic(pair):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="bfloat16")
    engine = from_module(model, STAGES)
    assert engine.arithmetic == "bfloat16"
    assert from_module(model, STAGES, arithmetic="q8").arithmetic == "q8"
    verdict = verdict_of(pair, harness.checked(pair, engine), profile=engine.arithmetic)
    assert verdict.status == "PARITY"


def test_another_way_to_call_the_module(pair, model):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner(input_ids=batch["ids"][None])

    stages = {f"inner.{name}": shows for name, shows in STAGES.items()}
    assert (
        run(pair, Wrapped(), stages, forward=lambda m, ids: m({"ids": ids[0]})).status == "PARITY"
    )


def test_hooks_are_gone_after_a_run(model):
    list(from_module(model, STAGES).layers(TOKENS))
    assert not any(module._forward_hooks for module in model.modules())


def refusal(model, stages):
    with pytest.raises(SettingsError) as error:
        from_module(model, stages)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"model.layers.{layer}.attn": "attn_out"}, "no module model.layers.0.attn: expected a na"),
        (
            {"model.final": "final_norm"},
            "no module model.final: expected a name that named",
        ),
        (
            {LAYER: "layer_out"},
            "stage 'layer_out' is unknown: expected 'all' or one of emb",
        ),
        ({LAYER: {"outputs": "ffn_out"}}, "has no 'outputs': expected input or output, each with"),
        ({"model.norm": "ffn_norm"}, "expected {layer} in the name, as in model.layers.{layer}.ml"),
        ({LAYER: "final_norm"}, "expected a name without {layer}, since the model has but one fin"),
        (
            {LAYER: "embedding"},
            "expected a name without {layer}, since the model has but one emb",
        ),
    ],
)
def test_a_map_that_does_not_fit(model, stages, said):
    assert said in refusal(model, stages)


def test_close_names_are_shown(model):
    assert "such as model.layers.0.self_attn" in refusal(model, {f"{LAYER}.self_atn": "attn_out"})


def broken(model, stages):
    with pytest.raises(CaptureError) as error:
        list(from_module(model, stages).layers(TOKENS))
    return str(error.value)


def test_a_module_that_does_not_run(model):
    model.model.layers[1].mlp.act_fn.forward = None
    model.model.layers[1].mlp.forward = lambda x: x
    assert broken(model, {f"{LAYER}.mlp.act_fn": "ffn_silu"}).startswith(
        "module model.layers.1.mlp.act_fn did not run, so that L01-ffn_silu was not seen: "
    )


def test_a_module_that_runs_twice(model):
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: layer.mlp(output))
    assert "mlp ran twice in one forward pass" in broken(model, {f"{LAYER}.mlp": "ffn_out"})


def test_what_is_no_tensor(model):
    assert broken(model, {"lm_head": "lm_head", "model": {"output": "final_norm"}}).startswith(
        "the output of module model is BaseModelOutputWithPast: expected a tensor, for final_norm"
    )


def test_a_wrong_size_is_told(model):
    pair = fixture_pair()
    verdict = run(pair, model, {f"{LAYER}.mlp.up_proj": "ffn_norm"})
    assert verdict.status == "INCONCLUSIVE"
    assert "L00-ffn_norm has shape (1, 7, 512), expected (7, 256) for 7 tokens" in verdict.summary


def test_importing_the_plugin_loads_no_torch():
    code = "import sys, pytest_aprt.plugin, pytest_aprt; assert callable(pytest_aprt.from_module); "
    code += "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
