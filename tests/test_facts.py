"""What each side states, how the two are compared, and when a difference matters."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import gguf
import pytest
from transformers import Qwen2Config

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.errors import ArchitectureError, SourceError
from pytest_aprt.facts import FACTS, Facts, RopeScaling, agree
from pytest_aprt.stages import STAGES

QWEN2 = ARCHITECTURES["qwen2"]
TENSORS = {
    "token_embd.weight": SimpleNamespace(shape=(1024, 256)),
    "output.weight": SimpleNamespace(shape=(1024, 256)),
}
METADATA = {
    "qwen2.block_count": 4,
    "qwen2.context_length": 2048,
    "qwen2.embedding_length": 256,
    "qwen2.feed_forward_length": 512,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.rope.freq_base": 1e6,
}
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
ABSENT = object()


def from_gguf(tensors=TENSORS, **changes):
    metadata = METADATA | {f"qwen2.{key}": value for key, value in changes.items()}
    stated = {key: value for key, value in metadata.items() if value is not ABSENT}
    return Facts.from_gguf(stated, tensors, QWEN2)


def from_config(**changes):
    return Facts.from_config(Qwen2Config(**{**CONFIG, **changes}))


# GGUF


def test_facts_of_a_gguf():
    assert from_gguf() == Facts(
        layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocab=1024,
        context=2048, eps=1e-6, rope_theta=1e6, rope_scaling=RopeScaling(), windows=(None,) * 4,
        tied_embeddings=False, activation="silu",
    )  # fmt: skip


def test_both_sides_of_one_model_agree():
    model, oracle = from_gguf(), from_config()
    assert [f.name for f in FACTS.values()
            if not agree(getattr(model, f.field), getattr(oracle, f.field))] == []  # fmt: skip


@pytest.mark.parametrize(
    ("key", "field", "default"),
    [
        ("rope.freq_base", "rope_theta", 10000.0),
        ("attention.head_count_kv", "kv_heads", 4),
        ("attention.key_length", "head_dim", 64),
    ],
)
def test_defaults_are_those_of_llama_cpp(key, field, default):
    assert getattr(from_gguf(**{key: ABSENT}), field) == default


def test_what_the_gguf_states_beats_the_default():
    facts = from_gguf(**{"attention.key_length": 32, "attention.head_count_kv": [2, 2, 2, 2]})
    assert (facts.head_dim, facts.kv_heads) == (32, 2)


def test_without_output_weight_the_embeddings_are_tied():
    assert from_gguf(tensors={"token_embd.weight": TENSORS["token_embd.weight"]}).tied_embeddings


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
@pytest.mark.parametrize(
    "value", [ABSENT, "many", True, [1, 2]], ids=["absent", "text", "bool", "array"]
)
def test_a_key_without_default_must_be_a_number(key, value):
    with pytest.raises(SourceError, match=rf"GGUF metadata qwen2\.{key}: expected a number"):
        from_gguf(**{key: value})


def test_the_embedding_must_be_there():
    with pytest.raises(SourceError, match=r"token_embd\.weight is missing"):
        from_gguf(tensors={})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_count": 0}, "layers is 0: expected at least 1"),
        ({"feed_forward_length": 0}, "intermediate is 0: expected at least 1"),
        ({"attention.head_count_kv": 3}, "4 heads cannot share 3 kv heads: expected a divisor"),
        ({"attention.head_count_kv": 0}, "kv_heads is 0: expected at least 1"),
        ({"attention.key_length": 63}, "head_dim is 63: RoPE needs an even number"),
    ],
)
def test_shapes_that_no_decoder_has(changes, said):
    with pytest.raises(ArchitectureError, match=said):
        from_gguf(**changes)


def test_no_heads_is_no_division_by_zero():
    with pytest.raises(SourceError, match=r"attention\.head_count: expected at least 1"):
        from_gguf(**{"attention.head_count": 0})


# RoPE scaling


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 512},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.5,
             "rope.scaling.original_context_length": 512, "rope.scaling.yarn_beta_fast": 16.0,
             "rope.scaling.yarn_beta_slow": 2.0},
            {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512,
             "beta_fast": 16.0, "beta_slow": 2.0},
        ),
        (  # 0.1 * 0.5 * ln(4) + 1 over 0.1 * ln(4) + 1, in units of the latter
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.attn_factor": 1.0693147180559945 / 1.1386294361119891**2},
            {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0},
        ),
    ],
    ids=["none", "said", "linear1", "linear4", "yarn", "yarn-betas", "yarn-mscale"],
)  # fmt: skip
def test_scaling_is_the_same_fact_on_both_sides(keys, rope):
    model = from_gguf(**keys).rope_scaling
    oracle = from_config(rope_parameters={"rope_theta": 1e6, **rope}).rope_scaling
    assert agree(model, oracle)
    assert model.kind == oracle.kind


def test_scalings_that_differ_do_not_agree():
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    a = from_gguf(**yarn).rope_scaling
    assert not agree(a, RopeScaling())
    assert not agree(a, from_gguf(**yarn | {"rope.scaling.factor": 2.0}).rope_scaling)
    assert not agree(a, from_gguf(**yarn | {"rope.scaling.attn_factor": 2.0}).rope_scaling)
    assert not agree(a, replace(a, kind="linear"))
    rope = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}
    assert agree(a, from_config(rope_parameters=rope).rope_scaling)
    assert not agree(a, from_config(rope_parameters={**rope, "truncate": False}).rope_scaling)


def test_yarn_scales_attention_by_the_paper():
    yarn = from_gguf(**{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}).rope_scaling
    assert yarn.attention_factor == pytest.approx(1.1386294361119891)
    assert (yarn.original_context, yarn.beta_fast, yarn.beta_slow) == (2048, 32.0, 1.0)


def test_an_unknown_scaling_of_the_gguf_is_refused():
    with pytest.raises(ArchitectureError, match=r"is 'longrope': expected none, linear or yarn"):
        from_gguf(**{"rope.scaling.type": "longrope"})


def test_the_older_form_of_the_config_is_read_too():
    old = SimpleNamespace(
        **{**CONFIG, "rope_parameters": None}, rope_theta=5e5, hidden_act="silu",
        rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    facts = Facts.from_config(old)
    assert facts.rope_theta == 5e5
    assert facts.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert facts.head_dim == 64


# Sliding windows


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, (None, None, None, None)),
        ({"attention.sliding_window": 0}, (None, None, None, None)),
        ({"attention.sliding_window": 8}, (8, 8, 8, 8)),
        (
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
            (8, None, 8, None),
        ),
        (
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": 4},
            (8, 8, 8, None),
        ),
        (
            {
                "attention.sliding_window": 8,
                "attention.sliding_window_pattern": [False, False, True, True],
            },
            (None, None, 8, 8),
        ),
    ],
)
def test_windows_of_a_gguf(keys, windows):
    assert from_gguf(**keys).windows == windows


def test_a_pattern_needs_one_entry_per_layer():
    with pytest.raises(SourceError, match="has 2 entries: expected one for each of 4 layers"):
        from_gguf(
            **{"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}
        )


def test_windows_of_a_config():
    assert from_config().windows == (None,) * 4
    sliding = from_config(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert sliding.windows == (None, None, 8, 8)


# Agreement


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1e-6, 9.999999974752427e-07, True),  # as a 4-byte float
        (1e-6, 1e-5, False),
        (1e-6, 1.00001e-6, False),
        (1000000.0, 10000.0, False),
        (4, 4.0, True),
        (4, 5, False),
        (True, True, True),
        ("silu", "gelu", False),
        ((None, 8), (None, 8), True),
        ((None, 8), (8, None), False),
        (RopeScaling(), RopeScaling(), True),
        (RopeScaling(factor=1.0 + 1e-8), RopeScaling(), True),
        (RopeScaling(kind="linear"), RopeScaling(), False),
    ],
)
def test_agree(a, b, expected):
    assert agree(a, b) is expected
    assert agree(b, a) is expected


# What matters


def matters(name, tokens, model=None, oracle=None):
    facts = from_gguf()
    return FACTS[name].matters(
        replace(facts, **(model or {})), replace(facts, **(oracle or {})), tokens
    )


@pytest.mark.parametrize("name", ["norm_eps", "activation"])
def test_some_facts_always_matter(name):
    assert matters(name, 1)


def test_the_base_of_rope_matters_from_the_second_token_on():
    assert not matters("rope_theta", 1)
    assert matters("rope_theta", 2)


@pytest.mark.parametrize(("tokens", "expected"), [(9, False), (10, False), (11, True)])
def test_dynamic_scaling_matters_beyond_the_context(tokens, expected):
    dynamic = from_config(
        max_position_embeddings=10,
        rope_parameters={"rope_theta": 1e6, "rope_type": "dynamic", "factor": 2.0},
    ).rope_scaling
    assert matters("rope_scaling", tokens, oracle={"rope_scaling": dynamic}) is expected
    yarn = RopeScaling(kind="yarn", factor=2.0)
    assert matters("rope_scaling", 1, {"rope_scaling": yarn}, {"rope_scaling": dynamic})
    assert matters("rope_scaling", 1, {"rope_scaling": yarn})


@pytest.mark.parametrize(("tokens", "expected"), [(9, False), (10, False), (11, True)])
def test_context_matters_beyond_the_shorter_one(tokens, expected):
    assert matters("context_length", tokens, {"context": 10}, {"context": 40}) is expected
    assert matters("context_length", tokens, {"context": 40}, {"context": 10}) is expected


@pytest.mark.parametrize(
    ("model", "oracle", "tokens", "expected"),
    [
        ((None, 8), (None, None), 8, False),
        ((None, 8), (None, None), 9, True),
        ((8, 8), (16, 16), 8, False),
        ((8, 8), (16, 16), 9, True),
        ((8, None), (8, None), 100, False),
    ],
)
def test_a_window_matters_once_a_prompt_is_longer(model, oracle, tokens, expected):
    assert matters("sliding_window", tokens, {"windows": model}, {"windows": oracle}) is expected


@pytest.mark.parametrize(
    ("model", "oracle", "expected"), [(True, False, True), (False, True, False)]
)
def test_tied_embeddings_matter_if_the_model_lacks_the_head(model, oracle, expected):
    found = matters("tied_embeddings", 5, {"tied_embeddings": model}, {"tied_embeddings": oracle})
    assert found is expected


# The table


@pytest.mark.parametrize("fact", FACTS.values(), ids=FACTS)
def test_rows_name_a_field_stages_and_a_key_that_gguf_has(fact):
    assert fact.field in Facts.__dataclass_fields__
    assert fact.feeds
    assert set(fact.feeds) <= set(STAGES)
    keys = gguf.constants.Keys
    known = {
        value
        for part in (keys.LLM, keys.Attention, keys.Rope, keys.General)
        for value in vars(part).values()
        if isinstance(value, str)
    }
    here = {fact.key, "{arch}." + fact.key, "{arch}." + fact.key + ".type"}
    assert here & known or fact.key in TENSORS


def test_every_field_of_the_facts_is_judged():
    assert {fact.field for fact in FACTS.values()} == set(Facts.__dataclass_fields__)


@pytest.mark.parametrize("key", ["type", "factor", "original_context_length", "attn_factor",
                                 "yarn_beta_fast", "yarn_beta_slow"])  # fmt: skip
def test_scaling_keys_are_those_of_gguf(key):
    known = vars(gguf.constants.Keys.Rope).values()
    assert "{arch}.rope.scaling." + key in known
