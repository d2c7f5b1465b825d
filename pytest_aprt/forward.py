"""The forward pass of a GGUF model, from its metadata and weights alone: the builtin engine.

One function per stage, in computation order, to be read against the papers: RMSNorm (arXiv
1910.07467), RoPE (2104.09864), YaRN (2309.00071), grouped-query attention (2305.13245), SwiGLU
(2002.05202). Symbols: T tokens, H hidden, I intermediate, n heads, g kv heads, D head_dim.
Everything is float32. Nothing here is shared with the oracle or with the replay, unless the oracle
is an engine (``preludes``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM, Architecture
from pytest_aprt.capture import LayerStages
from pytest_aprt.facts import Facts, RopeScaling
from pytest_aprt.matrices import together, until
from pytest_aprt.strips import joined, rows, stripped
from pytest_aprt.weights import WeightSource, logits, times


class BuiltinRunner:
    """Runs a GGUF model layer by layer and yields every stage."""

    name = "builtin"
    arithmetic = "float32"

    def __init__(self, weights: WeightSource, facts: Facts, architecture: Architecture) -> None:
        self._weights, self._facts, self._architecture = weights, facts, architecture
        self.stages: dict[str, Tensor] = {}
        """Those of the layer in progress, so far: others may multiply by its weights with it."""

    @torch.no_grad()
    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Yield the stages of every layer, then of the whole model."""
        facts = self._facts
        x = embedding(self._weights, tokens, self._architecture.embedding_scale(facts.hidden))
        angles, stretch = rope_angles(facts, len(tokens))
        for index in range(facts.layers):
            stages = self.stages = {"embedding": x} if index == 0 else {}
            mask = causal_mask(len(tokens), facts.windows[index])
            layer(stages, x, self._weights.layer(index), angles, stretch, mask, facts,
                  self._architecture)  # fmt: skip
            x = stages["post_ffn_residual"]
            yield LayerStages(index, stages)
        final = rms_norm(x, self._weights.tensor(FINAL_NORM), facts.eps, self._architecture)
        stages = self.stages = {"final_norm": final}
        stages["lm_head"] = logits(self._weights, final[-1:], facts.vocab)[0]
        yield LayerStages(None, stages)

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], forced: Sequence[int]) -> Iterator[list[LayerStages]]:
        """Prefill ``tokens``, then yield the stages of one step with the KV cache per forced token.

        Prompt and steps take each layer side by side, each waiting for the cache of the one before
        it alone, as none waits for logits: weights are read once for all of them.
        """
        facts, count = self._facts, len(tokens)
        scale = self._architecture.embedding_scale(facts.hidden)
        x = embedding(self._weights, [*tokens, *forced], scale)
        inputs = x.split([count, *(1 for _ in forced)])  # (T, H), then (1, H) each
        angles, stretch = rope_angles(facts, len(x))
        found: list[list[LayerStages]] = [[] for _ in forced]

        def run(index: int, cache: Cache, turn: int) -> dict[str, Tensor]:
            x, end = inputs[turn], count + turn
            at = slice(end - len(x), end)
            stages = {"embedding": x} if index == 0 else {}
            mask = causal_mask(end, facts.windows[index])[at]
            layer(stages, x, self._weights.layer(index), angles[at], stretch, mask, facts,
                  self._architecture, partial(cache.extend, turn))  # fmt: skip
            return stages

        for index in range(facts.layers):
            cache = Cache()
            outputs = together([partial(run, index, cache, turn) for turn in range(len(inputs))])
            inputs = tuple(stages["post_ffn_residual"] for stages in outputs)
            for layers, stages in zip(found, outputs[1:], strict=True):
                # A product is a view of what was formed for all, which would stay with it.
                own = {name: value.clone() for name, value in stages.items()}
                layers.append(LayerStages(index, own))
        final = rms_norm(torch.cat(inputs[1:]), self._weights.tensor(FINAL_NORM), facts.eps,
                         self._architecture)  # fmt: skip
        head = logits(self._weights, final, facts.vocab)
        for step, layers in enumerate(found):
            whole = {"final_norm": final[step : step + 1], "lm_head": head[step]}
            yield [*layers, LayerStages(None, whole)]


class Cache:
    """K and V of one layer, (S, g, D), which the prompt and then each step extend in their turn."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def extend(self, turn: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add K and V of some tokens once those before are there, and return all."""
        until(lambda: len(self._keys) == turn)
        self._keys.append(k)
        self._values.append(v)
        return torch.cat(self._keys), torch.cat(self._values)


