"""Dequantisation of the common tensor types, bit-identical to gguf-py's and several times as fast.

Eight packed values are taken apart at once, as one 64-bit integer, then widened and scaled where
they are to lie. A product of scale and quantum has at most 24 significant bits, so it is exact
however it is formed (tests/test_dequant.py compares the bits; tests/benchmarks/dequant.py prints
the rates). Layouts are those of gguf-py's ``quants.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pytest_aprt.buffers import buffer

Unpack = Callable[[Tensor, Tensor], None]
"""Takes blocks, (n, bytes of a block) uint8, and fills (n, values of a block) float32."""

_NIBBLES = 0x0F0F0F0F0F0F0F0F
_BIT_4 = 0x1010101010101010
_BITS_45 = 0x3030303030303030

_BITS_05, _BITS_03, _BITS_45S = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030

_HALVES_OF_BYTES = torch.tensor([[0], [4]], dtype=torch.int32)

_SPREAD = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).mul(16)
_SPREAD_BITS = _SPREAD.contiguous().view(torch.int64).view(-1)
"""Byte -> its eight bits, each as bit 4 of a byte."""


def _halves(blocks: Tensor) -> Tensor:
    """Return one float16 per block, widened: (n, 1)."""
    return blocks.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _words(name: str, blocks: Tensor) -> Tensor:
    """Return (n, bytes) as 64-bit integers: (n, bytes / 8), in the buffer ``name``."""
    # a copy: one row of a larger block counts as contiguous, and begins at any address
    return buffer(name, blocks.shape, torch.uint8).copy_(blocks).view(torch.int64)


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return low and high nibbles, as bytes within words of the same shape."""
    low, high = (buffer(name, packed.shape, packed.dtype) for name in ("low", "high"))
    torch.bitwise_and(packed, _NIBBLES, out=low)
    torch.bitwise_right_shift(packed, 4, out=high)
    return low, high.bitwise_and_(_NIBBLES)


def _upper(words: Tensor, lefts: tuple[int, ...], mask: int) -> Tensor:
    """Return words shifted left by each of ``lefts`` (negative: right), stacked along dim -2."""
    found = buffer("upper", (*words.shape[:-1], len(lefts), words.shape[-1]), words.dtype)
    for run, left in zip(found.unbind(-2), lefts, strict=True):
        if left >= 0:
            torch.bitwise_left_shift(words, left, out=run)
        else:
            torch.bitwise_right_shift(words, -left, out=run)
    return found.bitwise_and_(mask)


def _widen(words: Tensor, out: Tensor) -> None:
    """Write bytes as floats: they are small and not negative."""
    out.copy_(words.view(torch.uint8).view(out.shape))


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of the eight runs of 32 of Q4_K and Q5_K: (n, 8) each.

    Twelve bytes hold eight of six bits each; a column of four bytes is taken apart as one integer.
    """
    words = blocks[:, :16].clone(memory_format=torch.contiguous_format).view(torch.int32)
    factors, both, last = words.T.clone(memory_format=torch.contiguous_format).split((1, 2, 1))
    found = torch.empty(2, len(blocks), 2, dtype=torch.int32)
    torch.bitwise_and(both, _BITS_05, out=found[..., 0])
    upper = both.bitwise_right_shift(2).bitwise_and_(_BITS_45S)
    lower = last.bitwise_right_shift(_HALVES_OF_BYTES).bitwise_and_(_BITS_03)
    torch.bitwise_or(lower, upper, out=found[..., 1])
    halves = factors.view(torch.float16).view(-1, 2).T.float()
    scales, mins = found.view(torch.uint8).float().mul_(halves[..., None])
    return scales, mins


def _scaled(out: Tensor, scales: Tensor, mins: Tensor) -> None:
    out.view(-1, 32).mul_(scales.view(-1, 1)).sub_(mins.view(-1, 1))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    runs = out.view(-1, 4, 2, 32)
    for i, quanta in enumerate(_nibbles(_words("packed", blocks[:, 16:]))):
        _widen(quanta, runs[:, :, i])
    _scaled(out, *_scales_and_mins(blocks))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    runs = out.view(-1, 4, 2, 32)
    fifth = _words("fifth", blocks[:, 16:48])  # bit j is that of run j
    lefts = (4, 2, 0, -2), (3, 1, -1, -3)
    for i, quanta in enumerate(_nibbles(_words("packed", blocks[:, 48:]).view(-1, 4, 4))):
        _widen(quanta.bitwise_or_(_upper(fifth, lefts[i], _BIT_4)), runs[:, :, i])
    _scaled(out, *_scales_and_mins(blocks))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    runs = out.view(-1, 2, 2, 64)
    upper = _words("two", blocks[:, 128:192]).view(-1, 2, 4)  # two bits of each of four runs
    lefts = (4, 2), (0, -2)
    for i, quanta in enumerate(_nibbles(_words("packed", blocks[:, :128]).view(-1, 2, 2, 4))):
        _widen(quanta.bitwise_or_(_upper(upper, lefts[i], _BITS_45)), runs[:, :, i])
    scales = blocks[:, 192:208].view(torch.int8).float() * _halves(blocks[:, 208:210])
    out.view(-1, 16).sub_(32).mul_(scales.view(-1, 1))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks[:, :2]))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    for i, quanta in enumerate(_nibbles(_words("packed", blocks[:, 2:]))):
        _widen(quanta, out.view(-1, 2, 16)[:, i])
    out.sub_(8).mul_(_halves(blocks[:, :2]))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    fifth = _SPREAD_BITS[blocks[:, 2:6].int()].view(-1, 2, 2)
    for i, quanta in enumerate(_nibbles(_words("packed", blocks[:, 6:]))):
        _widen(quanta.bitwise_or_(fifth[:, i]), out.view(-1, 2, 16)[:, i])
    out.sub_(16).mul_(_halves(blocks[:, :2]))


def _plain(dtype: torch.dtype) -> Unpack:
    def unpack(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(dtype))

    return unpack


UNPACK: dict[str, Unpack] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "F32": _plain(torch.float32),
}
"""By the name of the tensor type; all other types are gguf-py's."""
