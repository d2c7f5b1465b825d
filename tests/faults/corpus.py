"""Planted faults, each named after the bug it stands for, and the stages in which it is born.

A fault changes one stage's right value into the wrong one while the engine runs, so that all that
follows is computed from it. Numbers in comments are those of real bugs with such a signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pytest_aprt.testing import Array, Change, Workings, softmax


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One bug.

    ``changes`` maps the stages in which it is born to what goes wrong there. ``layer`` is where it
    is planted: a layer, -1 for all of them, None for the whole-model stages.
    """

    name: str
    changes: Mapping[str, Change]
    layer: int | None = 2


def rope(**wrong):
    """Both Q and K rotated otherwise."""

    def turned(part: str) -> Change:
        return lambda value, w: w.rope(w.normed(part), **wrong).reshape(value.shape)

    return {"q_post_rope": turned("q"), "k_post_rope": turned("k")}


def unrotated(part: str) -> Change:
    return lambda value, w: w.normed(part).reshape(value.shape)


def weight_of(suffix: str, change) -> Change:
    """The stage of a projection, computed with another weight."""
    inputs = {
        "self_attn.o_proj.weight": "attention",
        "mlp.gate_proj.weight": "ffn_norm",
        "mlp.up_proj.weight": "ffn_norm",
        "mlp.down_proj.weight": "ffn_swigl",
    }

    def project(value: Array, w: Workings) -> Array:
        return w.stages[inputs[suffix]] @ change(w.weights[suffix].copy(), w).T

    return project


def norm(gamma: str, before: str | None, **wrong) -> Change:
    def normed(value: Array, w: Workings) -> Array:
        x = w.x if before is None else w.stages[before]
        return w.rms_norm(x, w.weights[gamma], **wrong)

    return normed


def layer_norm(value: Array, w: Workings) -> Array:
    x = w.stages["post_attn_residual"]
    x = x - x.mean(-1, keepdims=True)
    return w.rms_norm(x, w.weights["post_attention_layernorm.weight"])


def scores_by_modulo(value: Array, w: Workings) -> Array:
    """Head h reads kv head h mod g instead of h div (n/g)."""
    q, k = w.heads("q_post_rope"), w.heads("k_post_rope")
    pairs = [(h, h % w.facts.kv_heads) for h in range(w.facts.heads)]
    scale = np.float32(w.facts.head_dim**0.5)
    return np.stack([q[:, h] @ k[:, g].T for h, g in pairs]) / scale


def values_by_modulo(value: Array, w: Workings) -> Array:
    p, v = w.stages["attn_softmax"], w.qkv()[2]
    mixed = [p[h] @ v[:, h % w.facts.kv_heads] for h in range(w.facts.heads)]
    return np.stack(mixed, axis=1).reshape(value.shape)


def unmasked(value: Array, w: Workings) -> Array:
    return softmax(w.stages["attn_scores"])


def one_key_short(value: Array, w: Workings) -> Array:
    """The mask hides the query's own key, except where nothing else is left."""
    scores = w.stages["attn_scores"].copy()
    t = scores.shape[-1]
    hidden = np.triu(np.ones((t, t), bool))
    hidden[0, 0] = False
    return softmax(np.where(hidden, -np.inf, scores))


def heads_swapped(value: Array, w: Workings) -> Array:
    heads = value.reshape(len(value), w.facts.heads, -1)
    return heads[:, [1, 0, *range(2, w.facts.heads)]].reshape(value.shape)


def heads_transposed(value: Array, w: Workings) -> Array:
    """Heads and channels exchanged when they are concatenated."""
    return value.reshape(len(value), w.facts.heads, -1).swapaxes(1, 2).reshape(value.shape)


def gelu(value: Array, w: Workings) -> Array:
    x = w.stages["ffn_gate"]
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def channel(index: int, factor: float) -> Change:
    def change(value: Array, w: Workings) -> Array:
        value[..., index] *= factor
        return value

    return change


def token(index: int, factor: float) -> Change:
    def change(value: Array, w: Workings) -> Array:
        value[index] *= factor
        return value

    return change


def element(value_: float) -> Change:
    def change(value: Array, w: Workings) -> Array:
        value[-1, 1] = value_
        return value

    return change


def scaled(factor: float) -> Change:
    return lambda value, w: value * np.float32(factor)


def all_but_first(factor: float) -> Change:
    def change(value: Array, w: Workings) -> Array:
        value[1:] *= factor
        return value

    return change


def int8_inputs(suffix: str, stage: str) -> Change:
    """Inputs of the matmul rounded to 8 bits per token: 0.5 to 5 % in engines that do so."""

    def change(value: Array, w: Workings) -> Array:
        x = w.stages[stage]
        step = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / step) * step @ w.weights[suffix].T

    return change


def bad_block(weight: Array, w: Workings) -> Array:
    weight[3, 32:64] *= 1.5
    return weight


GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
OUT = "self_attn.o_proj.weight"
NORM_1, NORM_2 = "input_layernorm.weight", "post_attention_layernorm.weight"

FAULTS = (
    # rotary embedding
    Fault(name="rope-theta-10k", changes=rope(theta=10_000.0)),
    Fault(name="rope-neighbour-pairs", changes=rope(pairs="adjacent")),
    Fault(name="rope-off-by-one", changes=rope(shift=1)),  # attention itself is unchanged
    Fault(name="rope-absent", changes={
        "q_post_rope": unrotated("q"), "k_post_rope": unrotated("k")}),
    Fault(name="rope-absent-on-k", changes={"k_post_rope": unrotated("k")}),
    # biases and norms
    Fault(name="qkv-bias-missing", changes={"qkv_bias": lambda v, w: w.stages["qkv_matmul"]}),
    Fault(name="norm-eps-1e-3", changes={"attn_norm": norm(NORM_1, None, eps=1e-3)}, layer=0),
    Fault(name="layer-norm-for-rms-norm", changes={"ffn_norm": layer_norm}),
    Fault(name="norm-weight-minus-one", changes={
        "ffn_norm": lambda v, w: v * (w.weights[NORM_2] - 1) / w.weights[NORM_2]}),
    # scores and softmax
    Fault(name="scale-missing", changes={"attn_scores": scaled(8.0)}),  # cosine stays 1
    Fault(name="kv-heads-by-modulo", changes={"attn_scores": scores_by_modulo}),
    Fault(name="causal-mask-missing", changes={"attn_softmax": unmasked}),
    Fault(name="mask-one-key-short", changes={"attn_softmax": one_key_short}),
    # attention
    Fault(name="values-by-modulo", changes={"attention": values_by_modulo}),
    Fault(name="heads-swapped", changes={"attention": heads_swapped}),
    Fault(name="heads-transposed", changes={"attention": heads_transposed}),
    Fault(name="one-head-zero", changes={
        "attention": lambda v, w: v * (np.arange(v.shape[1]) >= w.facts.head_dim)}),
    # projections
    Fault(name="o-proj-transposed", changes={"attn_out": weight_of(OUT, lambda x, w: x.T)}),
    Fault(name="matrix-3-percent", changes={"ffn_up": weight_of(UP, lambda x, w: x * 1.03)}),
    Fault(name="bad-quant-block", changes={"ffn_gate": weight_of(GATE, bad_block)}),
    Fault(name="rows-rolled", changes={"ffn_out": weight_of(DOWN, lambda x, w: np.roll(x, 1, 0))}),
    Fault(name="int8-inputs", changes={"ffn_out": int8_inputs(DOWN, "ffn_swigl")}),
    # the gated FFN
    Fault(name="gate-and-up-exchanged", changes={
        "ffn_gate": weight_of(UP, lambda x, w: x),
        "ffn_up": weight_of(GATE, lambda x, w: x)}),
    Fault(name="gelu-for-silu", changes={"ffn_silu": gelu}),
    Fault(name="silu-on-up", changes={
        "ffn_silu": lambda v, w: w.stages["ffn_up"] / (1 + np.exp(-w.stages["ffn_up"]))}),
    Fault(name="channel-sign", changes={"ffn_swigl": channel(7, -1.0)}),
    # residuals
    Fault(name="residual-missing", changes={
        "post_attn_residual": lambda v, w: w.stages["attn_out"]}),
    Fault(name="residual-doubled", changes={
        "post_ffn_residual": lambda v, w: v + w.stages["post_attn_residual"]}),
    Fault(name="layer-is-no-op", changes={"post_ffn_residual": lambda v, w: w.x}),
    Fault(name="one-token-stale", changes={"attn_out": token(3, 0.0)}),
    Fault(name="small-on-all-but-first", changes={"ffn_out": all_but_first(1.001)}),
    # values that are no numbers
    Fault(name="nan-in-k", changes={"k_post_rope": element(np.nan)}),
    Fault(name="inf-in-gate", changes={"ffn_gate": element(np.inf)}),
    # the ends
    Fault(name="embedding-row", changes={"embedding": token(2, 1.05)}, layer=0),
    Fault(name="embedding-scaled", changes={"embedding": scaled(16.0)}, layer=0),
    Fault(name="final-norm-weight", changes={"final_norm": scaled(1.002)}, layer=None),
    Fault(name="head-rolled", changes={"lm_head": lambda v, w: np.roll(v, 1)}, layer=None),
    Fault(name="head-last-element", changes={"lm_head": channel(-1, 1.01)}, layer=None),
    # several at once, or everywhere
    Fault(name="two-at-once", changes={
        "qkv_bias": lambda v, w: w.stages["qkv_matmul"], "ffn_silu": gelu}),
    Fault(name="rope-theta-everywhere", changes=rope(theta=10_000.0), layer=-1),
    Fault(name="gelu-everywhere", changes={"ffn_silu": gelu}, layer=-1),
)  # fmt: skip
