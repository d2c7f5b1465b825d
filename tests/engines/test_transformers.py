"""transformers itself as the engine under test: other dtypes, attentions, weights, and faults."""

from __future__ import annotations

import importlib.util
import json

import families
import pytest
import torch
from harness import FIXTURES, TOKENS, origins_of
from live import (
    FAMILIES,
    PROMPTS,
    UNSEEN,
    Live,
    copy_of,
    folder_of,
    fused,
    missing_in,
    quantised,
    worst_of,
)

from pytest_aprt.engines.transformers import sees_gguf
from pytest_aprt.errors import AprtError, ArchitectureError, EngineError, SettingsError
from pytest_aprt.pair import open_headers
from pytest_aprt.rungs.decode import decode_rows
from pytest_aprt.rungs.path import path_rows
from pytest_aprt.rungs.tokens import token_rows
from pytest_aprt.testing import write_random_pair
from pytest_aprt.weights import GgufWeights

DTYPES = ("float32", "bfloat16", "float16")
needs_gguf = pytest.mark.skipif(
    not sees_gguf(), reason="this transformers does not see the gguf package on this Python"
)


# Healthy


@pytest.mark.parametrize("attention", UNSEEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_raises_no_alarm(family, dtype, attention):
    """At 1, 7 and 100 tokens; what rounding leaves is far from the tolerance."""
    live = Live(folder_of(family), dtype=dtype, attn_implementation=attention)
    assert live.engine.arithmetic == dtype
    result = live.measured()
    assert [t for t in result.self_tests if not t.passed] == []
    assert missing_in(result) == UNSEEN[attention] | fused(family)
    assert worst_of(result).worst.excess < 0.75, worst_of(result).point
    assert live.verdict(result).status == "PARITY"
    assert [t.name for t in result.tensors if t.reason] == []


def test_the_dtype_of_the_files_is_that_of_the_model():
    live = Live(folder_of("qwen2"))
    assert live.raw.details["dtype"] == live.engine.arithmetic == "bfloat16"
    assert live.raw.details["traced attention"] == "eager"
    assert live.raw.details["production attention"] == "sdpa"


@pytest.mark.parametrize("attention", UNSEEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_being_observed_changes_no_bit(family, attention):
    live = Live(folder_of(family), attn_implementation=attention)
    *_, last = live.raw.layers(PROMPTS[1])
    with torch.no_grad():
        plain = live.raw.model(torch.tensor([PROMPTS[1]])).logits[0, -1]
    assert torch.equal(last.stages["lm_head"], plain.float())


@pytest.mark.parametrize("name", ["qwen2-window", "llama-llama3", "mistral-window", "qwen3-yarn"])
def test_windows_and_scaled_rotations(tmp_path, name):
    _, folder = write_random_pair(tmp_path, families.CONFIGURATIONS[name]())
    live = Live(folder)
    result = live.measured(tuple(range(1, 18)))
    assert live.verdict(result).status == "PARITY"
    rows = decode_rows(live.pair, live.engine, result.finals, 3)
    assert [row.name for row in rows if row.broken] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_agree_with_the_prefill(family, dtype):
    live = Live(folder_of(family), dtype=dtype)
    rows = decode_rows(live.pair, live.engine, live.measured(TOKENS).finals, 4)
    assert [row.reason for row in rows if row.broken] == []
    assert [row.name for row in rows] == ["step1", "step2", "step3", "step4", "growth", "text"]
    steps = list(live.raw.decode(TOKENS, [5, 6]))
    assert [[layer for layer, _ in step] for step in steps] == [[0, 1, 2, 3, None]] * 2
    stages = steps[1][0].stages
    assert stages["k_post_rope"].shape == (1, live.pair.oracle_facts.qkv_sizes[1])
    assert stages["attn_softmax"].shape == (4, 1, len(TOKENS) + 2)


def test_generation_is_the_production_path():
    live = Live(folder_of("llama"))
    (row,) = path_rows(live.pair, live.engine, live.measured(PROMPTS[1]).finals, 0.999)
    changes = row.figures["changes"]
    assert row.status == "pass"
    assert set(changes) == {"the head on the last position alone", "sdpa attention"}
    assert 0 < changes["sdpa attention"] < 0.01
    asked = Live(folder_of("llama"), attn_implementation="sdpa")
    assert [name for name, _ in asked.raw.variants(TOKENS)] == [
        "the head on the last position alone"
    ]


def test_a_run_that_is_left_early_leaves_no_hook():
    live = Live(folder_of("qwen2"))
    before = live.raw.model.config._attn_implementation
    layers = live.raw.layers(TOKENS)
    next(layers)
    layers.close()
    assert live.raw.model.config._attn_implementation == before
    modules = [m for m in live.raw.model.modules() if m._forward_hooks]
    assert [type(m).__name__ for m in modules] == []
    assert torch.is_grad_enabled()


def gguf_of(family, **options):
    return Live(FIXTURES / f"tiny-{family}" / "q4_k_m.gguf", folder_of(family), **options)


@needs_gguf
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_gguf_as_transformers_loads_it(family, dtype):
    live = gguf_of(family, dtype=dtype)
    result = live.measured()
    assert isinstance(live.pair.model_weights, GgufWeights)
    assert live.verdict(result).status == "QUANTISATION_NOISE"
    assert worst_of(result).worst.excess < 0.75, worst_of(result).point


@needs_gguf
def test_the_rope_divisors_that_transformers_leaves_out_of_a_gguf():
    """A fault that nobody planted: up to 5.23 its loader does not read ``rope_freqs.weight``."""
    live = gguf_of("llama", dtype="float32")
    verdict = live.verdict(live.measured(PROMPTS[1]))
    assert origins_of(verdict) == [
        f"L0{layer}-{part}_post_rope" for layer in range(4) for part in "qk"
    ]


@needs_gguf
def test_loading_a_gguf_shows_nothing(capfd):
    gguf_of("qwen2", dtype="float32")
    assert capfd.readouterr() == ("", "")


def test_a_gguf_needs_accelerate(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="needs accelerate to load a GGUF, which is not insta"):
        Live(FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", folder_of("qwen2"))


def test_a_gguf_package_that_transformers_does_not_see(monkeypatch):
    def unseen():
        raise ValueError("Invalid version: 'N/A'")  # as transformers 5.0 does on Python 3.10

    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", unseen)
    with pytest.raises(SettingsError, match="does not see the gguf package on Python 3"):
        Live(FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", folder_of("qwen2"))


# Other weights


def test_a_model_that_was_trained_further(tmp_path):
    def trained(tensors):
        torch.manual_seed(0)
        for name, tensor in tensors.items():
            if "_proj.weight" in name:
                tensor += 0.05 * tensor.float().std() * torch.randn(tensor.shape)

    base = folder_of("qwen2")
    live = Live(copy_of(base, tmp_path / "tuned", trained), base)
    result = live.measured(PROMPTS[1])
    verdict = live.verdict(result)
    assert (verdict.status, verdict.rung) == ("QUANTISATION_NOISE", None)
    others = {t.name for t in result.tensors if t.differs}
    assert len(others) == 4 * 7
    assert not any(t.broken for t in result.tensors)
    (deep,) = (e for e in result.errors if str(e.point) == "L03-ffn_out")
    assert deep.total.rel_l2 > 0.03 and deep.weights.rel_l2 > 0.03
    assert deep.engine.rel_l2 < 0.02 and deep.worst.excess < 0.75


def test_swapped_tensors_are_no_training(tmp_path):
    def swapped(tensors):
        a, b = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    base = folder_of("qwen2")
    live = Live(copy_of(base, tmp_path / "swapped", swapped), base)
    verdict = live.verdict(live.measured(PROMPTS[1]))
    assert (verdict.status, verdict.rung) == ("DIVERGED", "weights")
    assert "model.layers.0.mlp.up_proj.weight is swapped with model.layers.1." in verdict.summary


def test_another_configuration_breaks_its_fact(tmp_path):
    base = folder_of("qwen2")
    tuned = copy_of(base, tmp_path / "long", lambda tensors: None)
    config = json.loads((tuned / "config.json").read_text())
    config["rope_theta"] = 5e6
    (tuned / "config.json").write_text(json.dumps(config))
    live = Live(tuned, base)
    verdict = live.verdict(live.measured(PROMPTS[1]))
    assert (verdict.status, verdict.rung) == ("DIVERGED", "config")
    assert "rope_theta is 5000000.0 in the model" in verdict.summary


def test_both_tokenizers_are_asked(tmp_path):
    base = folder_of("qwen2")
    rows = {row.name: row for row in token_rows(Live(base).pair, ["What is 2+2?"])}
    assert {row.status for row in rows.values()} == {"pass", "unavailable"}
    assert rows["prose"].status == rows["user"].status == rows["vocabulary"].status == "pass"
    other = copy_of(base, tmp_path / "other", lambda tensors: None)
    text = (other / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = {row.name: row for row in token_rows(Live(other, base).pair, [])}
    assert rows["prose"].broken
    assert "differs at token" in rows["prose"].reason


# Quantised modules


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_modules_are_asked_for_their_weights(family):
    live = quantised(family)
    result = live.measured(*PROMPTS[1:])
    assert [t for t in result.self_tests if not t.passed] == []
    linear = live.raw.model.model.layers[1].mlp.down_proj
    asked = live.pair.model_weights.layer(1)["mlp.down_proj.weight"]
    kept = (linear.packed.float() * linear.scale).T.bfloat16().float()
    assert torch.equal(asked, kept)
    kinds = {t.suffix.rpartition(".")[0]: t.type for t in result.tensors}
    assert kinds["mlp.down_proj"] == "8-bit" and kinds["input_layernorm"] == "BF16"
    assert [t.name for t in result.tensors if t.reason] == []
    verdict = live.verdict(result)
    assert verdict.status in ("PARITY", "QUANTISATION_NOISE"), verdict.summary
    assert worst_of(result).worst.excess < 0.75, worst_of(result).point


def test_a_quantised_product_that_errs_on_some_inputs():
    live = quantised("llama")
    live.raw.model.model.layers[2].mlp.up_proj.fault = 1.05
    verdict = live.verdict(live.measured(PROMPTS[1]))
    assert origins_of(verdict) == ["L02-ffn_up"]


# Faults


def test_a_wrong_rope_base():
    live = Live(folder_of("qwen2"), dtype="float32")
    rotary = live.raw.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq**0.9
    verdict = live.verdict(live.measured(PROMPTS[1]))
    assert origins_of(verdict) == [
        f"L0{layer}-{part}_post_rope" for layer in range(4) for part in "qk"
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scaling_of_scores_in_one_layer(dtype):
    live = Live(folder_of("llama"), dtype=dtype)
    live.raw.model.model.layers[2].self_attn.scaling *= 1.1
    assert origins_of(live.verdict(live.measured(PROMPTS[1]))) == ["L02-attn_scores"]


def test_a_fault_in_an_attention_that_shows_no_scores_has_a_bracket():
    live = Live(folder_of("llama"), dtype="float32", attn_implementation="sdpa")
    live.raw.model.model.layers[2].self_attn.scaling *= 1.1
    result = live.measured(PROMPTS[1])
    assert origins_of(live.verdict(result)) == ["L02-attention"]
    (origin,) = (e for e in result.errors if str(e.point) == "L02-attention")
    assert [str(p) for p in origin.bracket] == ["L02-attn_scores", "L02-attn_softmax"]


def test_an_eps_of_one_norm():
    live = Live(folder_of("qwen3"), dtype="float32")
    live.raw.model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-2
    assert origins_of(live.verdict(live.measured(PROMPTS[1]))) == ["L01-ffn_norm"]


def test_a_cache_that_forgets_is_found_by_decoding(monkeypatch):
    from transformers import DynamicCache

    live = Live(folder_of("llama"), dtype="float32")
    update = DynamicCache.update

    def forgetting(self, key, value, layer, *rest, **given):
        keys, values = update(self, key, value, layer, *rest, **given)
        return (keys.roll(1, 2), values) if layer == 1 and key.shape[2] == 1 else (keys, values)

    result = live.measured(TOKENS)
    monkeypatch.setattr(DynamicCache, "update", forgetting)
    rows = {row.name: row for row in decode_rows(live.pair, live.engine, result.finals, 2)}
    assert rows["step1"].broken
    assert "first at L01-k_post_rope" in rows["step1"].reason


# What cannot be run


def failure(kind, *args, **options):
    with pytest.raises(kind) as error:
        Live(*args, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_an_option_that_transformers_does_not_know():
    text = failure(EngineError, folder_of("qwen2"), dtyp="float32")
    assert "transformers does not load " in text and "'dtyp'" in text


@needs_gguf
def test_a_dtype_that_torch_does_not_have():
    text = failure(EngineError, folder_of("qwen2"), dtype="float17")
    assert "transformers does not load " in text and "float17" in text


def test_an_attention_that_is_not_there():
    text = failure(EngineError, folder_of("qwen2"), attn_implementation="flash_attention_2")
    assert "transformers does not load " in text


@pytest.mark.parametrize("device", ["cuda:99", "warp", "xla", "hpu"])
def test_a_device_that_is_not_there(device):
    text = failure(SettingsError, folder_of("qwen2"), device=device)
    assert text.startswith(f"--aprt-device={device}: torch ") and "here are cpu" in text


def test_weights_that_are_missing(tmp_path):
    def lose(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]

    folder = copy_of(folder_of("qwen2"), tmp_path / "short", lose)
    text = failure(AprtError, folder, folder_of("qwen2"))
    assert "tensor model.layers.2.mlp.up_proj.weight is missing: expected in every qwen2" in text


def test_a_family_that_is_not_in_the_table(tmp_path):
    folder = copy_of(folder_of("qwen2"), tmp_path / "gpt", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="model_type 'gpt2', which is unknown: expected "):
        open_headers(str(folder), str(folder_of("qwen2")))


def test_what_fails_while_it_runs_is_one_line():
    live = Live(folder_of("qwen2"))
    live.raw.model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(EngineError, match=r"^transformers failed on cpu: RuntimeError: .*$"):
        live.measured(PROMPTS[1])