def layer(
    stages: dict[str, Tensor],
    x: Tensor,  # (T, H)
    w: Mapping[str, Tensor],
    angles: Tensor,  # (T, D/2)
    stretch: float,
    mask: Tensor,  # (T, T), with a cache of S tokens (T, S+T)
    f: Facts,
    a: Architecture,
    extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Fill ``stages`` with one decoder layer applied to ``x``.

    ``extend`` is given K and V of the T tokens, (T, g, D), and returns those of all, (S+T, g, D).
    """
    s = stages
    n, g, d = f.heads, f.kv_heads, f.head_dim

    s["attn_norm"] = rms_norm(x, w["input_layernorm.weight"], f.eps, a)  # (T, H)
    s["qkv_matmul"] = torch.cat(
        [times(w, f"self_attn.{p}_proj.weight", s["attn_norm"]) for p in "qkv"], dim=-1
    )  # (T, (n+2g)D)
    qkv = s["qkv_matmul"]
    if a.qkv_bias:
        qkv = qkv + torch.cat([w[f"self_attn.{p}_proj.bias"] for p in "qkv"])
        s["qkv_bias"] = qkv
    q, k, v = qkv.split(f.qkv_sizes, dim=-1)
    q, k, v = q.unflatten(-1, (n, d)), k.unflatten(-1, (g, d)), v.unflatten(-1, (g, d))
    if a.qk_norm:
        q = rms_norm(q, w["self_attn.q_norm.weight"], f.eps, a)
        k = rms_norm(k, w["self_attn.k_norm.weight"], f.eps, a)
    q = rotate(q, angles, stretch, a)  # (T, n, D)
    k = rotate(k, angles, stretch, a)  # (T, g, D)
    s["q_post_rope"], s["k_post_rope"] = q.flatten(1), k.flatten(1)
    if extend is not None:
        k, v = extend(k, v)  # (S+T, g, D)

    shared = torch.arange(n) // (n // g)  # the kv head that each head reads
    keys, values = k[:, shared], v[:, shared]  # (T, n, D)

    def scores(t: range) -> Tensor:  # of some queries: (n, t, T)
        return torch.einsum("tnd,snd->nts", q[t.start : t.stop], keys) / math.sqrt(d)

    def probabilities(t: range) -> Tensor:
        return torch.softmax(rows(scored, t) + mask[t.start : t.stop], dim=-1)

    def mix(p: Tensor, t: range) -> Tensor:
        return torch.einsum("nts,snd->tnd", p, values).flatten(1)

    s["attn_scores"] = scored = stripped((n, len(q), len(k)), scores)  # (n, T, T)
    s["attn_softmax"] = stripped((n, len(q), len(k)), probabilities)  # (n, T, T)
    s["attention"] = joined(s["attn_softmax"], mix)  # (T, nD)
    s["attn_out"] = times(w, "self_attn.o_proj.weight", s["attention"])  # (T, H)
    s["post_attn_residual"] = x + s["attn_out"]

    s["ffn_norm"] = rms_norm(
        s["post_attn_residual"], w["post_attention_layernorm.weight"], f.eps, a
    )
    s["ffn_gate"] = times(w, "mlp.gate_proj.weight", s["ffn_norm"])  # (T, I)
    s["ffn_up"] = times(w, "mlp.up_proj.weight", s["ffn_norm"])  # (T, I)
    s["ffn_silu"] = ACTIVATIONS[f.activation](s["ffn_gate"])
    s["ffn_swigl"] = s["ffn_silu"] * s["ffn_up"]
    s["ffn_out"] = times(w, "mlp.down_proj.weight", s["ffn_swigl"])  # (T, H)
    s["post_ffn_residual"] = s["post_attn_residual"] + s["ffn_out"]


TANH_SCALE = math.sqrt(2 / math.pi)  # arXiv 1606.08415
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + torch.tanh(TANH_SCALE * (x + 0.044715 * x**3))) / 2,
}


def embedding(weights: WeightSource, tokens: Sequence[int], scale: float) -> Tensor:
    """Return the rows of the token embedding: (T, H)."""
    rows = weights.rows(EMBEDDING, tokens)
    return rows if scale == 1.0 else rows * scale


def rms_norm(x: Tensor, gamma: Tensor, eps: float, a: Architecture) -> Tensor:
    """Return ``x / rms(x) * gamma`` over the last axis."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scaled * (gamma + a.norm_offset if a.norm_offset else gamma)


def rope_angles(facts: Facts, tokens: int) -> tuple[Tensor, float]:
    """Return the rotation of each pair at each position, (T, D/2), and the factor on cos and sin.

    Angles are formed in float64: in float32 position 30,000 would be off by a thousandth.
    """
    pairs = torch.arange(facts.head_dim // 2, dtype=torch.float64)
    frequency = facts.rope_theta ** (-2 * pairs / facts.head_dim)
    scaling = facts.rope_scaling
    if scaling.divisors:
        frequency = frequency / torch.tensor(scaling.divisors, dtype=torch.float64)
    elif scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "yarn":
        kept = yarn_kept(scaling, facts, pairs)
        frequency = frequency * kept + frequency / scaling.factor * (1 - kept)
    positions = torch.arange(tokens, dtype=torch.float64)
    return torch.outer(positions, frequency), scaling.attention_factor


def yarn_kept(scaling: RopeScaling, facts: Facts, pairs: Tensor) -> Tensor:
    """Return the share of each pair's frequency that YaRN leaves unstretched, 0 to 1: (D/2,)."""

    def pair_of(turns: float) -> float:  # the pair that turns so often within the context
        ratio = scaling.original_context / (turns * 2 * math.pi)
        return facts.head_dim * math.log(ratio) / (2 * math.log(facts.rope_theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), facts.head_dim - 1)
    return 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x: Tensor, angles: Tensor, stretch: float, a: Architecture) -> Tensor:
    """Return (T, heads, D) with every pair of channels turned by its angle."""
    cos, sin = ((f(angles) * stretch).float()[:, None] for f in (torch.cos, torch.sin))
    half = x.shape[-1] // 2
    if a.rotated_pairs == "half":
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2)


def causal_mask(tokens: int, window: int | None) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere: (T, T)."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    hidden = key > query
    if window is not None:
        hidden = hidden | (key <= query - window)
    return torch.zeros(tokens, tokens).masked_fill(hidden, -math.inf)
