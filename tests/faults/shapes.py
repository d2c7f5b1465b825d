"""Random models of many shapes: what the three fixtures have in common is no assumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from transformers import PretrainedConfig

from pytest_aprt.testing import write_random_pair

State = dict[str, torch.Tensor]
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A configuration, and what is done to its random weights."""

    config: Callable[[], PretrainedConfig]
    adjust: Callable[[State], None] = lambda state: None


def trained(state: State) -> None:
    """Like trained weights: small embeddings, norms with outliers, large biases of Q and K."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if name == "model.embed_tokens.weight":
            tensor *= 0.02
        elif name.endswith("layernorm.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 0.02)
            tensor[3] = 25.0
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            size = 20.0 if "k_proj" in name else 5.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 6)
        elif name.endswith("down_proj.weight"):
            tensor *= 0.3
            tensor[7] *= 30


def tiny_embedding(state: State) -> None:
    state["model.embed_tokens.weight"] *= 1e-4


def large_ffn(state: State) -> None:
    for name, tensor in state.items():
        if name.endswith("down_proj.weight"):
            tensor *= 50


def of(family: Callable[..., PretrainedConfig], heads: int, kv: int, hidden: int, ffn: int,
       layers: int = 3, **own: Any) -> Callable[[], PretrainedConfig]:  # fmt: skip
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": hidden,
             "intermediate_size": ffn, "num_hidden_layers": layers}  # fmt: skip
    return lambda: family(vocab_size=211, max_position_embeddings=1024, **sizes, **own)


SHAPES = {
    "qwen3-5-heads": Shape(config=of(families.qwen3, 5, 1, 256, 96, head_dim=48)),
    "llama-8-to-1": Shape(config=of(families.llama, 8, 1, 192, 512, layers=9,
                                    rope={**families.LLAMA3, "rope_theta": 500000.0})),
    "qwen2-wide": Shape(config=of(families.qwen2, 3, 3, 96, 2048, layers=2,
                                  tie_word_embeddings=True, rope={"rope_theta": 1000.0})),
    "mistral-window": Shape(config=of(families.mistral, 6, 2, 96, 80, layers=5, sliding_window=8)),
    "qwen2-trained": Shape(config=of(families.qwen2, 4, 2, 256, 768, layers=4), adjust=trained),
    "qwen3-trained": Shape(config=of(families.qwen3, 6, 3, 256, 512, head_dim=64,
                                     tie_word_embeddings=True), adjust=trained),
    "llama-large-theta": Shape(config=of(families.llama, 2, 1, 128, 32, rope={"rope_theta": 1e8},
                                         rms_norm_eps=1e-5), adjust=tiny_embedding),
    "qwen2-yarn": Shape(config=of(families.qwen2, 7, 7, 112, 160,
                                  rope={**families.YARN, "factor": 64.0})),
    "llama-trained": Shape(config=of(families.llama, 8, 4, 512, 1024), adjust=trained),
    "qwen2-window": Shape(config=of(families.qwen2, 4, 1, 64, 80, layers=4, sliding_window=6,
                                    use_sliding_window=True, max_window_layers=1),
                          adjust=large_ffn),
}  # fmt: skip


Files = dict[str, tuple[Path, Path]]
"""The GGUF and the Hugging Face folder of each shape."""


def written_shapes(folder: Path) -> Files:
    """Write a pair of every shape."""
    files = {}
    for name, shape in SHAPES.items():
        place = folder / name
        place.mkdir()
        files[name] = write_random_pair(place, shape.config(), seed=SEED, adjust=shape.adjust)
    return files
