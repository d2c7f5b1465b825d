"""Faults of decoding with a KV cache, planted in an engine that decodes step after step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pytest_aprt import forward
from pytest_aprt.architectures import FINAL_NORM
from pytest_aprt.pair import Pair
from pytest_aprt.weights import logits

Cache = tuple[torch.Tensor, torch.Tensor]


@dataclass
class State:
    """Where a decoding engine stands: one cache per layer, and what it has been given."""

    pair: Pair
    caches: list[Cache]
    count: int  # tokens of the prompt
    step: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CacheFault:
    """One bug; it breaks ``step`` first, at ``point``.

    ``position`` of a step's token; ``read`` and ``write`` change what a layer finds in the cache
    and what it leaves there; ``token`` is what is fed; ``said`` changes the logits.
    """

    name: str
    like: str
    step: int
    point: str
    needs_window: bool = False
    position: Callable[[int, int], int] = lambda count, step: count + step
    read: Callable[[State, int, Cache], Cache] = lambda state, layer, cache: cache
    write: Callable[[State, int, Cache, Cache], Cache] = lambda state, layer, old, new: new
    token: Callable[[Sequence[int], int], int] = lambda forced, step: forced[step]
    window: Callable[[int | None], int | None] = lambda window: window
    said: Callable[[State, torch.Tensor], torch.Tensor] = lambda state, logits: logits


HEALTHY = CacheFault(name="healthy", like="", step=0, point="")


class Decoder:
    """The builtin engine's layers, decoded step after step with a cache per layer."""

    def __init__(self, pair: Pair, fault: CacheFault = HEALTHY) -> None:
        self.pair, self.fault = pair, fault
        self._runner = forward.BuiltinRunner(
            pair.model_weights, pair.model_facts, pair.architecture
        )
        self.layers = self._runner.layers

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], forced: Sequence[int]) -> Any:
        state = State(self.pair, [], len(tokens))
        self._run(state, tokens, 0)
        for state.step in range(len(forced)):
            token = self.fault.token(forced, state.step)
            position = self.fault.position(len(tokens), state.step)
            yield self._run(state, [token], position)

    def _run(self, state: State, tokens: Sequence[int], position: int) -> list[Any]:
        pair, fault = self.pair, self.fault
        facts, row = pair.model_facts, pair.architecture
        x = forward.embedding(pair.model_weights, tokens, row.embedding_scale(facts.hidden))
        angles, stretch = forward.rope_angles(facts, position + len(tokens))
        found = []
        for layer in range(facts.layers):
            old = fault.read(state, layer, state.caches[layer]) if state.caches[layer:] else None
            stages = {"embedding": x} if layer == 0 else {}
            past = 0 if old is None else len(old[0])
            window = facts.windows[layer] if old is None else fault.window(facts.windows[layer])
            mask = forward.causal_mask(past + len(tokens), window)[past:]
            forward.layer(stages, x, pair.model_weights.layer(layer),
                          angles[position : position + len(tokens)], stretch, mask, facts,
                          row, partial(self._extended, state, layer, old))  # fmt: skip
            found.append((layer, stages))
            x = stages["post_ffn_residual"]
        final = forward.rms_norm(x, pair.model_weights.tensor(FINAL_NORM), facts.eps, row)
        head = logits(pair.model_weights, final[-1:], facts.vocab)[0]
        state.logits.append(head)
        stages = {"final_norm": final, "lm_head": fault.said(state, head)}
        return [*found, (None, stages)]

    def _extended(
        self, state: State, layer: int, old: Cache | None, k: torch.Tensor, v: torch.Tensor
    ) -> Cache:
        if old is None:
            state.caches.append((k, v))
            return k, v
        new = torch.cat([old[0], k]), torch.cat([old[1], v])
        state.caches[layer] = self.fault.write(state, layer, state.caches[layer], new)
        return new


def at(layer: int, change: Callable[..., Cache]) -> Callable[[State, int, Cache], Cache]:
    """A change of what one layer finds in its cache."""
    return lambda state, index, cache: change(state, cache) if index == layer else cache


def unrotated(state: State, cache: Cache) -> Cache:
    """The prompt's K as it was before RoPE: turned back."""
    keys = cache[0].clone()
    angles, stretch = forward.rope_angles(state.pair.model_facts, state.count)
    keys[: state.count] = forward.rotate(
        keys[: state.count], -angles, stretch, state.pair.architecture
    )
    return keys, cache[1]


def float8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).float()


CACHE_FAULTS = (
    CacheFault(name="slot-off-by-one", like="the new K and V written over the last slot",
               step=2, point="L00-attention",
               write=lambda s, layer, old, new: tuple(torch.cat([n[:-2], n[-1:]]) for n in new)),
    CacheFault(name="stale-layer", like="one layer's cache is not written while decoding", step=2,
               point="L02-attention",
               write=lambda s, layer, old, new: old if layer == 2 else new),
    CacheFault(name="position-not-advanced", like="n_past stays where the prompt ended", step=2,
               point="L00-q_post_rope", position=lambda count, step: count),
    CacheFault(name="position-one-behind", like="decoding starts at the prompt's last position",
               step=1, point="L00-q_post_rope", position=lambda count, step: count + step - 1),
    CacheFault(name="position-one-ahead", like="the position counted twice after the prefill",
               step=1, point="L00-q_post_rope", position=lambda count, step: count + step + 1),
    CacheFault(name="k-cached-before-rope", like="K cached before RoPE", step=1,
               point="L01-attention", read=at(1, unrotated)),
    CacheFault(name="k-and-v-exchanged", like="two buffers of one size", step=1,
               point="L01-attention", read=at(1, lambda s, c: (c[1], c[0]))),
    CacheFault(name="cache-empty", like="the prefill never fills the cache", step=1,
               point="L00-attention",
               read=lambda s, layer, c: tuple(torch.cat([t[: s.count] * 0, t[s.count :]])
                                              for t in c)),
    CacheFault(name="another-layers-cache", like="a stride off by one layer", step=1,
               point="L03-attention", read=at(3, lambda s, c: s.caches[2])),
    CacheFault(name="first-token-evicted", like="a ring buffer one slot short", step=1,
               point="L00-attention", read=lambda s, layer, c: (c[0][1:], c[1][1:])),
    CacheFault(name="token-ignored", like="the first token fed at every step", step=2,
               point="L00-embedding", token=lambda forced, step: forced[0]),
    CacheFault(name="logits-of-the-step-before", like="logits read before the step ran", step=1,
               point="lm_head", said=lambda s, logits: s.logits[-2:][0]),
    CacheFault(name="cache-rounded-again", like="an 8-bit cache that is read back and written at "
               "every step", step=2, point="L00-attention",
               write=lambda s, layer, old, new: tuple(map(float8, new))),
    CacheFault(name="window-ignored", like="sliding window forgotten while decoding", step=1,
               point="L00-attention", needs_window=True, window=lambda window: None),
    CacheFault(name="window-one-short", like="a window of W - 1 while decoding", step=1,
               point="L00-attention", needs_window=True, window=lambda window: window - 1),
)  # fmt: skip
