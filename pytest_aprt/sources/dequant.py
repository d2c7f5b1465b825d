"""Dequantisation of the common tensor types, bit-identical to gguf-py's and several times as fast.

Where the package was built with a C compiler, ``compiled/kernels.h`` does it; here is what torch
does elsewhere.

Quanta are taken apart as bytes, or eight at once as a 64-bit integer, then widened and scaled where
they are to lie. A product of scale and quantum has at most 24 significant bits, so it is exact
however it is formed (tests/test_dequant.py compares the bits; tests/benchmarks/dequant.py prints
the rates). Layouts are those of gguf-py's ``quants.py``.

TorchScript compiles the kernels. It knows no view of another type, so they are handed every view.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pytest_aprt import compiled
from pytest_aprt.buffers import buffer
from pytest_aprt.scripted import scripted

Unpack = Callable[[Tensor, Tensor], None]
"""Takes blocks, (n, bytes of a block) uint8, and fills (n, values of a block) float32."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Takes blocks as uint8, as int8 and as float16, memory as four runs of bytes and as four of int64,
and what it fills."""


def _scales_and_mins(blocks: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of the eight runs of 32 of Q4_K and Q5_K: (8 n, 1) each.

    Twelve bytes hold them in six bits each: the first four of either in a byte of its own, whose
    two upper bits belong to the last four, as do the nibbles of the last four bytes.
    """
    columns = blocks[:, 4:16].t().contiguous()
    own, last = columns[:8], columns[8:]
    sixes = torch.empty(2, 2, 4, len(blocks), dtype=torch.uint8)
    torch.bitwise_and(own.view(2, 4, -1), 63, out=sixes[:, 0])
    upper = own.bitwise_right_shift(2).bitwise_and_(48).view(2, 4, -1)
    torch.bitwise_or(upper[0], last.bitwise_and(15), out=sixes[0, 1])
    torch.bitwise_or(upper[1], last.bitwise_right_shift(4), out=sixes[1, 1])
    factors = halves[:, :2].t().contiguous().float().view(2, 1, -1)
    found = sixes.view(2, 8, -1).float().mul_(factors).transpose(1, 2).contiguous()
    return found[0].view(-1, 1), found[1].view(-1, 1)


def _shift(words: Tensor, left: int, out: Tensor) -> None:
    if left >= 0:
        torch.bitwise_left_shift(words, left, out=out)
    else:
        torch.bitwise_right_shift(words, -left, out=out)


