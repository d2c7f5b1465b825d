"""Configurations of every supported family, random and small, for the tests of the table's rows."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config

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


def qwen2(**changes: Any) -> PretrainedConfig:
    theta = {"rope_theta": 1e6}
    rope = {**theta, "rope_type": "default", **changes.pop("rope", {})}
    return Qwen2Config(**{**BASE, "rope_parameters": rope, **changes})


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
    "qwen2-vocabulary": lambda: qwen2(vocab_size=151),
}
"""One row a behaviour that a family's row states, or that its files may state."""
