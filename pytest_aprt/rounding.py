"""The roundings that engines apply to a product's operands and to what they keep.

Each returns the rounded values and a *doubt*: how far another correct implementation may be off,
because the value lies on the edge between two roundings. Blocks run along the last axis. The
formats are ggml's (ggml-common.h, quantize_row_q8_0_ref and its kin); tests compare bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_aprt.arithmetic import FLOAT32_ULP
from pytest_aprt.strips import parts

EDGE_ULPS = 4
"""A value this near the middle between two roundings may go either way: engines form a block's
scale as max/127 or as 1/(127/max), and multiply or divide by it, which differ by 2 ulps."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Rounded(NamedTuple):
    """Rounded values, float32, and how far each may be off (None: not at all).

    ``sums`` is for formats that keep the sum of a block beside its values, rounded apart: how far
    the kept sum is from that of the values, and how far it may be off (blocks along the last axis).
    """

    value: Tensor
    doubt: Tensor | None = None
    sums: Rounded | None = None

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> Rounded:
        """Return both after a change of their layout."""
        return Rounded(change(self.value), None if self.doubt is None else change(self.doubt))


Rounding = Callable[[Tensor, "Tensor | None"], "Rounded | None"]
"""Takes float32 values, and how far each of them may be off (None where they were captured);
returns None where the format does not fit the shape."""


def _none(x: Tensor, off: Tensor | None) -> Rounded:
    return Rounded(x)


def _cast(dtype: torch.dtype) -> Rounding:
    def rounding(x: Tensor, off: Tensor | None) -> Rounded:
        value = x.to(dtype).float()
        if off is None:
            return Rounded(value)
        return Rounded(value, ((x + off).to(dtype).float() - (x - off).to(dtype).float()).abs())

    return rounding


def _tf32(x: Tensor, off: Tensor | None) -> Rounded:
    """Ten bits of mantissa, nearest, halves away from zero (cvt.rna.tf32.f32 of PTX)."""
    bits = x.contiguous().view(torch.int32)
    return Rounded(((bits + 0x1000) & ~0x1FFF).view(torch.float32))


def _tf32_cut(x: Tensor, off: Tensor | None) -> Rounded:
    """Ten bits of mantissa, the others dropped, as tensor cores do with plain float32."""
    return Rounded((x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32))


def _blocks(
    size: int, scale_dtype: torch.dtype, signed_peak: bool, keeps_sums: bool = False
) -> Rounding:
    """Return a rounding to int8 with one scale for every ``size`` values."""

    def rounding(x: Tensor, off: Tensor | None) -> Rounded | None:
        if x.shape[-1] % size:
            return None
        blocks = x.reshape(*x.shape[:-1], -1, size)
        peak, place = blocks.abs().max(-1, keepdim=True)
        if signed_peak:  # Q8_K: the largest value becomes -127 whatever its sign
            steps = torch.tensor(-127.0) / blocks.gather(-1, place)  # of a number: 1 ulp off
            step = 1 / steps
        else:
            step = peak / 127.0
            steps = 1 / step
        zero = peak == 0
        exact = (blocks * steps).masked_fill(zero, 0.0)
        levels = exact.round().clamp(-127, 127)
        stored = step.to(scale_dtype).float().masked_fill(zero, 0.0)
        # Halves: ggml's reference rounds them away from zero, its vector kernels to even.
        margin = exact.abs() * (EDGE_ULPS * FLOAT32_ULP)
        scale_margin = torch.full_like(peak, 2 * FLOAT32_ULP)  # less is lost beside 1
        if off is not None:
            off = off.reshape(blocks.shape)
            scale_margin = scale_margin + (off.gather(-1, place) / peak).masked_fill(zero, 0.0)
            margin = (
                margin + (off * steps.abs()).masked_fill(zero, 0.0) + exact.abs() * scale_margin
            )
        edge = (exact - exact.floor() - 0.5).abs() <= margin
        doubt = torch.where(edge, stored.abs(), 0.0)
        if scale_dtype != torch.float32:
            low, high = ((step * (1 + s * scale_margin)).to(scale_dtype).float() for s in (-1, 1))
            doubt = doubt + (high - low).abs().masked_fill(zero, 0.0) * levels.abs()
        sums = _kept_sums(levels, step, stored, doubt) if keeps_sums else None
        return Rounded((levels * stored).reshape(x.shape), doubt.reshape(x.shape), sums)

    return rounding


def _kept_sums(levels: Tensor, step: Tensor, stored: Tensor, doubt: Tensor) -> Rounded:
    """Return what ``s`` of ggml's block_q8_1, a float16, has more than the sum of the values."""
    total = levels.sum(-1, keepdim=True)
    exact = total * torch.where(stored == 0, 0.0, step)
    kept = exact.half().float()
    spacing = kept.abs() * 2.0**-10
    edge = (exact - kept).abs() * 2 >= spacing * (1 - 2.0**-10)  # nearly half way to the next
    unsure = torch.where(edge | (doubt != 0).any(-1, keepdim=True), spacing, 0.0)
    return Rounded((kept - total * stored)[..., 0], unsure[..., 0])


ROUNDINGS: dict[str, Rounding] = {
    "none": _none,
    "float16": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "tf32": _tf32,
    "tf32_cut": _tf32_cut,
    "q8_0": _blocks(32, torch.float16, signed_peak=False),
    "q8_1": _blocks(32, torch.float16, signed_peak=False),
    "q8_1 sums": _blocks(32, torch.float16, signed_peak=False, keeps_sums=True),
    "q8_k": _blocks(256, torch.float32, signed_peak=True),
}
"""By the names that ``arithmetic.Arithmetic`` uses."""


def kept_as(value: Tensor, storage: str) -> Tensor:
    """Return float64 values as they come back from a dtype."""
    return value if storage == "float32" else value.to(DTYPES[storage]).double()


def fits(value: Tensor, storage: str) -> bool:
    """Return whether every finite value is one that the dtype can hold, so was kept in it."""

    def fit(some: Tensor) -> bool:
        finite = some[torch.isfinite(some)].float()
        return torch.equal(finite.to(DTYPES[storage]).float(), finite)

    return all(fit(some) for some in parts(value))
