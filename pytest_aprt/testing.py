"""For tests: tiny random pairs on disk, and a NumPy engine in which faults can be planted.

The engine is a second forward pass, written apart from ``forward.py`` and from transformers. A
*fault* replaces one stage's value while the engine runs, so that everything downstream follows
from it, as it would in a broken engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.architectures import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROPE_DIVISORS,
    Architecture,
    architecture_of,
)
from pytest_aprt.facts import Facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pytest_aprt.weights import WeightSource

Array = NDArray[np.float32]


@dataclass
class Workings:
    """What a fault may look at: the layer so far, its input, its weights, and the facts.

    ``stages`` holds this layer's stages up to the one in question; ``x`` is the layer's input
    (T, H); ``weights`` are those of the layer by their Hugging Face names within it.
    """

    layer: int | None
    stages: dict[str, Array]
    x: Array
    weights: Mapping[str, Array]
    facts: Facts
    architecture: Architecture
    source: WeightSource

    @property
    def embedding_scale(self) -> float:
        """The factor on the token embedding."""
        return self.architecture.embedding_scale(self.facts.hidden)

    def qkv(self) -> tuple[Array, Array, Array]:
        """Return Q, K and V before RoPE (and before QK-norm): (T, heads, D) each."""
        name = "qkv_bias" if self.architecture.qkv_bias else "qkv_matmul"
        parts = np.split(self.stages[name], np.cumsum(self.facts.qkv_sizes)[:-1], axis=-1)
        q, k, v = (part.reshape(len(part), -1, self.facts.head_dim) for part in parts)
        return q, k, v

    def normed(self, part: str) -> Array:
        """Return Q (``q``) or K (``k``) after QK-norm, if there is one: (T, heads, D)."""
        value = self.qkv()["qk".index(part)]
        if not self.architecture.qk_norm:
            return value
        return self.rms_norm(value, self.weights[f"self_attn.{part}_norm.weight"])

    def rms_norm(self, x: Array, gamma: Array, eps: float | None = None) -> Array:
        """Return the RMSNorm of the last axis."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        scale = 1 / np.sqrt(mean + np.float32(self.facts.eps if eps is None else eps))
        scaled: Array = x * scale * (gamma + np.float32(self.architecture.norm_offset))
        return scaled

    def rope(
        self,
        x: Array,
        *,
        theta: float | None = None,
        shift: float = 0.0,
        pairs: str | None = None,
        scaling: bool = True,
    ) -> Array:
        """Return (T, heads, D) rotated, as the facts say or otherwise."""
        facts, d = self.facts, self.facts.head_dim
        frequency = np.float64(theta or facts.rope_theta) ** (-np.arange(0, d, 2) / d)
        frequency, stretch = _scaled(frequency, facts) if scaling else (frequency, 1.0)
        angle = np.outer(np.arange(len(x)) + shift, frequency)[:, None]
        cos, sin = (f(angle).astype(np.float32) * np.float32(stretch) for f in (np.cos, np.sin))
        out = np.empty_like(x)
        if (pairs or self.architecture.rotated_pairs) == "half":
            first, second = x[..., : d // 2], x[..., d // 2 :]
            out[..., : d // 2] = first * cos - second * sin
            out[..., d // 2 :] = second * cos + first * sin
        else:
            first, second = x[..., ::2], x[..., 1::2]
            out[..., ::2] = first * cos - second * sin
            out[..., 1::2] = second * cos + first * sin
        return out

    def shared(self, x: Array) -> Array:
        """Return K or V with every kv head repeated for the heads that read it."""
        return np.repeat(x, self.facts.heads // self.facts.kv_heads, axis=1)

    def heads(self, stage: str) -> Array:
        """Return a captured Q or K stage as (T, heads, D)."""
        value = self.stages[stage]
        return value.reshape(len(value), -1, self.facts.head_dim)


def _scaled(frequency: NDArray[np.float64], facts: Facts) -> tuple[NDArray[np.float64], float]:
    scaling = facts.rope_scaling
    if scaling.divisors:
        return frequency / np.array(scaling.divisors), 1.0
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.kind == "yarn":
        d, base = facts.head_dim, math.log(facts.rope_theta)
        turns = [scaling.beta_fast, scaling.beta_slow]
        edges = [
            d * math.log(scaling.original_context / (t * 2 * math.pi)) / 2 / base for t in turns
        ]
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), d - 1)
        ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 0.001), 0, 1)
        stretched = frequency / scaling.factor
        return frequency * (1 - ramp) + stretched * ramp, scaling.attention_factor
    return frequency, 1.0


