"""Prints how fast the compiled functions are, beside the calls of torch that do the same.

    python tests/benchmarks/compiled.py

Microseconds for one piece of 640 K weights, in one thread, best of seven, for every kind of
processor whose versions this machine can run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import PROCESSORS

from pytest_aprt import matrices
from pytest_aprt.compiled import product_of, sieve_of, unpack_of
from pytest_aprt.rungs.distances import _sieve_by_torch
from pytest_aprt.scripted import scripted
from pytest_aprt.sources.dequant import KERNELS, unpacked_by

SIZES = {"Q4_0": (18, 32), "Q5_0": (22, 32), "Q8_0": (34, 32), "Q4_K": (144, 256),
         "Q5_K": (176, 256), "Q6_K": (210, 256)}  # fmt: skip
PIECES = ((176, 3584), (32, 18944))
TOKENS = (1, 2, 4, 7, 14, 21, 28, 35)


def micros(function: Callable[[], object]) -> int:
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(50):
            function()
        best = min(best, (time.perf_counter() - started) / 50)
    return round(best * 1e6)


def main() -> None:
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for kind, (size, values) in SIZES.items():
        blocks = torch.randint(0, 60, (630784 // values, size), dtype=torch.uint8)  # sane scales
        out = torch.empty(len(blocks), values)
        ways = [unpacked_by(scripted(KERNELS[kind])), *(unpack_of(kind, p) for p in PROCESSORS)]
        rows.append(
            [f"unpack {kind}", *(micros(lambda w=w, b=blocks, o=out: w(b, o)) for w in ways)]
        )
    for shape in PIECES:
        oracle = torch.randn(shape)
        model, spare = oracle + 0.08 * torch.randn(shape), torch.empty(shape)
        row = [f"sieve {shape}", micros(
            lambda m=model, o=oracle, s=spare: _sieve_by_torch(m, o, 256, s))]  # fmt: skip
        for processor in PROCESSORS:
            sieve = sieve_of(processor)
            row.append(micros(lambda s=sieve, m=model, o=oracle: s(m, o, 256)))
        rows.append(row)
    for (count, columns), tokens in product(PIECES, TOKENS):
        x, w = torch.randn(tokens, columns), torch.randn(count, columns)
        out = torch.empty(tokens, count)
        row = [f"product of {tokens} with {(count, columns)}",
               micros(lambda x=x, w=w, o=out: matrices._multiply_by_torch(x, w, o, 0))]  # fmt: skip
        for processor in PROCESSORS:
            multiply = product_of(processor)
            does = multiply(x, w, out, 0)
            row.append(micros(lambda f=multiply, x=x, w=w, o=out: f(x, w, o, 0)) if does else "")
        rows.append(row)
    print(tabulate(rows, ["us", "torch", *PROCESSORS]))


if __name__ == "__main__":
    main()
