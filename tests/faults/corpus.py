"""Planted faults, each named after the bug it stands for, and the stages in which it is born.

A fault changes one stage's right value into the wrong one while the engine runs, so that all that
follows is computed from it. Numbers in comments are those of real bugs with such a signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pytest_aprt.architectures import EMBEDDING
from pytest_aprt.pair import Pair
from pytest_aprt.testing import Array, Change, Workings, hidden_keys, softmax


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One bug.

    ``changes`` maps the stages in which it is born to what goes wrong there. ``layer`` is where it
    is planted: a layer, -1 for all of them, None for the whole-model stages. ``like`` is the kind
    of real bug that it stands for. A ``movable`` one may be
    planted in any layer and in all. ``needs`` says what a family must have for the bug to exist.
    """

    name: str
    changes: Mapping[str, Change]
    like: str
    layer: int | None = 2
    movable: bool = True
    needs: Callable[[Pair], bool] = lambda pair: True


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


def subscales(weight: Array, w: Workings) -> Array:
    """The last of every eight sub-blocks of 32 gets its neighbour's scale, about 10 % off."""
    blocks = weight.reshape(len(weight), -1, 32)
    blocks[:, 7::8] *= 1.1
    return weight


def interleaved(weight: Array, w: Workings) -> Array:
    """Low and high nibbles of a block of 32 in turn instead of in halves."""
    blocks = weight.reshape(len(weight), -1, 2, 16)
    return blocks.swapaxes(2, 3).reshape(weight.shape)


def tail_zero(weight: Array, w: Workings) -> Array:
    weight[-1, -32:] = 0
    return weight


def read_transposed(weight: Array, w: Workings) -> Array:
    """(N, K) rows read as (K, N)."""
    return weight.reshape(weight.shape[::-1]).T


def qkv(change: Callable[[list[Array]], list[Array]]) -> Change:
    """The projections of Q, K and V with other weights."""

    def project(value: Array, w: Workings) -> Array:
        parts = [w.weights[f"self_attn.{p}_proj.weight"].copy() for p in "qkv"]
        return w.stages["attn_norm"] @ np.concatenate(change(parts)).T

    return project


def with_bias(change: Callable[[list[Array]], list[Array]]) -> Change:
    def add(value: Array, w: Workings) -> Array:
        parts = [w.weights[f"self_attn.{p}_proj.bias"].copy() for p in "qkv"]
        return w.stages["qkv_matmul"] + np.concatenate(change(parts))

    return add


def normed_without(part: str, **how) -> Change:
    """Q or K without its norm."""
    return lambda value, w: w.rope(w.qkv()["qk".index(part)], **how).reshape(value.shape)


def norm_after_rope(part: str) -> Change:
    def change(value: Array, w: Workings) -> Array:
        turned = w.rope(w.qkv()["qk".index(part)])
        return w.rms_norm(turned, w.weights[f"self_attn.{part}_norm.weight"]).reshape(value.shape)

    return change


def but_first(change: Change) -> Change:
    """Position 0 is right, the others are not."""

    def late(value: Array, w: Workings) -> Array:
        return np.concatenate([value[:1], change(value, w)[1:]])

    return late


def restarted(part: str) -> Change:
    """Positions start again at 0 in the middle of the prompt, as in a second batch."""

    def change(value: Array, w: Workings) -> Array:
        x, half = w.normed(part), len(value) // 2
        return np.concatenate([w.rope(x[:half]), w.rope(x[half:])]).reshape(value.shape)

    return change


def raw_k_scores(value: Array, w: Workings) -> Array:
    """The cache holds K before RoPE."""
    q, k = w.heads("q_post_rope"), w.shared(w.normed("k"))
    scale = np.float32(w.facts.head_dim**0.5)
    return np.stack([q[:, h] @ k[:, h].T for h in range(w.facts.heads)]) / scale


def with_slopes(value: Array, w: Workings) -> Array:
    """ALiBi slopes where there are none."""
    t = value.shape[-1]
    distance = np.arange(t)[None, :] - np.arange(t)[:, None]
    slopes = 2.0 ** -np.arange(1, len(value) + 1)
    return value + slopes[:, None, None] * distance


def masked(value: Array, w: Workings, hidden: Array) -> Array:
    return softmax(np.where(hidden, -np.inf, w.stages["attn_scores"]))


def windowed(size: int) -> Change:
    return lambda value, w: masked(value, w, hidden_keys(value.shape[-1], size))


def zeros_counted(value: Array, w: Workings) -> Array:
    """Four preallocated keys of zeros take their share of the softmax."""
    scores = np.where(hidden_keys(value.shape[-1], None), -np.inf, w.stages["attn_scores"])
    padded = np.concatenate([scores, np.zeros((*scores.shape[:-1], 4), np.float32)], axis=-1)
    return softmax(padded)[..., :-4]


