"""Healthy engines and faults beyond those of the fixtures, for models of other shapes.

The engines differ in the order of their sums and in where they round; the faults are planted in
models of ``shapes``. All were made up after the instrument was finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from faults.corpus import (
    DOWN,
    GATE,
    NORM_2,
    OUT,
    Fault,
    channel,
    has_bias,
    has_qk_norm,
    masked,
    norm,
    scaled,
    weight_of,
)
from faults.engines import Hiding, bfloat16, float16, inputs, operands, q8_0, tf32
from pytest_aprt.pair import Pair
from pytest_aprt.testing import Array, Change, NumpyEngine, Workings, hidden_keys, softmax

Rounding = Callable[[Array], Array]
F32 = np.float32


def as_it_is(x: Array) -> Array:
    return x


# --- orders of summation --------------------------------------------------------------------------


def pairwise(x: Array, w: Array) -> Array:
    products = x[:, None, :] * w[None]
    while products.shape[-1] > 1:
        if products.shape[-1] % 2:
            products = np.concatenate([products, np.zeros_like(products[..., :1])], -1)
        products = products[..., ::2] + products[..., 1::2]
    return products[..., 0]


def in_blocks(size: int) -> Callable[[Array, Array], Array]:
    def product(x: Array, w: Array) -> Array:
        total = np.zeros((len(x), len(w)), F32)
        for k in range(0, x.shape[1], size):
            total += x[:, k : k + size] @ w[:, k : k + size].T
        return total

    return product


def backwards(x: Array, w: Array) -> Array:
    return x[:, ::-1].copy() @ w[:, ::-1].T.copy()


def in_double(x: Array, w: Array) -> Array:
    return (x.astype(np.float64) @ w.astype(np.float64).T).astype(F32)


# --- other ways to compute a stage ----------------------------------------------------------------


def fused_attention(size: int, rounded: Rounding = as_it_is) -> Change:
    """Softmax and mix in one pass over blocks of keys, as in Flash Attention."""

    def attention(value: Array, w: Workings) -> Array:
        facts, q = w.facts, w.heads("q_post_rope")
        k, v = w.shared(rounded(w.heads("k_post_rope"))), w.shared(rounded(w.qkv()[2]))
        hidden = hidden_keys(len(q), facts.windows[w.layer])
        peak = np.full((facts.heads, len(q), 1), -1e30, F32)
        total, mixed = np.zeros_like(peak), np.zeros((*peak.shape[:2], facts.head_dim), F32)
        for start in range(0, len(q), size):
            keys = slice(start, start + size)
            scores = np.einsum("tnd,snd->nts", q, k[keys]) * F32(1 / math.sqrt(facts.head_dim))
            scores = np.where(hidden[:, keys], F32(-np.inf), scores)
            higher = np.maximum(peak, scores.max(-1, keepdims=True))
            shares, fade = np.exp(scores - higher), np.exp(peak - higher)
            total = total * fade + shares.sum(-1, keepdims=True)
            mixed = mixed * fade + rounded(shares) @ v[keys].swapaxes(0, 1)
            peak = higher
        return (mixed / total).swapaxes(0, 1).reshape(value.shape)

    return attention


def rotated_stepwise(part: str) -> Change:
    """Angles in float32, each made of the one before, as llama.cpp does."""

    def change(value: Array, w: Workings) -> Array:
        x, d = w.normed(part), w.facts.head_dim
        if w.facts.rope_scaling.kind != "none":
            return value
        step, angle, columns = F32(w.facts.rope_theta ** (-2 / d)), np.arange(len(x), dtype=F32), []
        for _ in range(d // 2):
            columns.append(angle)
            angle = angle * step
        angles = np.stack(columns, 1)[:, None]
        return turned(x, angles).reshape(value.shape)

    return change


def turned(x: Array, angles: Array) -> Array:
    cos, sin, half = np.cos(angles), np.sin(angles), x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def scaled_queries(value: Array, w: Workings) -> Array:
    q, k = w.heads("q_post_rope"), w.shared(w.heads("k_post_rope"))
    return np.einsum("tnd,snd->nts", q * F32(1 / math.sqrt(w.facts.head_dim)), k)


def silu_by_table(value: Array, w: Workings) -> Array:
    """A table of float16 for all float16, as ggml had."""
    gate = float16(w.stages["ffn_gate"])
    return float16(gate / (1 + np.exp(-gate)))


def double_norm(gamma: str, before: str | None) -> Change:
    def change(value: Array, w: Workings) -> Array:
        x = (w.x if before is None else w.stages[before]).astype(np.float64)
        return (x / np.sqrt((x * x).mean(-1, keepdims=True) + w.facts.eps)).astype(F32) * (
            w.weights[gamma]
        )

    return change


NORM_1 = "input_layernorm.weight"
MATMULS = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
RESIDUALS = ("embedding", "post_attn_residual", "post_ffn_residual")
NORMS = ("attn_norm", "ffn_norm", "final_norm")


class Storing(NumpyEngine):
    """The NumPy engine that rounds what some stages leave behind."""

    def __init__(self, pair: Pair, rounding: Rounding, where: Callable[[str], bool], **ways: Any):
        super().__init__(pair.model_weights, pair.oracle_facts, pair.architecture, **ways)
        self._rounding, self._where = rounding, where

    def _put(self, work: Workings, stage: str, value: Array) -> Array:
        found = super()._put(work, stage, value)
        if self._where(stage):
            found = work.stages[stage] = self._rounding(found)
        return found


def engine(**ways: Any) -> Callable[[Pair], Any]:
    faults = {(-1, stage): change for stage, change in ways.pop("stages", {}).items()}
    return lambda pair: NumpyEngine(
        pair.model_weights, pair.oracle_facts, pair.architecture, faults, **ways
    )


def storing(rounding: Rounding, *stages: str, but: bool = False, **ways: Any) -> Any:
    """An engine that keeps these stages (or all but these) in a dtype."""
    return lambda pair: Storing(pair, rounding, lambda s: (s in stages) != but, **ways)


def showing(made: Callable[[Pair], Any], *hidden: str) -> Callable[[Pair], Any]:
    return lambda pair: Hiding(made(pair), lambda layer, name: name not in hidden)


def outputs(made: Callable[[Pair], Any]) -> Callable[[Pair], Any]:
    shown = ("embedding", "post_ffn_residual", "lm_head")
    return lambda pair: Hiding(made(pair), lambda layer, name: name in shown)


ROTARY = {"q_post_rope": rotated_stepwise("q"), "k_post_rope": rotated_stepwise("k")}
ENGINES: dict[str, Callable[[Pair], Any]] = {
    "pairwise sums": engine(matmul=pairwise),
    "sums in blocks of 8": engine(matmul=in_blocks(8)),
    "sums in blocks of 32": engine(matmul=in_blocks(32)),
    "sums backwards": engine(matmul=backwards),
    "sums in double": engine(matmul=in_double),
    "norms in double": engine(stages={"attn_norm": double_norm(NORM_1, None),
                                      "ffn_norm": double_norm(NORM_2, "post_attn_residual")}),
    "angles step by step": engine(stages=ROTARY),
    "queries scaled": engine(stages={"attn_scores": scaled_queries}),
    "fused attention": showing(engine(stages={"attention": fused_attention(16)}),
                               "attn_scores", "attn_softmax"),
    "fused attention, all shown": engine(stages={"attention": fused_attention(4)}),
    "fused attention in bfloat16": showing(
        engine(stages={"attention": fused_attention(16, bfloat16)}, kept=bfloat16,
               **operands(bfloat16)), "attn_scores", "attn_softmax"),
    "float16 cache": engine(cached=float16),
    "bfloat16 cache": engine(cached=bfloat16),
    "float16 weights": engine(matmul=lambda x, w: x @ float16(w).T),
    "bfloat16 weights": engine(matmul=lambda x, w: x @ bfloat16(w).T),
    "silu by table": engine(stages={"ffn_silu": silu_by_table}),
    "bfloat16, residuals in float32": storing(bfloat16, *RESIDUALS, but=True, **operands(bfloat16)),
    "bfloat16, norms in float32": storing(bfloat16, *NORMS, but=True, **operands(bfloat16)),
    "bfloat16, logits in float32": storing(bfloat16, "lm_head", but=True, **operands(bfloat16)),
    "bfloat16, scores in float32": storing(bfloat16, "attn_scores", "attn_softmax", but=True,
                                           **operands(bfloat16)),
    "bfloat16 after matmuls": storing(bfloat16, *MATMULS, **operands(bfloat16)),
    "float16, residuals in float32": storing(float16, *RESIDUALS, but=True, **operands(float16)),
    "float16 after matmuls": storing(float16, *MATMULS, **operands(float16)),
    "float16 residuals": storing(float16, *RESIDUALS),
    "bfloat16 stages, float32 sums": engine(kept=bfloat16),
    "bfloat16, outputs only": outputs(engine(kept=bfloat16, **operands(bfloat16))),
    "float16, few shown": showing(engine(kept=float16, **operands(float16)), "attn_out",
                                  "post_attn_residual", "ffn_swigl"),
    "tf32": engine(**operands(tf32)),
    "q8_0, cache in float16": engine(cached=float16, **inputs(q8_0)),
    "q8_0, residuals in bfloat16": storing(bfloat16, *RESIDUALS[1:], **inputs(q8_0)),
}  # fmt: skip
"""Each takes a pair and returns a healthy engine on its weights."""


def fits(name: str, pair: Pair) -> bool:
    """Return whether an engine's blocks fit the model."""
    facts = pair.oracle_facts
    sizes = (facts.hidden, facts.intermediate, facts.heads * facts.head_dim)
    return "q8_0" not in name or all(size % 32 == 0 for size in sizes)


