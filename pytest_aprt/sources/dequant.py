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

Unpack = Callable[[Tensor, Tensor], None]
"""Takes blocks, (n, bytes of a block) uint8, and fills (n, values of a block) float32."""

_NIBBLES = 0x0F0F0F0F0F0F0F0F
_BIT_4 = 0x1010101010101010
_BITS_45 = 0x3030303030303030

_SPREAD = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).mul(16)
_SPREAD_BITS = _SPREAD.contiguous().view(torch.int64).view(-1)
"""Byte -> its eight bits, each as bit 4 of a byte."""


def _halves(blocks: Tensor) -> Tensor:
    """Return one float16 per block, widened: (n, 1)."""
    return blocks.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _words(blocks: Tensor) -> Tensor:
    """Return (n, bytes) as 64-bit integers: (n, bytes / 8)."""
    # a copy: one row of a larger block counts as contiguous, and begins at any address
    return blocks.clone(memory_format=torch.contiguous_format).view(torch.int64)


def _nibbles(words: Tensor, groups: int) -> Tensor:
    """Return low and then high nibbles of each of ``groups`` runs of bytes: (n, groups, 2, X)."""
    packed = words.view(len(words), groups, 1, -1)
    found = packed.new_empty(len(words), groups, 2, packed.shape[-1])
    found[:, :, :1] = packed
    found[:, :, 1:] = packed >> 4
    return found.bitwise_and_(_NIBBLES)


def _widen(words: Tensor, out: Tensor) -> Tensor:
    """Write bytes as floats: they are small and not negative."""
    return out.copy_(words.view(torch.uint8).view(out.shape))


def _shifted(words: Tensor, left: int) -> Tensor:
    return words << left if left >= 0 else words >> -left


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of the eight runs of 32 of Q4_K and Q5_K: (n, 8) each."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 0x30)], dim=1)
    mins = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 0x30)], dim=1)
    return _halves(blocks[:, :2]) * scales, _halves(blocks[:, 2:4]) * mins


def _scaled(out: Tensor, scales: Tensor, mins: Tensor) -> None:
    out.view(-1, 32).mul_(scales.view(-1, 1)).sub_(mins.view(-1, 1))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _widen(_nibbles(_words(blocks[:, 16:]), 4), out)
    _scaled(out, *_scales_and_mins(blocks))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    quanta = _nibbles(_words(blocks[:, 48:]), 4)
    runs = quanta.view(len(blocks), 8, 4)
    fifth = _words(blocks[:, 16:48])[:, None]  # bit j is that of run j
    for run in range(8):
        runs[:, run : run + 1] |= _shifted(fifth, 4 - run) & _BIT_4
    _widen(quanta, out)
    _scaled(out, *_scales_and_mins(blocks))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    quanta = _nibbles(_words(blocks[:, :128]), 2)
    runs = quanta.view(len(blocks), 2, 4, 4)
    upper = _words(blocks[:, 128:192]).view(len(blocks), 2, 1, 4)
    for run in range(4):
        runs[:, :, run : run + 1] |= _shifted(upper, 4 - 2 * run) & _BITS_45
    scales = blocks[:, 192:208].view(torch.int8).float() * _halves(blocks[:, 208:210])
    _widen(quanta, out).sub_(32)
    out.view(-1, 16).mul_(scales.view(-1, 1))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks[:, :2]))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _widen(_nibbles(_words(blocks[:, 2:]), 1), out).sub_(8).mul_(_halves(blocks[:, :2]))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    quanta = _nibbles(_words(blocks[:, 6:]), 1)
    quanta |= _SPREAD_BITS[blocks[:, 2:6].int()].view(quanta.shape)
    _widen(quanta, out).sub_(16).mul_(_halves(blocks[:, :2]))


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