def over_queries(value: Array, w: Workings) -> Array:
    hidden = hidden_keys(value.shape[-1], None)
    turned = np.where(hidden, -np.inf, w.stages["attn_scores"]).swapaxes(1, 2)
    return softmax(turned).swapaxes(1, 2)


def first_kv_head_only(value: Array, w: Workings) -> Array:
    """Only head 0 was copied to the cache: the others read zeros."""
    p, v = w.stages["attn_softmax"], w.qkv()[2].copy()
    v[:, 1:] = 0
    v = w.shared(v)
    return np.stack([p[h] @ v[:, h] for h in range(len(p))], axis=1).reshape(value.shape)


def one_slot_late(value: Array, w: Workings) -> Array:
    """Values are read one cache slot too late."""
    p, v = w.stages["attn_softmax"], w.shared(np.roll(w.qkv()[2], 1, axis=0))
    return np.stack([p[h] @ v[:, h] for h in range(len(p))], axis=1).reshape(value.shape)


def half_sums(value: Array, w: Workings) -> Array:
    """Partial sums kept in float16: each product is right, their sum is not."""
    x, weight = w.stages["ffn_swigl"], w.weights[DOWN]
    total = np.zeros(value.shape, np.float16)
    for k in range(0, x.shape[1], 8):
        total += (x[:, k : k + 8] @ weight[:, k : k + 8].T).astype(np.float16)
    return total.astype(np.float32)


def quick_gelu(value: Array, w: Workings) -> Array:
    x = w.stages["ffn_gate"]
    return x / (1 + np.exp(-1.702 * x))


def normed_again(value: Array, w: Workings) -> Array:
    return w.rms_norm(value, w.weights[NORM_2])


def tied_head(value: Array, w: Workings) -> Array:
    rows = w.source.rows(EMBEDDING, range(w.facts.vocab)).numpy()
    return w.stages["final_norm"][-1] @ rows.T


def next_row(value: Array, w: Workings) -> Array:
    rows = w.source.rows(EMBEDDING, range(w.facts.vocab)).numpy()
    index = [int(np.abs(rows - x).sum(-1).argmin()) for x in value / w.embedding_scale]
    return rows[np.array(index) - 1] * np.float32(w.embedding_scale)


def soft_cap(value: Array, w: Workings) -> Array:
    return 10 * np.tanh(value / 10)


def has_bias(pair: Pair) -> bool:
    return pair.architecture.qkv_bias


def has_qk_norm(pair: Pair) -> bool:
    return pair.architecture.qk_norm


def scales_rope(pair: Pair) -> bool:
    return pair.oracle_facts.rope_scaling.kind != "none"


def is_untied(pair: Pair) -> bool:
    return not pair.oracle_facts.tied_embeddings


def turns_halves(pair: Pair) -> bool:
    return pair.architecture.rotated_pairs == "half"


GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
OUT = "self_attn.o_proj.weight"
NORM_1, NORM_2 = "input_layernorm.weight", "post_attention_layernorm.weight"

