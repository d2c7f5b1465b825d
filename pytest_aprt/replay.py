"""The replay: each stage recomputed from the model's own captured inputs of that stage.

Written apart from ``forward.py``, in float64 except for the large matmuls (float32), with the
shadow's weights; masks and rotary tables are those that transformers prepared. Beside its value
every stage returns its *response*: how far the value moves when each input moves by one ulp. That
is what decides how much rounding is normal (a softmax over scores of 500 amplifies, a norm not).
Every run replays transformers' own stages as well (self-test), so a fault in here is no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM, Architecture
from pytest_aprt.facts import Facts
from pytest_aprt.stages import STAGES
from pytest_aprt.weights import WeightSource, logits

ULP = 2.0**-24
"""Half the spacing of float32 at 1: the relative error of one rounding."""

ANGLE_ULPS = 0.25
"""Rotary angles are position times frequency, a float32 that is an input too and grows with the
position. This is its share in the response; tests/test_faults.py runs 512 tokens."""

PROBES = 8
"""Responses are root mean squares over at least so many random sign patterns: with fewer, a
single token's channel may look insensitive by chance (chi-squared, 8 degrees of freedom)."""


@dataclass(frozen=True)
class Reference:
    """What a stage should be, and its response to one-ulp changes of its inputs, both float64."""

    value: Tensor
    response: Tensor


@dataclass(frozen=True)
class Context:
    """What a layer's replay needs besides captured stages.

    ``call`` holds what transformers hands to the layer: ``attention_mask`` and
    ``position_embeddings``. For whole-model stages it is empty.
    """

    facts: Facts
    architecture: Architecture
    weights: Mapping[str, Tensor]
    call: Mapping[str, Any]
    source: WeightSource
    tokens: tuple[int, ...]


Inputs = list[Tensor]
_Function = Callable[[Context, Inputs], Tensor]


def replay(stage: str, context: Context, inputs: Inputs) -> Reference:
    """Recompute ``stage`` from the values of its parents, in the order that STAGES gives them.

    Args:
        stage: name of the stage.
        context: weights, facts and what transformers handed to the layer.
        inputs: the parents' values, shaped as STAGES says, any float dtype.
    """
    if STAGES[stage].last_token:
        last = _replay(stage, context, [value[-1:] for value in inputs])
        return Reference(last.value[0], last.response[0])
    return _replay(stage, context, inputs)


def _replay(stage: str, context: Context, inputs: Inputs) -> Reference:
    inputs = [value.double() for value in inputs]
    if stage in _LINEAR:
        return _linear(_LINEAR[stage], context, inputs[0])
    function = _FUNCTIONS[stage]
    value = function(context, inputs)
    if not inputs:
        return Reference(value, torch.zeros_like(value))
    square = torch.zeros_like(value)
    probes = _probes(inputs[0])
    for probe in range(probes):
        moved = [x * (1 + ULP * _signs(x, seed=probe * 8 + i)) for i, x in enumerate(inputs)]
        square += (function(context, moved) - value).square()
    if stage in _ROTARY:
        turned = _turned(stage, context, inputs, angle_error=ANGLE_ULPS * ULP)
        square += probes * (turned - value).square()
    return Reference(value, (square / probes).sqrt())


def _linear(function: _Function, context: Context, x: Tensor) -> Reference:
    """Weights pass through the cache once: values and probes are stacked along the tokens."""
    probes = _probes(x)
    stacked = torch.cat([x] + [x * _signs(x, seed=i) for i in range(probes)]).float()
    value, *moved = function(context, [stacked]).double().split(x.shape[0])
    return Reference(value, torch.stack(moved).square().mean(0).sqrt() * ULP)