Change = Callable[[Array, Workings], Array]
"""Takes the right value of a stage and returns the wrong one."""


@dataclass
class NumpyEngine:
    """Runs the weights with NumPy in float32; ``faults`` maps (layer, stage) to what goes wrong.

    A fault of layer ``-1`` is planted in every layer. ``matmul`` is the product of (T, X) inputs
    and (Y, X) weights, ``kept`` rounds what every stage leaves behind, ``cached`` rounds K and V
    as they are read back.
    """

    weights: WeightSource
    facts: Facts
    architecture: Architecture
    faults: Mapping[tuple[int | None, str], Change] = field(default_factory=dict)
    matmul: Callable[[Array, Array], Array] = field(default=lambda x, w: x @ w.T)
    kept: Callable[[Array], Array] = field(default=lambda x: x)
    cached: Callable[[Array], Array] = field(default=lambda x: x)

    def layers(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, dict[str, Array]]]:
        """Yield every stage, the faults in place."""
        x: Array = np.empty(0, np.float32)
        for index in range(self.facts.layers):
            w = {name: t.numpy() for name, t in self.weights.layer(index).items()}
            work = self._workings(index, x, w)
            if index == 0:
                rows = self.weights.rows(EMBEDDING, list(tokens)).numpy()
                x = self._put(work, "embedding", rows * np.float32(work.embedding_scale))
                work.x = x
            with np.errstate(all="ignore"):  # faults may overflow
                self._layer(work)
            x = work.stages["post_ffn_residual"]
            yield index, work.stages
        work = self._workings(None, x, {})
        final = self._put(
            work, "final_norm", work.rms_norm(x, self.weights.tensor(FINAL_NORM).numpy())
        )
        head = self.weights.rows(HEAD, range(self.facts.vocab)).numpy()
        self._put(work, "lm_head", self.matmul(final[-1:], head)[0])
        yield None, work.stages

    def _workings(self, layer: int | None, x: Array, w: Mapping[str, Array]) -> Workings:
        return Workings(layer, {}, x, w, self.facts, self.architecture, self.weights)

    def _put(self, work: Workings, stage: str, value: Array) -> Array:
        for layer in (work.layer, -1):
            change = self.faults.get((layer, stage))
            if change is not None and not (layer == -1 and work.layer is None):
                value = change(value.copy(), work)
        work.stages[stage] = self.kept(value.astype(np.float32))
        return work.stages[stage]

    def _layer(self, work: Workings) -> None:
        w, x, f = work.weights, work.x, self.facts
        t, d = len(x), f.head_dim

        def put(stage: str, value: Array) -> Array:
            return self._put(work, stage, value)

        normed = put("attn_norm", work.rms_norm(x, w["input_layernorm.weight"]))
        parts = [self.matmul(normed, w[f"self_attn.{p}_proj.weight"]) for p in "qkv"]
        qkv = put("qkv_matmul", np.concatenate(parts, axis=-1))
        if self.architecture.qkv_bias:
            put("qkv_bias", qkv + np.concatenate([w[f"self_attn.{p}_proj.bias"] for p in "qkv"]))
        put("q_post_rope", work.rope(work.normed("q")).reshape(t, -1))
        put("k_post_rope", work.rope(work.normed("k")).reshape(t, -1))
        q, k = work.heads("q_post_rope"), work.shared(self.cached(work.heads("k_post_rope")))
        scores = np.stack([q[:, h] @ k[:, h].T for h in range(f.heads)]) / np.float32(math.sqrt(d))
        put("attn_scores", scores)
        assert work.layer is not None
        hidden = hidden_keys(t, f.windows[work.layer])
        put("attn_softmax", softmax(np.where(hidden, -np.inf, work.stages["attn_scores"])))
        p, v = work.stages["attn_softmax"], work.shared(self.cached(work.qkv()[2]))
        mixed = np.stack([p[h] @ v[:, h] for h in range(f.heads)], axis=1)
        put("attention", mixed.reshape(t, -1))
        out = put("attn_out", self.matmul(work.stages["attention"], w["self_attn.o_proj.weight"]))
        middle = put("post_attn_residual", x + out)
        normed = put("ffn_norm", work.rms_norm(middle, w["post_attention_layernorm.weight"]))
        gate = put("ffn_gate", self.matmul(normed, w["mlp.gate_proj.weight"]))
        up = put("ffn_up", self.matmul(normed, w["mlp.up_proj.weight"]))
        active = put("ffn_silu", ACTIVATIONS[f.activation](gate))
        product = put("ffn_swigl", active * up)
        out = put("ffn_out", self.matmul(product, w["mlp.down_proj.weight"]))
        put("post_ffn_residual", middle + out)


