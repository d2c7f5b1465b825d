"""Prints how fast the decoders of pytest_aprt/sources/dequant.py are, beside gguf-py's.

    python tests/benchmarks/dequant.py

One tensor of 16 M weights per type, random bytes with sane scales; millions of weights a second,
best of three, for several sizes of piece and for one and two threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tabulate import tabulate

from pytest_aprt.sources.dequant import unpack_of

WEIGHTS = 1 << 24
PIECES = (1 << 18, 1 << 20, 1 << 22)
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}


def blocks_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (WEIGHTS // values, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks


def rate(function: Callable[[], object]) -> float:
    best = min(_seconds(function) for _ in range(3))
    return WEIGHTS / 1e6 / best


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(2)
    rows = []
    for kind in HALVES:
        values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        blocks, unpack = blocks_of(kind), unpack_of(kind)
        raw, step = torch.from_numpy(blocks), (1 << 20) // values

        def theirs(blocks=blocks, kind=kind, step=step) -> None:
            for start in range(0, len(blocks), step):
                dequantize(blocks[start : start + step], GGMLQuantizationType[kind])

        def ours(part: torch.Tensor, piece: int, unpack=unpack, values=values) -> None:
            out = torch.empty(piece // values, values)
            for start in range(0, len(part), len(out)):
                found = part[start : start + len(out)]
                unpack(found, out[: len(found)])

        row = [kind, rate(theirs)]
        halves = raw.split(-(-len(raw) // 2))
        for piece, parts in product(PIECES, [(raw,), halves]):
            row.append(rate(lambda p=piece, s=parts: list(pool.map(partial(ours, piece=p), s))))
        rows.append([*row, max(row[2:]) / row[1]])
    heads = [f"{p >> 10}K x {t}" for p in PIECES for t in (1, 2)]
    print(tabulate(rows, ["type", "gguf-py", *heads, "best ratio"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