def _probes(x: Tensor) -> int:
    return max(1, -(-PROBES // x.shape[-2]))


def _signs(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8).double() * 2 - 1


# One function per stage. T tokens, H hidden, I intermediate, n heads, g kv heads, D head_dim.


def _embedding(c: Context, _: Inputs) -> Tensor:
    return c.source.rows(EMBEDDING, c.tokens).double() * c.architecture.embedding_scale  # (T, H)


def _norm(stage: str) -> _Function:
    (weight,) = STAGES[stage].tensors

    def function(c: Context, inputs: Inputs) -> Tensor:
        return _rms(inputs[0], c.weights[weight], c)  # (T, H)

    return function


def _final_norm(c: Context, inputs: Inputs) -> Tensor:
    return _rms(inputs[0], c.source.tensor(FINAL_NORM), c)


def _rms(x: Tensor, gamma: Tensor, c: Context) -> Tensor:
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + c.facts.eps).sqrt() * (gamma.double() + c.architecture.norm_offset)


def _projection(stage: str) -> _Function:
    def function(c: Context, inputs: Inputs) -> Tensor:
        outputs = [inputs[0] @ c.weights[name].T for name in STAGES[stage].tensors]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    return function


def _qkv_bias(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] + torch.cat([c.weights[name] for name in STAGES["qkv_bias"].tensors])


def _heads(c: Context, qkv: Tensor, part: int) -> Tensor:
    """Return Q (0), K (1) or V (2) as (T, heads, D)."""
    channels: Tensor = qkv.split(c.facts.qkv_sizes, dim=-1)[part]
    return channels.reshape(channels.shape[0], -1, c.facts.head_dim)


_ROTARY = {"q_post_rope": 0, "k_post_rope": 1}  # which part of qkv is turned


def _rope(stage: str) -> _Function:
    def function(c: Context, inputs: Inputs) -> Tensor:
        return _turned(stage, c, inputs, angle_error=0.0)

    return function


def _turned(stage: str, c: Context, inputs: Inputs, angle_error: float) -> Tensor:
    """Apply QK-norm and RoPE, with every angle larger by the relative ``angle_error``."""
    x = _heads(c, inputs[0], _ROTARY[stage])
    if c.architecture.qk_norm:
        (norm,) = STAGES[stage].tensors
        x = _rms(x, c.weights[norm], c)
    tables: tuple[Tensor, Tensor] = c.call["position_embeddings"]  # (1, T, D) each
    cos, sin = (table[0].double()[:, None] for table in tables)
    if angle_error:
        angle = angle_error * _angles(c, x.shape[0])[:, None]
        cos, sin = cos - sin * angle, sin + cos * angle
    if c.architecture.rotated_pairs == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).flatten(1)  # (T, heads*D)


def _angles(c: Context, tokens: int) -> Tensor:
    """Return the unscaled angle of every channel at every position: (T, D)."""
    pairs = torch.arange(c.facts.head_dim // 2).double()
    frequency = c.facts.rope_theta ** (-2 * pairs / c.facts.head_dim)
    angles = torch.outer(torch.arange(tokens).double(), frequency)
    if c.architecture.rotated_pairs == "half":
        return torch.cat([angles, angles], dim=-1)
    return angles.repeat_interleave(2, dim=-1)


def _scores(c: Context, inputs: Inputs) -> Tensor:
    q, k = (x.reshape(x.shape[0], -1, c.facts.head_dim).transpose(0, 1) for x in inputs)
    k = k.repeat_interleave(c.facts.heads // c.facts.kv_heads, dim=0)
    return q @ k.transpose(1, 2) / math.sqrt(c.facts.head_dim)  # (n, T, T)


def visible(c: Context) -> Tensor:
    """Return which keys each query may see, by transformers' mask: (T, T) bool."""
    mask: Tensor | None = c.call["attention_mask"]
    if mask is None:
        t = len(c.tokens)
        return torch.ones(t, t, dtype=torch.bool).tril()
    return (mask if mask.dtype == torch.bool else mask == 0)[0, 0]


def _softmax(c: Context, inputs: Inputs) -> Tensor:
    scores = inputs[0].masked_fill(~visible(c), -torch.inf)
    return torch.softmax(scores, dim=-1)  # (n, T, T)


def _attention(c: Context, inputs: Inputs) -> Tensor:
    probabilities, qkv = inputs
    v = _heads(c, qkv, 2).transpose(0, 1)
    v = v.repeat_interleave(c.facts.heads // c.facts.kv_heads, dim=0)
    return (probabilities @ v).transpose(0, 1).flatten(1)  # (T, nD)


def _sum(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] + inputs[1]


def _silu(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] / (1 + (-inputs[0]).exp())


def _product(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] * inputs[1]


def _logits(c: Context, inputs: Inputs) -> Tensor:
    return logits(c.source, inputs[0], c.facts.vocab)


_LINEAR: dict[str, _Function] = {
    stage: _projection(stage)
    for stage in ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
} | {"lm_head": _logits}
_FUNCTIONS: dict[str, _Function] = {
    "embedding": _embedding,
    "attn_norm": _norm("attn_norm"),
    "qkv_bias": _qkv_bias,
    "q_post_rope": _rope("q_post_rope"),
    "k_post_rope": _rope("k_post_rope"),
    "attn_scores": _scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    "post_attn_residual": _sum,
    "ffn_norm": _norm("ffn_norm"),
    "ffn_silu": _silu,
    "ffn_swigl": _product,
    "post_ffn_residual": _sum,
    "final_norm": _final_norm,
}
