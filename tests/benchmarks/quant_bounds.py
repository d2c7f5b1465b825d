"""Measures how far each quantisation type moves a tensor: the figures of pytest_aprt/quants.py.

    python tests/benchmarks/quant_bounds.py

Quantises every matrix of the trained fixtures and some heavy-tailed random ones with llama.cpp's
own quantiser (extra ``llamacpp``), without and with an importance matrix, and prints the relative
L2 distance to what gguf-py reads back: median and worst of whole tensors, and the worst of any
block of 32 in a row.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tabulate import tabulate

from pytest_aprt.rungs.distances import worst_block
from pytest_aprt.sources.hf import HfFolder

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
TYPES = tuple(
    [
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q5_1",
        "Q5_0",
        "Q4_K",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
        "Q3_K",
        "IQ3_S",
        "IQ3_XXS",
        "Q2_K",
        "IQ2_S",
        "IQ2_XS",
        "IQ2_XXS",
        "IQ1_M",
        "IQ1_S",
        "TQ2_0",
        "TQ1_0",
    ]
)
NEEDS_IMPORTANCE = {"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M", "IQ2_S"}


def library() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    found = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return found


def matrices() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (256, 1024)
    outliers = rng.normal(size=shape)
    outliers[:, rng.choice(shape[1], 5, replace=False)] *= 30
    data = {
        "gaussian": [rng.normal(size=shape)],
        "laplace": [rng.laplace(size=shape)],
        "student-5": [rng.standard_t(5, size=shape)],
        "student-3": [rng.standard_t(3, size=shape)],
        "outlier columns": [outliers],
    }
    for folder in sorted(FIXTURES.glob("tiny-*")):
        hf = HfFolder.open(str(folder / "hf"))
        names = [n for n in hf.names if len(hf.shape(n)) == 2]
        data[folder.name] = [hf.tensor(n).numpy() for n in names]
    return {name: [np.ascontiguousarray(a, np.float32) for a in v] for name, v in data.items()}


def distance(
    lib: ctypes.CDLL, kind: str, w: np.ndarray, importance: np.ndarray | None
) -> tuple[float, float]:
    """Return the distance of the whole tensor, and of its worst block."""
    qtype = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[qtype]
    out = np.empty((w.shape[0], w.shape[1] // block * size), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    lib.ggml_quantize_chunk(
        int(qtype), w.ctypes.data, out.ctypes.data, 0, w.shape[0], w.shape[1], pointer
    )
    back = dequantize(out, qtype).reshape(w.shape)
    worst, _, _ = worst_block(torch.from_numpy(back), torch.from_numpy(w))
    return float(np.linalg.norm(back - w) / np.linalg.norm(w)), worst


def main() -> None:
    lib, data = library(), matrices()
    rng = np.random.default_rng(1)
    rows = []
    for kind in TYPES:
        block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
        found: list[tuple[float, str]] = []
        trained, blocks = [], []
        for name, arrays in data.items():
            for w in arrays:
                if w.shape[1] % block:
                    continue
                importance = np.exp(rng.normal(size=w.shape[1])).astype(np.float32)
                asked = [importance] if kind in NEEDS_IMPORTANCE else [None, importance]
                errors = [distance(lib, kind, w, each) for each in asked]
                found += [(error, name) for error, _ in errors]
                blocks += [(block, name) for _, block in errors]
                trained += [error for error, _ in errors] if name.startswith("tiny") else []
        worst, where = max(found)
        rows.append([kind, np.median(trained), max(trained), worst, where, *max(blocks)])
        print(*rows[-1], flush=True)
    head = ["type", "trained: median", "trained: worst", "worst of all", "on", "block", "on"]
    print(tabulate(rows, head, floatfmt=".4f"))


if __name__ == "__main__":
    main()
