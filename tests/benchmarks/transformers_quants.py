"""Measures how far transformers' quantisers move a tensor: the last rows of pytest_aprt/quants.py.

    python tests/benchmarks/transformers_quants.py

The formats are written out here, so that none of their packages is needed: what they round is the
same. The matrices are those of quant_bounds.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from quant_bounds import matrices
from tabulate import tabulate
from torch import Tensor

NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


def blocks(size: int | None, rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Round blocks of a row, or whole rows where none fits."""

    def rounded(w: Tensor) -> Tensor:
        fits = size is not None and w.shape[1] % size == 0
        return rounding(w.reshape(-1, size if fits else w.shape[1])).reshape(w.shape)

    return rounded


def symmetric(bits: int) -> Callable[[Tensor], Tensor]:
    def rounding(x: Tensor) -> Tensor:
        step = (x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
        return (x / step).round() * step

    return rounding


def asymmetric(bits: int) -> Callable[[Tensor], Tensor]:
    def rounding(x: Tensor) -> Tensor:
        low = x.amin(1, keepdim=True)
        step = ((x.amax(1, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-30)
        return ((x - low) / step).round() * step + low

    return rounding


def nf4(x: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return NF4[((x / step)[..., None] - NF4).abs().argmin(-1)] * step


def float8(w: Tensor) -> Tensor:
    step = w.abs().max() / 448
    return (w / step).to(torch.float8_e4m3fn).float() * step


WAYS = {
    "8-bit": {"int8 by rows": blocks(None, symmetric(8)), "float8 by tensors": float8},
    "4-bit": {
        "nf4 in blocks of 64": blocks(64, nf4),
        "int4 in blocks of 128": blocks(128, symmetric(4)),
        "int4 with minima in blocks of 128": blocks(128, asymmetric(4)),
    },
    "3-bit": {"int3 with minima in blocks of 128": blocks(128, asymmetric(3))},
    "2-bit": {"int2 with minima in blocks of 128": blocks(128, asymmetric(2))},
}


def main() -> None:
    data, rows = matrices(), []
    for width, ways in WAYS.items():
        for name, rounded in ways.items():
            found = [
                (float((rounded(w) - w).norm() / w.norm()), where)
                for where, arrays in data.items()
                for w in map(torch.from_numpy, arrays)
            ]
            trained = [error for error, where in found if where.startswith("tiny")]
            rows.append([width, name, np.median(trained), max(trained), *max(found)])
    head = ["type", "format", "trained: median", "trained: worst", "worst of all", "on"]
    print(tabulate(rows, head, floatfmt=".4f"))


if __name__ == "__main__":
    main()
