"""Healthy engines in the arithmetics that real ones use, written apart from the replay.

``ARITHMETICS`` holds how the NumPy engine multiplies and what it keeps; ``TorchEngine`` runs
transformers' own modules in a half-precision dtype, with that library's kernels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import Pair
from pytest_aprt.testing import Array


def bfloat16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += np.uint32(0x7FFF)  # half a step, less one where the kept bits are even
    rounded += bits
    rounded &= np.uint32(0xFFFF0000)
    finite = np.isfinite(x)
    return (
        rounded.view(np.float32) if finite.all() else np.where(finite, rounded.view(np.float32), x)
    )


def float16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def tf32(x: Array) -> Array:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)


def q8_k(x: Array) -> Array:
    """Blocks of 256; the largest value becomes -127."""
    blocks = x.reshape(-1, 256)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(peak == 0, 0, np.float32(-127) / peak)
        step = np.where(peak == 0, 0, 1 / steps)
    return (np.rint(blocks * steps) * step).astype(np.float32).reshape(x.shape)


def q8_0(x: Array) -> Array:
    """Blocks of 32; the scale is kept in float16."""
    blocks = x.reshape(-1, 32)
    peak = np.abs(blocks).max(1, keepdims=True)
    steps = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    return (np.rint(blocks * steps) * float16(peak / np.float32(127))).reshape(x.shape)


def sequential(x: Array, w: Array) -> Array:
    """Add one product after another, the worst order that engines use."""
    total = np.zeros((len(x), len(w)), np.float32)
    for k in range(x.shape[1]):
        total += x[:, k : k + 1] * w[:, k]
    return total


def reversed_halves(x: Array, w: Array) -> Array:
    half = x.shape[1] // 2
    return x[:, half:] @ w[:, half:].T + x[:, :half] @ w[:, :half].T


def inputs(rounding: Callable[[Array], Array]) -> dict[str, Any]:
    return {"matmul": lambda x, w: rounding(x) @ w.T}


def operands(rounding: Callable[[Array], Array]) -> dict[str, Any]:
    return {"matmul": lambda x, w: rounding(x) @ rounding(w).T}


ARITHMETICS: dict[str, dict[str, Any]] = {
    # arguments of NumpyEngine
    "float32": {},
    "float32-sequential": {"matmul": sequential},
    "float32-halves": {"matmul": reversed_halves},
    "q8_k": inputs(q8_k),
    "q8_0": inputs(q8_0),
    "q8_k-float16-cache": inputs(q8_k) | {"cached": float16},
    "float16-operands": operands(float16),
    "bfloat16-inputs": inputs(bfloat16),
    "tf32": operands(tf32),
    "float16": operands(float16) | {"kept": float16},
    "bfloat16": operands(bfloat16) | {"kept": bfloat16},
    "bfloat16-float32-weights": inputs(bfloat16) | {"kept": bfloat16},
    "bfloat16-q8_0": inputs(q8_0) | {"kept": bfloat16},
}


class _Cast:
    """Weights in another dtype."""

    def __init__(self, weights: Any, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        return {name: t.to(self._dtype) for name, t in self._weights.layer(index).items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._weights.tensor(name).to(self._dtype)

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        return self._weights.rows(name, indices).to(self._dtype)


class TorchEngine:
    """transformers' modules on the model's weights, in a dtype."""

    def __init__(self, pair: Pair, dtype: torch.dtype) -> None:
        self._runner = TransformersRunner(pair.config, _Cast(pair.model_weights, dtype), dtype)

    def layers(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, dict[str, torch.Tensor]]]:
        for layer, stages in self._runner.layers(tokens):
            yield layer, {name: value.float() for name, value in stages.items()}


class Hiding:
    """An engine that exposes only some stages."""

    def __init__(self, engine: Any, shown: Callable[[int | None, str], bool]) -> None:
        self._engine, self._shown = engine, shown

    def layers(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, dict[str, Any]]]:
        for layer, stages in self._engine.layers(tokens):
            yield layer, {n: v for n, v in stages.items() if self._shown(layer, n)}


def some(seed: int) -> Callable[[int | None, str], bool]:
    """Half of all points, chosen by chance."""
    return lambda layer, name: zlib.crc32(f"{seed} {layer} {name}".encode()) % 2 == 0


SUBSETS: dict[str, Callable[[int | None, str], bool]] = {
    # what an engine may expose: the stages of a layer by name
    "no-scores": lambda layer, name: name not in ("attn_scores", "attn_softmax"),
    "no-norms": lambda layer, name: "norm" not in name,
    "residuals": lambda layer, name: name in ("embedding", "lm_head") or "residual" in name,
    "layer-outputs": lambda layer, name: name in ("embedding", "post_ffn_residual", "lm_head"),
    "attention-outputs": lambda layer, name: name in ("embedding", "attn_out", "lm_head"),
    "odd-layers": lambda layer, name: layer is None or layer % 2 == 1,
    "ends": lambda layer, name: layer is None or name == "embedding",
    **{f"half-of-all-{seed}": some(seed) for seed in range(3)},
}