# --- faults ---------------------------------------------------------------------------------------


def partly_rotated(part: str) -> Change:
    """The upper half of the frequencies left out, as for partial_rotary_factor 0.5."""

    def change(value: Array, w: Workings) -> Array:
        x = w.normed(part)
        found, half = w.rope(x.copy()), x.shape[-1] // 2
        for start in (0, half):
            found[..., start + half // 2 : start + half] = x[..., start + half // 2 : start + half]
        return found.reshape(value.shape)

    return change


def rotated_back(part: str) -> Change:
    """The sign of the sine."""

    def change(value: Array, w: Workings) -> Array:
        mirrored = w.normed(part).copy()
        half = mirrored.shape[-1] // 2
        mirrored[..., half:] *= -1
        found = w.rope(mirrored)
        found[..., half:] *= -1
        return found.reshape(value.shape)

    return change


def angles_in_bfloat16(part: str) -> Change:
    def change(value: Array, w: Workings) -> Array:
        x, d = w.normed(part), w.facts.head_dim
        frequency = np.float64(w.facts.rope_theta) ** (-np.arange(0, d, 2) / d)
        angles = np.outer(np.arange(len(x)), frequency)[:, None].astype(F32)
        return turned(x, bfloat16(angles)).reshape(value.shape)

    return change


def with_norm_of(part: str, other: str) -> Change:
    def change(value: Array, w: Workings) -> Array:
        x = w.qkv()["qk".index(part)]
        normed = w.rms_norm(x, w.weights[f"self_attn.{other}_norm.weight"])
        return w.rope(normed).reshape(value.shape)

    return change


def normed_over_heads(part: str) -> Change:
    """One root mean square for all heads."""

    def change(value: Array, w: Workings) -> Array:
        x = w.qkv()["qk".index(part)]
        size = np.sqrt((x * x).mean((-1, -2), keepdims=True) + F32(w.facts.eps))
        return w.rope(x / size * w.weights[f"self_attn.{part}_norm.weight"]).reshape(value.shape)

    return change


def kv_heads_reversed(value: Array, w: Workings) -> Array:
    q, k = w.heads("q_post_rope"), w.shared(w.heads("k_post_rope")[:, ::-1])
    return np.einsum("tnd,snd->nts", q, k) / F32(math.sqrt(w.facts.head_dim))


def with_sink(value: Array, w: Workings) -> Array:
    """One more in the denominator, as in models with attention sinks."""
    hidden = hidden_keys(value.shape[-1], w.facts.windows[w.layer])
    scores = np.where(hidden, -np.inf, w.stages["attn_scores"])
    peak = scores.max(-1, keepdims=True)
    shares = np.exp(scores - peak)
    return shares / (shares.sum(-1, keepdims=True) + np.exp(-peak))


def also_hidden(*places: tuple[Any, Any]) -> Change:
    def change(value: Array, w: Workings) -> Array:
        hidden = hidden_keys(value.shape[-1], w.facts.windows[w.layer])
        for place in places:
            hidden[place] = True
        return masked(value, w, hidden)

    return change


def with_values(change: Callable[[Array, Array], Array]) -> Change:
    def attention(value: Array, w: Workings) -> Array:
        _, k, v = w.qkv()
        mixed = np.einsum("nts,snd->tnd", w.stages["attn_softmax"], w.shared(change(v.copy(), k)))
        return mixed.reshape(value.shape)

    return attention


def without_last_head(value: Array, w: Workings) -> Array:
    value[:, -w.facts.head_dim :] = 0
    return value


def of_all_tokens_first(value: Array, w: Workings) -> Array:
    """The root mean square of the first token for all."""
    x = w.stages["post_attn_residual"]
    size = np.sqrt((x * x).mean(-1, keepdims=True)[:1] + F32(w.facts.eps))
    return x / size * w.weights[NORM_2]


def sample_variance(value: Array, w: Workings) -> Array:
    x = w.x
    mean = (x * x).sum(-1, keepdims=True) / (x.shape[-1] - 1)
    return x / np.sqrt(mean + F32(w.facts.eps)) * w.weights[NORM_1]


def tile_forgotten(weight: Array, w: Workings) -> Array:
    weight[:, -8:] = 0
    return weight


def column_off(weight: Array, w: Workings) -> Array:
    weight[:, 5] *= 1.01
    return weight


def clamped(value: Array, w: Workings) -> Array:
    limit = np.quantile(np.abs(value), 0.98)
    return np.clip(value, -limit, limit)


def last_two_exchanged(value: Array, w: Workings) -> Array:
    return np.concatenate([value[:-2], value[:-3:-1]])


def one_row_late(value: Array, w: Workings) -> Array:
    return np.concatenate([value[:1], value[:-1]])


def k_unbiased(value: Array, w: Workings) -> Array:
    q, k, _ = w.facts.qkv_sizes
    value[:, q : q + k] = w.stages["qkv_matmul"][:, q : q + k]
    return value


def of_the_token_before(value: Array, w: Workings) -> Array:
    rows = w.source.rows("lm_head.weight", range(w.facts.vocab)).numpy()
    return w.stages["final_norm"][-2] @ rows.T


def gate_of(function: Callable[[Array], Array]) -> Change:
    return lambda value, w: function(w.stages["ffn_gate"])


def plain_rope(pair: Pair) -> bool:
    return pair.oracle_facts.rope_scaling.kind == "none"


def grouped(pair: Pair) -> bool:
    return pair.oracle_facts.kv_heads > 1


SHAPED_FAULTS = (
    Fault(name="scores-soft-capped", like="soft cap of another family",
          changes={"attn_scores": lambda v, w: 3 * np.tanh(v / 3)}),
    Fault(name="kv-heads-reversed", like="heads counted from the end", needs=grouped,
          changes={"attn_scores": kv_heads_reversed}),
    Fault(name="scores-scaled-twice", like="1/sqrt(D) folded into Q, and applied again",
          changes={"attn_scores": lambda v, w: v / F32(math.sqrt(w.facts.head_dim))}),
    Fault(name="rope-on-half-of-the-pairs", like="partial_rotary_factor of another family",
          changes={"q_post_rope": partly_rotated("q"), "k_post_rope": partly_rotated("k")}),
    Fault(name="rope-backwards", like="sign of the sine",
          changes={"q_post_rope": rotated_back("q"), "k_post_rope": rotated_back("k")}),
    Fault(name="rope-twice-on-k", like="K rotated again when it is read from the cache",
          changes={"k_post_rope": lambda v, w: w.rope(w.rope(w.normed("k"))).reshape(v.shape)}),
    Fault(name="rope-angles-in-bfloat16", like="positions cast with the model", needs=plain_rope,
          changes={"q_post_rope": angles_in_bfloat16("q"),
                   "k_post_rope": angles_in_bfloat16("k")}),
    Fault(name="rope-k-one-late", like="K's position advanced before it is stored", changes={
        "k_post_rope": lambda v, w: w.rope(w.normed("k"), shift=1).reshape(v.shape)}),
    Fault(name="softmax-with-sink", like="attention sinks of another family",
          changes={"attn_softmax": with_sink}),
    Fault(name="last-query-blind-to-itself", like="length not advanced for the last token",
          changes={"attn_softmax": also_hidden((-1, -1))}),
    Fault(name="first-key-evicted", like="a ring buffer one slot short",
          changes={"attn_softmax": also_hidden((slice(2, None), 0))}),
    Fault(name="softmax-temperature", like="1 % on the scores within a fused kernel", changes={
        "attn_softmax": lambda v, w: softmax(np.where(
            hidden_keys(v.shape[-1], w.facts.windows[w.layer]), -np.inf,
            w.stages["attn_scores"] * F32(0.97)))}),
    Fault(name="values-are-keys", like="two buffers of one size",
          changes={"attention": with_values(lambda v, k: k)}),
    Fault(name="value-of-last-token-stale", like="V written after attention ran",
          changes={"attention": with_values(lambda v, k: np.concatenate([v[:-1], 0 * v[-1:]]))}),
    Fault(name="last-head-zero", like="a grid one block short",
          changes={"attention": without_last_head}),
    Fault(name="norm-divides-by-n-minus-1", like="sample variance",
          changes={"attn_norm": sample_variance}),
    Fault(name="gamma-applied-twice", like="gamma folded into the next matrix, and applied",
          changes={"ffn_norm": lambda v, w: v * w.weights[NORM_2]}),
    Fault(name="norm-of-first-token", like="a broadcast over the wrong axis",
          changes={"ffn_norm": of_all_tokens_first}),
    Fault(name="gamma-of-one-channel", like="a corrupted element",
          changes={"attn_norm": channel(11, 1.05)}),
    Fault(name="norm-of-the-other-place", like="two norms exchanged by name",
          changes={"ffn_norm": norm(NORM_1, "post_attn_residual")}),
    Fault(name="o-proj-tile-forgotten", like="columns beyond the last full tile",
          changes={"attn_out": weight_of(OUT, tile_forgotten)}),
    Fault(name="down-tile-forgotten", like="columns beyond the last full tile",
          changes={"ffn_out": weight_of(DOWN, tile_forgotten)}),
    Fault(name="gate-column-1-percent", like="an outlier column kept apart, and scaled",
          changes={"ffn_gate": weight_of(GATE, column_off)}),
    Fault(name="up-last-row-zero", like="rows beyond the last full tile",
          changes={"ffn_up": channel(-1, 0.0)}),
    Fault(name="up-one-row-late", like="a buffer read one token late",
          changes={"ffn_up": one_row_late}),
    Fault(name="swiglu-clamped", like="clamp of another family", changes={"ffn_swigl": clamped}),
    Fault(name="swiglu-of-up-plus-1", like="(up + 1) of another family", changes={
        "ffn_swigl": lambda v, w: w.stages["ffn_silu"] * (w.stages["ffn_up"] + 1)}),
    Fault(name="relu-squared", like="activation of another family",
          changes={"ffn_silu": gate_of(lambda x: np.maximum(x, 0) ** 2)}),
    Fault(name="hard-swish", like="a cheap sigmoid",
          changes={"ffn_silu": gate_of(lambda x: x * np.clip(x / 6 + 0.5, 0, 1))}),
    Fault(name="silu-beta", like="swish with beta 1.05",
          changes={"ffn_silu": gate_of(lambda x: x / (1 + np.exp(-1.05 * x)))}),
    Fault(name="residual-halved", like="residual multiplier of another family", changes={
        "post_ffn_residual": lambda v, w: w.stages["post_attn_residual"] + 0.5 * w.stages["ffn_out"]
    }),
    Fault(name="residual-is-normed", like="residual taken behind the norm", changes={
        "post_attn_residual": lambda v, w: w.stages["attn_norm"] + w.stages["attn_out"]}),
    Fault(name="last-tokens-exchanged", like="rows scattered in another order",
          changes={"post_ffn_residual": last_two_exchanged}),
    Fault(name="k-bias-missing", like="one of three biases", needs=has_bias,
          changes={"qkv_bias": k_unbiased}),
    Fault(name="qkv-one-column-off", like="a stride one short",
          changes={"qkv_matmul": lambda v, w: np.roll(v, -1, axis=-1)}),
    Fault(name="qk-norms-exchanged", like="two norms exchanged by name", needs=has_qk_norm,
          changes={"q_post_rope": with_norm_of("q", "k"), "k_post_rope": with_norm_of("k", "q")}),
    Fault(name="qk-norm-over-all-heads", like="OLMo's QK-norm",
          needs=lambda pair: has_qk_norm(pair) and grouped(pair),
          changes={"q_post_rope": normed_over_heads("q"), "k_post_rope": normed_over_heads("k")}),
    Fault(name="last-token-1.5-percent", like="a path of its own for the last token", changes={
        "ffn_out": lambda v, w: np.concatenate([v[:-1], v[-1:] * F32(1.015)])}),
    Fault(name="logits-by-temperature", like="sampling's temperature",
          changes={"lm_head": scaled(1 / 0.9)}, layer=None),
    Fault(name="logits-of-the-token-before", like="an index off by one",
          changes={"lm_head": of_the_token_before}, layer=None),
    Fault(name="final-norm-of-one-token", like="0.1 % on the last token", layer=None, changes={
        "final_norm": lambda v, w: np.concatenate([v[:-1], v[-1:] * F32(1.001)])}),
    Fault(name="embedding-times-root-of-hidden", like="embedding scale of another family", layer=0,
          changes={"embedding": lambda v, w: v * F32(math.sqrt(w.facts.hidden))}),
    Fault(name="embedding-tokens-exchanged", like="rows gathered in another order", layer=0,
          changes={"embedding": last_two_exchanged}),
    Fault(name="embedding-channel", like="a corrupted column", layer=0,
          changes={"embedding": channel(3, 1.02)}),
)  # fmt: skip
"""Planted like those of ``corpus``."""