FAULTS = (
    # rotary embedding
    Fault(name="rope-theta-10k", like="theta of another model",
          changes=rope(theta=10_000.0)),
    Fault(name="rope-neighbour-pairs", like="NEOX against NORM pairing",
          changes=rope(pairs="adjacent"), needs=turns_halves),
    Fault(name="rope-off-by-one", like="positions start at 1; attention itself is unchanged",
          changes=rope(shift=1)),
    Fault(name="rope-restarts", like="positions start again with every batch",
          changes={"q_post_rope": restarted("q"), "k_post_rope": restarted("k")}),
    Fault(name="rope-absent", like="a kernel that falls back to its input",
          changes={"q_post_rope": unrotated("q"), "k_post_rope": unrotated("k")}),
    Fault(name="rope-absent-on-k", like="K cached before RoPE, and dumped so",
          changes={"k_post_rope": unrotated("k")}),
    Fault(name="rope-scaling-ignored", like="rope_freqs.weight not read",
          changes=rope(scaling=False), needs=scales_rope),
    Fault(name="qk-norm-missing", like="QK-norm not implemented",
          changes={"q_post_rope": normed_without("q"), "k_post_rope": normed_without("k")},
          needs=has_qk_norm),
    Fault(name="qk-norm-missing-after-first", like="QK-norm missing in batched prefill only",
          changes={"k_post_rope": but_first(normed_without("k"))}, needs=has_qk_norm),
    Fault(name="qk-norm-after-rope", like="order of norm and rotation",
          changes={"q_post_rope": norm_after_rope("q")}, needs=has_qk_norm),
    # projections of Q, K and V, and their biases
    Fault(name="qkv-ten-times-small", like="grid dimensions of a GEMM exchanged",
          changes={"qkv_matmul": scaled(0.1)}),
    Fault(name="q-transposed", like="weight transposed twice",
          changes={"qkv_matmul": qkv(lambda p: [read_transposed(p[0], None), *p[1:]])}),
    Fault(name="k-and-v-exchanged", like="fused QKV split in the wrong order",
          changes={"qkv_matmul": qkv(lambda p: [p[0], p[2], p[1]])}),
    Fault(name="qkv-bias-missing", like="bias not loaded", needs=has_bias,
          changes={"qkv_bias": lambda v, w: w.stages["qkv_matmul"]}),
    Fault(name="qkv-bias-twice", like="bias fused and added", needs=has_bias,
          changes={"qkv_bias": with_bias(lambda p: [2 * x for x in p])}),
    Fault(name="v-bias-missing", like="one of three biases under another name", needs=has_bias,
          changes={"qkv_bias": with_bias(lambda p: [p[0], p[1], 0 * p[2]])}),
    # norms
    Fault(name="norm-eps-1e-3", like="eps key missed", layer=0, movable=False,
          changes={"attn_norm": norm(NORM_1, None, eps=1e-3)}),
    Fault(name="norm-eps-1e-5", like="eps of another family", layer=0, movable=False,
          changes={"attn_norm": norm(NORM_1, None, eps=1.1e-5)}),
    Fault(name="layer-norm-for-rms-norm", like="LayerNorm for RMSNorm",
          changes={"ffn_norm": layer_norm}),
    Fault(name="norm-weight-minus-one", like="gamma stored minus one", changes={
        "ffn_norm": lambda v, w: v * (w.weights[NORM_2] - 1) / w.weights[NORM_2]}),
    Fault(name="norm-weight-of-another", like="norms exchanged",
          changes={"attn_norm": norm(NORM_2, None)}),
    # scores and softmax
    Fault(name="scale-missing", like="1/sqrt(head_dim) missing; cosine stays 1",
          changes={"attn_scores": scaled(8.0)}),
    Fault(name="kv-heads-by-modulo", like="grouped-query index",
          changes={"attn_scores": scores_by_modulo}),
    Fault(name="k-cached-before-rope", like="K cached before RoPE",
          changes={"attn_scores": raw_k_scores}),
    Fault(name="alibi-slopes", like="ALiBi where there is none",
          changes={"attn_scores": with_slopes}),
    Fault(name="causal-mask-missing", like="no causal mask",
          changes={"attn_softmax": unmasked}),
    Fault(name="mask-one-key-short", like="mask off by one",
          changes={"attn_softmax": one_key_short}),
    Fault(name="window-of-four", like="sliding window where there is none",
          changes={"attn_softmax": windowed(4)}),
    Fault(name="cache-zeros-counted", like="preallocated zeros counted as length",
          changes={"attn_softmax": zeros_counted}),
    Fault(name="softmax-over-queries", like="softmax along the wrong axis",
          changes={"attn_softmax": over_queries}),
    # attention
    Fault(name="values-by-modulo", like="grouped-query index of V",
          changes={"attention": values_by_modulo}),
    Fault(name="first-kv-head-only", like="scatter copies head 0 only",
          changes={"attention": first_kv_head_only}),
    Fault(name="one-slot-late", like="cache slot off by one",
          changes={"attention": one_slot_late}),
    Fault(name="heads-swapped", like="order of heads", changes={"attention": heads_swapped}),
    Fault(name="heads-transposed", like="layout when heads are joined",
          changes={"attention": heads_transposed}),
    Fault(name="one-head-zero", like="a head's buffer never written", changes={
        "attention": lambda v, w: v * (np.arange(v.shape[1]) >= w.facts.head_dim)}),
    # other projections
    Fault(name="o-proj-transposed", like="rows read as columns",
          changes={"attn_out": weight_of(OUT, read_transposed)}),
    Fault(name="extra-norm", like="a norm applied from a wrongly matched weight",
          changes={"attn_out": normed_again}),
    Fault(name="matrix-3-percent", like="a scale slightly off",
          changes={"ffn_up": weight_of(UP, lambda x, w: x * 1.03)}),
    Fault(name="bad-quant-block", like="one block dequantised wrongly",
          changes={"ffn_gate": weight_of(GATE, bad_block)}),
    Fault(name="sub-block-scales", like="scales of 1 in 8 sub-blocks",
          changes={"ffn_up": weight_of(UP, subscales)}),
    Fault(name="nibbles-interleaved", like="element order within a block",
          changes={"ffn_gate": weight_of(GATE, interleaved)}),
    Fault(name="tail-block-zero", like="size of a tensor by floor division",
          changes={"ffn_out": weight_of(DOWN, tail_zero)}),
    Fault(name="rows-rolled", like="row offset",
          changes={"ffn_out": weight_of(DOWN, lambda x, w: np.roll(x, 1, 0))}),
    Fault(name="int8-inputs", like="inputs rounded to int8 with one scale a token",
          changes={"ffn_out": int8_inputs(DOWN, "ffn_swigl")}),
    Fault(name="half-precision-sums", like="accumulator of 16 bits",
          changes={"ffn_out": half_sums}),
    # the gated FFN
    Fault(name="gate-and-up-exchanged", like="fused gate and up in the wrong order", changes={
        "ffn_gate": weight_of(UP, lambda x, w: x),
        "ffn_up": weight_of(GATE, lambda x, w: x)}),
    Fault(name="gelu-for-silu", like="activation of another family", changes={"ffn_silu": gelu}),
    Fault(name="quick-gelu-for-silu", like="sigmoid of 1.702 x",
          changes={"ffn_silu": quick_gelu}),
    Fault(name="silu-on-up", like="activation on the wrong projection", changes={
        "ffn_silu": lambda v, w: w.stages["ffn_up"] / (1 + np.exp(-w.stages["ffn_up"]))}),
    Fault(name="gate-missing", like="ungated FFN",
          changes={"ffn_swigl": lambda v, w: w.stages["ffn_up"]}),
    Fault(name="channel-sign", like="one channel's sign", changes={"ffn_swigl": channel(7, -1.0)}),
    # residuals
    Fault(name="residual-missing", like="residual not added", changes={
        "post_attn_residual": lambda v, w: w.stages["attn_out"]}),
    Fault(name="residual-doubled", like="residual added twice", changes={
        "post_ffn_residual": lambda v, w: v + w.stages["post_attn_residual"]}),
    Fault(name="residual-before-attention", like="residual from the wrong place", changes={
        "post_ffn_residual": lambda v, w: w.x + w.stages["ffn_out"]}),
    Fault(name="layer-is-no-op", like="stream race: output is input",
          changes={"post_ffn_residual": lambda v, w: w.x}),
    Fault(name="one-token-stale", like="a row never written",
          changes={"attn_out": token(3, 0.0)}),
    Fault(name="small-on-all-but-first", like="0.1 % on every token but the first",
          changes={"ffn_out": all_but_first(1.001)}),
    Fault(name="three-percent-but-first", like="a path taken from the second token on",
          changes={"ffn_norm": all_but_first(1.03)}),
    # values that are no numbers
    Fault(name="nan-in-k", like="NaN from an uninitialised buffer",
          changes={"k_post_rope": element(np.nan)}, movable=False),
    Fault(name="inf-in-gate", like="overflow", changes={"ffn_gate": element(np.inf)},
          movable=False),
    # the ends
    Fault(name="embedding-row", like="one token's row", changes={"embedding": token(2, 1.05)},
          layer=0),
    Fault(name="embedding-next-row", like="token ids off by one",
          changes={"embedding": next_row}, layer=0),
    Fault(name="embedding-scaled", like="embedding scale of another family",
          changes={"embedding": scaled(16.0)}, layer=0),
    Fault(name="final-norm-weight", like="final norm 0.2 % off",
          changes={"final_norm": scaled(1.002)}, layer=None),
    Fault(name="final-norm-skipped", like="final norm not applied",
          changes={"final_norm": lambda v, w: w.x}, layer=None),
    Fault(name="head-rolled", like="rows of the head off by one",
          changes={"lm_head": lambda v, w: np.roll(v, 1)}, layer=None),
    Fault(name="head-last-element", like="tail of the vocabulary",
          changes={"lm_head": channel(-1, 1.01)}, layer=None),
    Fault(name="head-tied", like="embedding used for a head of its own",
          changes={"lm_head": tied_head}, layer=None, needs=is_untied),
    Fault(name="head-soft-cap", like="soft cap of another family",
          changes={"lm_head": soft_cap}, layer=None),
    # several at once, or everywhere
    Fault(name="two-at-once", like="two independent bugs", changes={
        "attn_norm": norm(NORM_2, None), "ffn_silu": gelu}),
    Fault(name="three-at-once", like="three independent bugs", changes={
        "k_post_rope": unrotated("k"), "attention": heads_swapped,
        "ffn_up": weight_of(UP, lambda x, w: x * 1.03)}),
    Fault(name="rope-theta-everywhere", like="theta of another model, every layer",
          changes=rope(theta=10_000.0), layer=-1),
    Fault(name="gelu-everywhere", like="activation of another family, every layer",
          changes={"ffn_silu": gelu}, layer=-1),
    Fault(name="int8-inputs-everywhere", like="rounding to int8 in every layer", layer=-1,
          changes={"ffn_out": int8_inputs(DOWN, "ffn_swigl")}),
    Fault(name="matrix-3-percent-everywhere", like="a scale slightly off in every layer", layer=-1,
          changes={"ffn_up": weight_of(UP, lambda x, w: x * 1.03)}),
)  # fmt: skip
