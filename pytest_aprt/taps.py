"""Where transformers' modules show their stages: forward hooks, by one table for all families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import torch
from torch import nn

TAPS = {
    # stage: (module within the decoder layer, what of it)
    "attn_norm": ("input_layernorm", "output"),
    "attention": ("self_attn.o_proj", "input"),
    "attn_out": ("self_attn.o_proj", "output"),
    "post_attn_residual": ("post_attention_layernorm", "input"),
    "ffn_norm": ("post_attention_layernorm", "output"),
    "ffn_gate": ("mlp.gate_proj", "output"),
    "ffn_up": ("mlp.up_proj", "output"),
    "ffn_silu": ("mlp.act_fn", "output"),
    "ffn_swigl": ("mlp.down_proj", "input"),
    "ffn_out": ("mlp.down_proj", "output"),
}
"""Where a forward hook finds a stage. Q, K, V, scores and softmax need more than one value."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

Product = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Returns what a projection's inputs give with its weight alone."""


@contextmanager
def tapped(
    layer: nn.Module, stages: dict[str, torch.Tensor], product: Product | None = None
) -> Iterator[None]:
    """Fill ``stages`` from hooks on a decoder layer's modules whenever the layer runs.

    What an attention function has to add (``put_rotated``) finds ``stages`` as ``aprt_stages`` on
    the attention module.

    Args:
        layer: the decoder layer, which runs a batch of one.
        stages: what is filled.
        product: computes the projections without their biases; without it ``qkv_matmul`` is left
            out where a bias is added within the module.
    """
    attention = layer.get_submodule("self_attn")
    projections = [attention.get_submodule(name) for name in PROJECTIONS]
    has_bias = any(getattr(p, "bias", None) is not None for p in projections)
    raw: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []

    def keep(name: str, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            stages[name] = (inputs[0] if part == "input" else output)[0]

        return hook

    def project(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        whole.append(output[0])
        if product is not None:
            raw.append(product(module, inputs[0])[0])

    def projected(*_: Any) -> None:
        if has_bias:
            stages["qkv_bias"] = torch.cat(whole, dim=-1)
        if product is not None or not has_bias:
            stages["qkv_matmul"] = torch.cat(raw or whole, dim=-1)
        raw.clear()
        whole.clear()

    handles = [p.register_forward_hook(project) for p in projections]
    handles += [
        layer.get_submodule(path).register_forward_hook(keep(name, part))
        for name, (path, part) in TAPS.items()
    ]
    handles.append(attention.register_forward_hook(projected))
    attention.aprt_stages = stages  # type: ignore[assignment]
    try:
        yield
    finally:
        del attention.aprt_stages
        for handle in handles:
            handle.remove()


def put_rotated(stages: dict[str, torch.Tensor], query: torch.Tensor, key: torch.Tensor) -> None:
    """Keep Q and K as an attention function is handed them: (1, heads, T, D), after RoPE.

    With a KV cache K holds earlier positions too; those of this pass are the last.
    """
    tokens = query.shape[2]
    stages["q_post_rope"] = query[0].transpose(0, 1).flatten(1)  # (T, nq*D)
    stages["k_post_rope"] = key[0, :, -tokens:].transpose(0, 1).flatten(1)  # (T, nkv*D)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention of a module's family: the one that its ``forward`` sees."""
    forward = unwrap(type(module).forward)
    function: Callable[..., Any] = forward.__globals__["eager_attention_forward"]
    return function
