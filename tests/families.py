"""Configurations of every supported family, random and small, for the tests of the table's rows."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from transformers import (
    Ernie4_5Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
)

from pytest_aprt.architectures import ARCHITECTURES, Architecture

# transformers looks modules up by name, and pytester forgets what a run in this process imports.
for known in (Ernie4_5Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config,
              SeedOssConfig):  # fmt: skip
    import_module(known.__module__.replace("configuration_", "modeling_"))

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 56,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def of(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    rope = {"rope_theta": 1e6, "rope_type": "default", **changes.pop("rope", {})}
    return kind(**{**BASE, "rope_parameters": rope, **changes})


def qwen2(**changes: Any) -> PretrainedConfig:
    return of(Qwen2Config, **changes)


def llama(**changes: Any) -> PretrainedConfig:
    return of(LlamaConfig, **changes)


def mistral(**changes: Any) -> PretrainedConfig:
    return of(MistralConfig, **{"sliding_window": None, **changes})


def qwen3(**changes: Any) -> PretrainedConfig:
    return of(Qwen3Config, **{"head_dim": 24, **changes})


def heads(query: int, kv: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "hidden_size": 8 * query}


CONFIGURATIONS = {
    "qwen2-gqa1": lambda: qwen2(**heads(4, 4)),
    "qwen2-gqa2": lambda: qwen2(**heads(4, 2)),
    "qwen2-gqa4": lambda: qwen2(**heads(8, 2)),
    "qwen2-gqa7": lambda: qwen2(**heads(14, 2)),
    "qwen2-head_dim": lambda: qwen2(head_dim=24),
    "qwen2-tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2-window": lambda: qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-theta": lambda: qwen2(rope={"rope_theta": 10000.0}, rms_norm_eps=1e-5),
    "qwen2-linear": lambda: qwen2(rope={"rope_type": "linear", "factor": 4.0}),
    "qwen2-yarn": lambda: qwen2(rope=YARN),
    "qwen2-yarn-stated": lambda: qwen2(
        rope={**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    ),
    "qwen2-yarn-mscale": lambda: qwen2(rope={**YARN, "mscale": 0.8, "mscale_all_dim": 1.0}),
    "qwen2-window-all": lambda: qwen2(
        use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    "qwen2-window-off": lambda: qwen2(
        use_sliding_window=False, sliding_window=4, max_window_layers=0
    ),
    "qwen2-vocabulary": lambda: qwen2(vocab_size=151),
    "llama-gqa1": lambda: llama(**heads(4, 4)),
    "llama-gqa4": lambda: llama(**heads(8, 2)),
    "llama-head_dim": lambda: llama(head_dim=24),
    "llama-llama3-tied": lambda: llama(
        tie_word_embeddings=True, head_dim=24, rope={**LLAMA3, "factor": 32.0}
    ),
    "llama-yarn": lambda: llama(rope=YARN),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-linear": lambda: llama(rope={"rope_type": "linear", "factor": 4.0}),
    "llama-llama3": lambda: llama(rope={**LLAMA3, "rope_theta": 500000.0}, rms_norm_eps=1e-5),
    "mistral-full": lambda: mistral(**heads(8, 2)),
    "mistral-window": lambda: mistral(sliding_window=5),
    "mistral-window1": lambda: mistral(sliding_window=1, tie_word_embeddings=True),
    "mistral-window12": lambda: mistral(sliding_window=12, head_dim=20),
    "qwen3-gqa1": lambda: qwen3(**heads(4, 4)),
    "qwen3-gqa7": lambda: qwen3(**heads(14, 2)),
    "qwen3-head_dim": lambda: qwen3(head_dim=48),
    "qwen3-layer-types": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3-tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-window": lambda: qwen3(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3-yarn": lambda: qwen3(rope=YARN),
}
"""One row a behaviour that a family's row states, or that its files may state."""


def row(like: str, name: str, **changes: Any) -> Architecture:
    plain = {"parameter_tensors": (), "permuted_qk": False}
    return replace(
        ARCHITECTURES[like],
        name=name,
        model_types=(name,),
        **{**plain, "source": "here", **changes},
    )


NEW_ROWS = {
    "ernie4_5": row("llama", "ernie4_5", rotated_pairs="adjacent"),
    "gemma": row(
        "llama", "gemma", activation="gelu_pytorch_tanh", norm_offset=1.0, scaled_embedding=True
    ),
    "seed_oss": row(
        "qwen2",
        "seed_oss",
        layer_tensors={
            **ARCHITECTURES["qwen2"].layer_tensors,
            "post_attention_layernorm.weight": "post_attention_norm.weight",
        },
    ),
}
"""Families that the table does not have: what is needed for one is its row, and nothing else."""

NEW_CONFIGURATIONS = {
    "ernie4_5": lambda: of(Ernie4_5Config),
    "gemma": lambda: of(GemmaConfig, head_dim=24, tie_word_embeddings=True),
    "seed_oss": lambda: of(SeedOssConfig, head_dim=24),
}
