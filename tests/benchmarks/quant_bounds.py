"""Measure how far each GGUF tensor type takes a matrix: the bounds of the weights rung.

    python tests/benchmarks/quant_bounds.py                      # all types, some minutes
    python tests/benchmarks/quant_bounds.py Q4_K Q6_K --seeds 8

For each type: the relative L2 error ||dequantised - W|| / ||W|| over every trained matrix of the
fixtures and over random matrices, quantised by ggml's own ggml_quantize_chunk (the function that
llama.cpp's quantiser calls row by row) and dequantised by gguf-py. Each matrix is quantised without
an importance matrix, with a random heavy-tailed one, and, where the matrix is a fixture's, with the
one measured on its training text. Needs the extra `llamacpp`.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TYPES = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 IQ4_NL IQ4_XS MXFP4 NVFP4 Q3_K IQ3_S "
    "IQ3_XXS Q2_K IQ2_S IQ2_XS IQ2_XXS TQ2_0 TQ1_0 IQ1_M IQ1_S"
)
RANDOM_SHAPE = (256, 1024)

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """A matrix to quantise, and the importance of its columns if that was measured."""

    data: str
    name: str
    matrix: Matrix
    measured: Matrix | None = None


@dataclass(frozen=True)
class Error:
    """Relative L2 error of one quantised matrix, whole and in its worst row."""

    type: str
    data: str
    importance: str
    name: str
    whole: float
    worst_row: float


class Ggml:
    """The quantiser of the ggml library that llama_cpp ships."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        library = next(p for p in sorted(folder.iterdir()) if p.name.startswith("libggml-base"))
        self._library = ctypes.CDLL(str(library))
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

    def needs_importance(self, type: gguf.GGMLQuantizationType) -> bool:
        return bool(self._library.ggml_quantize_requires_imatrix(int(type)))

    def quantise(
        self, matrix: Matrix, type: gguf.GGMLQuantizationType, importance: Matrix | None
    ) -> NDArray[np.uint8]:
        """Return the rows of a matrix as bytes of `type`."""
        rows, columns = matrix.shape
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        out = np.zeros((rows, columns // block * block_bytes), np.uint8)
        written = self._library.ggml_quantize_chunk(
            int(type),
            matrix.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            None if importance is None else importance.ctypes.data_as(ctypes.c_void_p),
        )
        if written != out.nbytes:
            raise NotImplementedError(f"ggml does not quantise to {type.name}")
        return out


def trained_samples() -> Iterator[Sample]:
    """Yield every matrix of every fixture, in GGUF's row order."""
    sys.path.insert(0, str(FIXTURES))
    import json

    import make_fixtures as fixtures

    for hf_folder in sorted(FIXTURES.glob("tiny-*/hf")):
        config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
        family = fixtures.FAMILIES[config["model_type"]]
        importance = fixtures.measure_importance(hf_folder)
        for name, matrix in fixtures.gguf_tensors(family, config, hf_folder):
            if matrix.ndim == 2:
                full_name = f"{hf_folder.parent.name}/{name}"
                yield Sample("trained", full_name, matrix, importance.get(name))


def random_samples(seeds: int) -> Iterator[Sample]:
    """Yield random matrices at the scale of weights, from light tails to outlier columns."""
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        gaussian = generator.standard_normal(RANDOM_SHAPE)
        outliers = generator.standard_normal(RANDOM_SHAPE)
        outliers[:, generator.choice(RANDOM_SHAPE[1], 6, replace=False)] *= 30
        for data, matrix in (
            ("gaussian", gaussian),
            ("laplace", generator.laplace(size=RANDOM_SHAPE)),
            ("student-t 5", generator.standard_t(5, RANDOM_SHAPE)),
            ("student-t 3", generator.standard_t(3, RANDOM_SHAPE)),
            ("outlier columns", outliers),
        ):
            yield Sample(data, f"seed {seed}", (0.02 * matrix).astype(np.float32))


def random_importance(columns: int, seed: int) -> Matrix:
    """Draw an importance that spans three decades, as mean squares of activations do."""
    return np.random.default_rng(seed).lognormal(0, 1.5, columns).astype(np.float32)


def errors_of(sample: Sample, type: gguf.GGMLQuantizationType, ggml: Ggml) -> list[Error]:
    """Quantise one matrix with every kind of importance that applies."""
    columns = sample.matrix.shape[1]
    importances = {
        # A type that demands an importance matrix gets one that says nothing.
        "none": np.ones(columns, np.float32) if ggml.needs_importance(type) else None,
        "random": random_importance(columns, seed=len(sample.name)),
    }
    if sample.measured is not None:
        importances["measured"] = sample.measured
    found = []
    for kind, importance in importances.items():
        rows = gguf.quants.dequantize(ggml.quantise(sample.matrix, type, importance), type)
        exact = sample.matrix.astype(np.float64)
        distances = np.linalg.norm(rows - exact, axis=1)
        norms = np.linalg.norm(exact, axis=1)
        whole = float(np.linalg.norm(distances) / np.linalg.norm(norms))
        worst_row = float((distances / norms).max())
        found.append(Error(type.name, sample.data, kind, sample.name, whole, worst_row))
    return found


def table(errors: list[Error], by: tuple[str, ...]) -> str:
    """Summarise errors in groups of equal fields `by`."""
    groups: dict[tuple[str, ...], list[Error]] = {}
    for error in errors:
        groups.setdefault(tuple(getattr(error, field) for field in by), []).append(error)
    rows = []
    for key, group in groups.items():
        worst = max(group, key=lambda error: error.whole)
        rows.append(
            [
                *key,
                len(group),
                float(np.median([error.whole for error in group])),
                worst.whole,
                max(error.worst_row for error in group),
                worst.name if worst.data == "trained" else f"{worst.data}, {worst.name}",
            ]
        )
    headers = [*by, "n", "median", "worst", "worst row", "worst is"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2e", disable_numparse=[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the quantisation error of every GGUF tensor type."
    )
    parser.add_argument("types", nargs="*", default=TYPES.split(), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="random matrices of each kind")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ggml = Ggml()
    samples = [*trained_samples(), *random_samples(options.seeds)]
    errors: list[Error] = []
    for name in options.types:
        type_ = gguf.GGMLQuantizationType[name]
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(options.threads) as pool:
                parts = list(pool.map(lambda s, t=type_: errors_of(s, t, ggml), samples))
        except NotImplementedError as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        errors += [error for part in parts for error in part]
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    trained = [error for error in errors if error.data == "trained"]
    drawn = [error for error in errors if error.data != "trained"]
    print("\n## Trained matrices of the fixtures\n")
    print(table(trained, ("type", "importance")))
    print("\n## Random matrices\n")
    print(table(drawn, ("type", "importance", "data")))
    print("\n## All\n")
    print(table(errors, ("type",)))


if __name__ == "__main__":
    main()
