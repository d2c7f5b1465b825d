"""The numerical facts of a model, as each side states them, and which stages each one feeds.

``Facts.from_gguf`` reads GGUF metadata with llama.cpp's defaults, ``Facts.from_config`` reads a
transformers configuration with transformers' defaults; ``FACTS`` says how the two compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_aprt.architectures import ACTIVATIONS, Architecture
from pytest_aprt.errors import ArchitectureError, SourceError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched: none, linear, yarn, or one divisor for each pair.

    Source: arXiv 2309.00071 (YaRN); the names of its parameters are transformers'. Llama 3 states
    a rule in config.json, of which GGUF stores the outcome as the tensor ``rope_freqs.weight``:
    ``divisors`` holds it, on both sides.
    """

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True  # yarn's ramp begins and ends at a pair, as in GGUF it always does
    divisors: tuple[float, ...] = ()

    @property
    def relative_attention_factor(self) -> float:
        """The attention factor in units of the one that YaRN's paper gives."""
        return self.attention_factor / _yarn_attention_factor(self.factor)

    def __str__(self) -> str:
        if self.kind == "none":
            return "none"
        if self.divisors:
            low, high = min(self.divisors), max(self.divisors)
            return f"{len(self.divisors)} divisors from {low:.4g} to {high:.4g}"
        return f"{self.kind}, factor {self.factor:g}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything besides weights that decides the numbers of a forward pass."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    windows: tuple[int | None, ...]  # sliding window of each layer, None: full attention
    tied_embeddings: bool
    activation: str

    def __post_init__(self) -> None:
        """Refuse shapes that no decoder can have.

        Raises:
            ArchitectureError: a count below 1, heads that the kv heads do not divide, or an
                activation that nothing here computes.
        """
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab"):
            if getattr(self, name) < 1:
                raise ArchitectureError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.heads % self.kv_heads:
            raise ArchitectureError(
                f"{self.heads} heads cannot share {self.kv_heads} kv heads: expected a divisor"
            )
        if self.head_dim % 2:
            raise ArchitectureError(f"head_dim is {self.head_dim}: RoPE needs an even number")
        if self.activation not in ACTIVATIONS:
            raise ArchitectureError(
                f"activation {self.activation!r} is unknown: expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )

    def sizes(self, tokens: int) -> dict[str, int]:
        """Return the values of the symbols in ``Stage.shape`` for a prompt of ``tokens``."""
        return {
            "T": tokens,
            "H": self.hidden,
            "I": self.intermediate,
            "V": self.vocab,
            "nq": self.heads,
            "nkv": self.kv_heads,
            "D": self.head_dim,
            "nq*D": self.heads * self.head_dim,
            "nkv*D": self.kv_heads * self.head_dim,
            "(nq+2*nkv)*D": (self.heads + 2 * self.kv_heads) * self.head_dim,
        }

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Channels of Q, K and V in the concatenated projection."""
        return (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Any],
        architecture: Architecture,
        rope_divisors: Sequence[float] = (),
    ) -> Facts:
        """Read the facts as llama.cpp does, its defaults included.

        Args:
            metadata: the GGUF's key-value pairs.
            tensors: tensor name -> anything with ``shape`` (rows, columns).
            architecture: the row of the file's ``general.architecture``.
            rope_divisors: values of ``rope_freqs.weight``, if the file has it.

        Raises:
            ArchitectureError: only some channels are rotated, or an unknown kind of scaling.
            SourceError: a key that has no default is absent, or of the wrong type.
        """
        a = architecture.name

        def number(key: str, default: float | None = None) -> float:
            value = metadata.get(f"{a}.{key}", default)
            if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
                value = value[0]  # per-layer arrays whose layers agree
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SourceError(
                    f"GGUF metadata {a}.{key}: expected a number, found {value!r}; the file is "
                    "incomplete, convert it again"
                )
            return value

        layers, hidden, heads = (
            int(number(key)) for key in ("block_count", "embedding_length", "attention.head_count")
        )
        if heads < 1:
            raise SourceError(f"GGUF metadata {a}.attention.head_count: expected at least 1")
        head_dim = int(number("attention.key_length", hidden // heads))
        rotated = int(number("rope.dimension_count", head_dim))
        if rotated != head_dim:
            raise ArchitectureError(
                f"GGUF metadata {a}.rope.dimension_count is {rotated}: expected head_dim "
                f"({head_dim}); models that rotate only some channels are not supported"
            )
        context = int(number("context_length"))
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise SourceError("GGUF tensor token_embd.weight is missing: the file is incomplete")
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=int(number("feed_forward_length")),
            heads=heads,
            kv_heads=int(number("attention.head_count_kv", heads)),
            head_dim=head_dim,
            vocab=int(embedding.shape[0]),
            context=context,
            eps=float(number("attention.layer_norm_rms_epsilon")),
            rope_theta=float(number("rope.freq_base", 10000.0)),
            rope_scaling=_gguf_scaling(metadata, a, context, rope_divisors),
            windows=_gguf_windows(metadata, a, layers),
            tied_embeddings="output.weight" not in tensors,
            activation=architecture.activation,
        )

    @classmethod
    def from_config(cls, config: Any) -> Facts:
        """Read the facts from a transformers configuration object (``PreTrainedConfig``)."""
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        older = getattr(config, "rope_scaling", None) or {}
        rope = {**older, **rope}
        window = getattr(config, "sliding_window", None)
        # Without layer types, a family that has a window has it in every layer (mistral).
        every = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or every
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        theta = float(rope.get("rope_theta") or config.rope_theta)
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            eps=float(config.rms_norm_eps),
            rope_theta=theta,
            rope_scaling=_config_scaling(rope, config.max_position_embeddings, theta, head_dim),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            tied_embeddings=bool(config.tie_word_embeddings),
            activation=config.hidden_act,
        )


def _yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0  # arXiv 2309.00071, eq. 22


def _llama3_divisors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Return what each pair's frequency is divided by.

    Source: transformers modeling_rope_utils, ``_compute_llama3_parameters``.
    """
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors = []
    for pair in range(head_dim // 2):
        turns = context * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / factor))
    return tuple(divisors)