def _q4_k(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    n = len(blocks)
    packed, quanta = blocks[:, 16:].view(n, 4, 32), byte[0, : n * 128].view(n, 4, 32)
    runs = out.view(n, 4, 2, 32)
    runs[:, :, 0].copy_(torch.bitwise_and(packed, 15, out=quanta))
    runs[:, :, 1].copy_(torch.bitwise_right_shift(packed, 4, out=quanta))
    scales, mins = _scales_and_mins(blocks, halves)
    out.view(-1, 32).mul_(scales).sub_(mins)


def _q5_k(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    n = len(blocks)
    byte[0, : n * 128].view(n, 128).copy_(blocks[:, 48:])
    byte[1, : n * 32].view(n, 32).copy_(blocks[:, 16:48])
    packed, fifth = word[0, : n * 16].view(n, 4, 4), word[1, : n * 4].view(n, 4)
    quanta, upper = word[2, : n * 16].view(n, 4, 4), word[3, : n * 16].view(n, 4, 4)
    runs, widened = out.view(n, 4, 2, 32), byte[2, : n * 128].view(n, 4, 32)
    for half in range(2):
        torch.bitwise_right_shift(packed, 4 * half, out=quanta).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        for i in range(4):
            _shift(fifth, 4 - half - 2 * i, upper[:, i])  # bit j is that of run j
        quanta.bitwise_or_(upper.bitwise_and_(0x1010101010101010))
        runs[:, :, half].copy_(widened)
    scales, mins = _scales_and_mins(blocks, halves)
    out.view(-1, 32).mul_(scales).sub_(mins)


def _q6_k(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    n = len(blocks)
    byte[0, : n * 128].view(n, 128).copy_(blocks[:, :128])
    byte[1, : n * 64].view(n, 64).copy_(blocks[:, 128:192])
    packed, two = word[0, : n * 16].view(n, 2, 2, 4), word[1, : n * 8].view(n, 2, 4)
    quanta, upper = word[2, : n * 16].view(n, 2, 2, 4), word[3, : n * 16].view(n, 2, 2, 4)
    runs, widened = out.view(n, 2, 2, 64), byte[2, : n * 128].view(n, 2, 64)
    for half in range(2):
        torch.bitwise_right_shift(packed, 4 * half, out=quanta).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        for i in range(2):
            _shift(two, 4 - 4 * half - 2 * i, upper[:, :, i])  # two bits of each of four runs
        quanta.bitwise_or_(upper.bitwise_and_(0x3030303030303030))
        runs[:, :, half].copy_(widened)
    scales = signed[:, 192:208].float().mul_(halves[:, 104:])
    out.view(-1, 16).sub_(32).mul_(scales.view(-1, 1))


def _q8_0(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    out.copy_(signed[:, 2:]).mul_(halves[:, :1].float())


def _q4_0(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    n = len(blocks)
    byte[0, : n * 16].view(n, 16).copy_(blocks[:, 2:])
    packed, quanta = word[0, : n * 2], word[2, : n * 2]
    runs, widened = out.view(n, 2, 16), byte[2, : n * 16].view(n, 16)
    for half in range(2):
        torch.bitwise_right_shift(packed, 4 * half, out=quanta).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        runs[:, half].copy_(widened)
    out.sub_(8).mul_(halves[:, :1].float())


def _q5_0(
    blocks: Tensor, signed: Tensor, halves: Tensor, byte: Tensor, word: Tensor, out: Tensor
) -> None:
    n = len(blocks)
    byte[0, : n * 16].view(n, 16).copy_(blocks[:, 6:])
    packed, quanta = word[0, : n * 2].view(n, 2), word[2, : n * 2].view(n, 2)
    fifth = word[3, : n * 4]
    places = torch.arange(8)
    bits = torch.arange(256).view(-1, 1).bitwise_right_shift(places).bitwise_and(1)
    spread = bits.bitwise_left_shift(8 * places + 4).sum(1)  # byte -> its bits, each in a byte
    torch.index_select(spread, 0, blocks[:, 2:6].reshape(-1).int(), out=fifth)
    runs, widened = out.view(n, 2, 16), byte[2, : n * 16].view(n, 16)
    for half in range(2):
        torch.bitwise_right_shift(packed, 4 * half, out=quanta).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        quanta.bitwise_or_(fifth.view(n, 2, 2)[:, half])
        runs[:, half].copy_(widened)
    out.sub_(16).mul_(halves[:, :1].float())


KERNELS: dict[str, Kernel] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By the name of the tensor type."""


def unpacked_by(kernel: Kernel) -> Unpack:
    """Return what hands blocks to a kernel, with memory of the calling thread."""

    def unpack(blocks: Tensor, out: Tensor) -> None:
        byte = buffer("quanta", (4, out.numel()), torch.uint8)
        word = buffer("quanta", (4, out.numel() // 8), torch.int64)
        kernel(blocks, blocks.view(torch.int8), blocks.view(torch.float16), byte, word, out)

    return unpack


def _plain(dtype: torch.dtype) -> Unpack:
    def unpack(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(dtype))

    return unpack


_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}


def unpack_of(kind: str) -> Unpack | None:
    """Return what decodes a tensor type, by its name; None for those that are gguf-py's."""
    if kind in _PLAIN:
        return _plain(_PLAIN[kind])
    if kind not in KERNELS:
        return None
    return compiled.unpack_of(kind) or unpacked_by(scripted(KERNELS[kind]))