def hidden_keys(tokens: int, window: int | None) -> NDArray[np.bool_]:
    """Return which keys a query may not see: (T, T)."""
    query, key = np.mgrid[:tokens, :tokens]
    hidden: NDArray[np.bool_] = key > query
    return hidden if window is None else hidden | (key <= query - window)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x / (1 + np.exp(-1.5957691216 * (x + 0.044715 * x**3))),
}
"""Written apart from the forward pass and the replay, as the engine is."""


def softmax(scores: Array) -> Array:
    """Return the softmax over the last axis."""
    shifted: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def write_random_pair(
    folder: Path,
    config: PretrainedConfig,
    *,
    seed: int = 0,
    adjust: Callable[[dict[str, Any]], None] = lambda state: None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write a random model twice: as a Hugging Face folder (float32) and as an F32 GGUF.

    Args:
        folder: an existing folder; ``hf/`` and ``f32.gguf`` are made in it.
        config: of a family in the table of architectures.
        seed: of the weights: normal with 1/sqrt(columns), norms that multiply by about 1.
        adjust: may change the tensors (by Hugging Face name) before both are written.
        metadata: further GGUF keys, without the architecture's prefix.

    Returns:
        The GGUF and the Hugging Face folder.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    facts = Facts.from_config(config)
    architecture = architecture_of(None, config.model_type)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
            if not (name == HEAD and config.tie_word_embeddings)
        }
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {}
    for name, shape in shapes.items():
        random = torch.randn(shape, generator=generator)
        scale = 0.2 if len(shape) == 1 else 1.0 if name == EMBEDDING else shape[1] ** -0.5
        gain = 1 - architecture.norm_offset
        state[name] = random * scale + (gain if name.endswith("norm.weight") else 0.0)
    adjust(state)
    hf = folder / "hf"
    hf.mkdir()
    config.save_pretrained(hf)
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})

    path = folder / "f32.gguf"
    writer = gguf.GGUFWriter(path, architecture.name)
    for key, value in {**_gguf_keys(facts), **(metadata or {})}.items():
        _add(writer, f"{architecture.name}.{key}", value)
    if facts.rope_scaling.divisors:
        writer.add_tensor(ROPE_DIVISORS, np.array(facts.rope_scaling.divisors, np.float32))
    for name, tensor in state.items():
        gguf_name, array = _gguf_tensor(name, tensor.numpy(), facts, architecture)
        writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, hf


def _gguf_keys(facts: Facts) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": facts.layers,
        "context_length": facts.context,
        "embedding_length": facts.hidden,
        "feed_forward_length": facts.intermediate,
        "attention.head_count": facts.heads,
        "attention.head_count_kv": facts.kv_heads,
        "attention.layer_norm_rms_epsilon": facts.eps,
        "rope.freq_base": facts.rope_theta,
    }
    if facts.head_dim * facts.heads != facts.hidden:
        keys |= {"attention.key_length": facts.head_dim, "attention.value_length": facts.head_dim}
    windows = [w for w in facts.windows if w is not None]
    if windows:
        keys["attention.sliding_window"] = windows[0]
        keys["attention.sliding_window_pattern"] = [w is not None for w in facts.windows]
    scaling = facts.rope_scaling
    if scaling.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        keys |= {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.attn_factor": scaling.relative_attention_factor,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    return keys


def _add(writer: Any, key: str, value: Any) -> None:
    kinds: tuple[tuple[type, Callable[..., None]], ...] = (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    )
    next(add for kind, add in kinds if isinstance(value, kind))(key, value)


def _gguf_tensor(
    name: str, array: Array, facts: Facts, architecture: Architecture
) -> tuple[str, Array]:
    if name.endswith("norm.weight") and architecture.norm_offset:
        array = array + np.float32(architecture.norm_offset)
    if name in architecture.model_tensors:
        return architecture.model_tensors[name], array
    layer, suffix = name.removeprefix("model.layers.").split(".", 1)
    heads = {"self_attn.q_proj": facts.heads, "self_attn.k_proj": facts.kv_heads}
    count = heads.get(suffix.rpartition(".")[0])
    if architecture.permuted_qk and count:
        halves = array.reshape(count, 2, facts.head_dim // 2, *array.shape[1:])
        array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
    return architecture.layer_tensor(int(layer), suffix), array