def _gguf_scaling(
    metadata: Mapping[str, Any], a: str, context: int, divisors: Sequence[float]
) -> RopeScaling:
    if len(divisors):
        return RopeScaling(kind="divisors", divisors=tuple(float(d) for d in divisors))
    kind = metadata.get(f"{a}.rope.scaling.type", "none")
    factor = float(metadata.get(f"{a}.rope.scaling.factor", 0.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=int(
                metadata.get(f"{a}.rope.scaling.original_context_length", context)
            ),
            attention_factor=_yarn_attention_factor(factor)
            * float(metadata.get(f"{a}.rope.scaling.attn_factor", 1.0)),
            beta_fast=float(metadata.get(f"{a}.rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(metadata.get(f"{a}.rope.scaling.yarn_beta_slow", 1.0)),
        )
    raise ArchitectureError(
        f"GGUF metadata {a}.rope.scaling.type is {kind!r}: expected none, linear or yarn"
    )


def _config_scaling(
    rope: Mapping[str, Any], context: int, theta: float, head_dim: int
) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = float(rope.get("factor") or 1.0)
    if kind == "default" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        attention, mscale = rope.get("attention_factor"), rope.get("mscale")
        if attention is None:
            attention = _yarn_attention_factor(factor)
            if mscale and (all_dim := rope.get("mscale_all_dim")):
                attention = _yarn_attention_factor(factor, mscale)
                attention /= _yarn_attention_factor(factor, all_dim)
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=int(rope.get("original_max_position_embeddings") or context),
            attention_factor=float(attention),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            whole_pairs=bool(rope.get("truncate", True)),
        )
    if kind == "dynamic":
        return RopeScaling(kind="dynamic", factor=factor, original_context=context)
    if kind == "llama3":
        return RopeScaling(kind="divisors", divisors=_llama3_divisors(rope, theta, head_dim))
    return RopeScaling(kind=str(kind), factor=factor)


def _gguf_windows(metadata: Mapping[str, Any], a: str, layers: int) -> tuple[int | None, ...]:
    window = int(metadata.get(f"{a}.attention.sliding_window", 0))
    if window <= 0:
        return (None,) * layers
    pattern = metadata.get(f"{a}.attention.sliding_window_pattern")
    if pattern is None:
        return (window,) * layers
    if isinstance(pattern, int):  # every pattern-th layer sees everything
        return tuple(None if (i + 1) % pattern == 0 else window for i in range(layers))
    if len(pattern) != layers:
        raise SourceError(
            f"GGUF metadata {a}.attention.sliding_window_pattern has {len(pattern)} entries: "
            f"expected one for each of {layers} layers"
        )
    return tuple(window if slides else None for slides in pattern)


_FLOAT32_STEP = 1e-6
"""GGUF stores floats in 4 bytes: 1e-6 comes back as 9.9999999e-07. Llama 3's divisors, which the
converter forms in float32, agree to 3e-7."""


def agree(a: Any, b: Any) -> bool:
    """Return whether two facts are the same value, up to GGUF's float32 storage."""
    if isinstance(a, RopeScaling) and isinstance(b, RopeScaling):
        return all(agree(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(agree, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=_FLOAT32_STEP)
    return bool(a == b)


def _from_the_first(model: Facts, oracle: Facts) -> float:
    return 0


def _from_the_second(model: Facts, oracle: Facts) -> float:
    return 1  # the angle of position 0 is 0 whatever the base


def _beyond_context(model: Facts, oracle: Facts) -> float:
    return min(model.context, oracle.context)


def _beyond_unscaled(model: Facts, oracle: Facts) -> float:
    """Dynamic scaling leaves frequencies as they are within the context."""
    kinds = {"none": math.inf, "dynamic": oracle.rope_scaling.original_context}
    return min(kinds.get(facts.rope_scaling.kind, 0) for facts in (model, oracle))


def _beyond_window(model: Facts, oracle: Facts) -> float:
    pairs = zip(model.windows, oracle.windows, strict=False)
    return min((min(a or math.inf, b or math.inf) for a, b in pairs if a != b), default=math.inf)


def _head_is_missing(model: Facts, oracle: Facts) -> float:
    # A tied oracle against an explicit output.weight is judged by that tensor (weights rung).
    return 0 if model.tied_embeddings and not oracle.tied_embeddings else math.inf


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One row of the config rung.

    ``field`` is the name in ``Facts``; ``key`` and ``config`` are where each side states it;
    ``feeds`` are the stages whose numbers it decides. Sides that differ in a size (``is_size``)
    cannot be compared at all; else ``beyond`` says how many tokens a prompt may have before a
    disagreement changes its result: infinity if it never does.
    """

    name: str
    field: str
    key: str
    config: str
    feeds: tuple[str, ...]
    is_size: bool = False
    beyond: Callable[[Facts, Facts], float] = _from_the_first

    def matters(self, model: Facts, oracle: Facts, tokens: int) -> bool:
        """Return whether a disagreement changes the result for a prompt of ``tokens``."""
        return tokens > self.beyond(model, oracle)


_EVERY = ("embedding",)
_NORMS = ("attn_norm", "ffn_norm", "final_norm")
_ROPE = ("q_post_rope", "k_post_rope")

_FACT_ROWS = (
    Fact(name="n_layers", field="layers", key="block_count", config="num_hidden_layers",
         feeds=_EVERY, is_size=True),
    Fact(name="hidden_size", field="hidden", key="embedding_length", config="hidden_size",
         feeds=_EVERY, is_size=True),
    Fact(name="vocab_size", field="vocab", key="token_embd.weight", config="vocab_size",
         feeds=_EVERY, is_size=True),
    Fact(name="intermediate_size", field="intermediate", key="feed_forward_length",
         config="intermediate_size", feeds=("ffn_gate", "ffn_up"), is_size=True),
    Fact(name="n_heads", field="heads", key="attention.head_count", config="num_attention_heads",
         feeds=("qkv_matmul",), is_size=True),
    Fact(name="n_kv_heads", field="kv_heads", key="attention.head_count_kv",
         config="num_key_value_heads", feeds=("qkv_matmul",), is_size=True),
    Fact(name="head_dim", field="head_dim", key="attention.key_length", config="head_dim",
         feeds=("qkv_matmul",), is_size=True),
    Fact(name="norm_eps", field="eps", key="attention.layer_norm_rms_epsilon",
         config="rms_norm_eps", feeds=_NORMS),
    Fact(name="rope_theta", field="rope_theta", key="rope.freq_base", config="rope_theta",
         feeds=_ROPE, beyond=_from_the_second),
    Fact(name="rope_scaling", field="rope_scaling", key="rope.scaling", config="rope_scaling",
         feeds=_ROPE, beyond=_beyond_unscaled),
    Fact(name="sliding_window", field="windows", key="attention.sliding_window",
         config="sliding_window", feeds=("attn_softmax",), beyond=_beyond_window),
    Fact(name="context_length", field="context", key="context_length",
         config="max_position_embeddings", feeds=_ROPE, beyond=_beyond_context),
    Fact(name="tied_embeddings", field="tied_embeddings", key="output.weight",
         config="tie_word_embeddings", feeds=("lm_head",), beyond=_head_is_missing),
    Fact(name="activation", field="activation", key="general.architecture", config="hidden_act",
         feeds=("ffn_silu",)),
)  # fmt: skip

FACTS: dict[str, Fact] = {row.name: row for row in _FACT_ROWS}
"""Every fact of the config rung by its name in test ids, in the order in which they are judged."""
