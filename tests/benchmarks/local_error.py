"""Measures what local error healthy engines leave: the figures behind ``arithmetic.STORAGE``.

    python tests/benchmarks/local_error.py --out evidence/local-error

Runs healthy engines in every arithmetic over families, seeds, shapes, weight types and 1 to 512
tokens, the lengths by turns, and prints for each kind of stage the largest local error in units of
the tolerance. Then the smallest fault of each kind of stage that is found, one stage of one layer
scaled by 1 + e, beside the largest error that a healthy engine of the profile leaves there.
Weights other than F32 and Q4_K_M need the extra ``llamacpp``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import numpy as np
import torch
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from faults.engines import ARITHMETICS  # noqa: E402
from faults.score import CONFIGURATIONS, FAMILIES, engine_of, quantised, tokens_of  # noqa: E402
from harness import FIXTURES, checked, fixture_pair, opened, origins_of, verdict_of  # noqa: E402

from pytest_aprt.pair import Pair  # noqa: E402
from pytest_aprt.stages import STAGES, Point  # noqa: E402
from pytest_aprt.testing import NumpyEngine, write_random_pair  # noqa: E402

ENGINES = (*ARITHMETICS, "torch-bfloat16", "torch-float16")
TYPES = ("F32", "Q8_0", "Q4_K_M", "Q2_K", "Q4_1")
PROFILES = ("float32", "q8_k", "q8_0", "tf32", "float16", "bfloat16")
LENGTHS = (1, 2, 7, 64)
SHAPES = (
    # hidden, intermediate, heads, kv heads
    (256, 512, 8, 1),  # q8_k takes blocks of 256, in qwen3 of 8 heads of 32 channels
    (512, 1280, 8, 8),
)
PROBED = {
    # kind: the stage that is scaled in layer 1
    "norm": "ffn_norm",
    "matmul": "ffn_up",
    "rope": "q_post_rope",
    "scores": "attn_scores",
    "softmax": "attn_softmax",
    "mix": "attention",
    "gate": "ffn_silu",
    "add": "post_attn_residual",
}
STEPS = [10 ** (-k / 4) for k in range(2, 27)]  # 0.3 down to 3e-7


Files = tuple[Path, Path]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One healthy engine on one prompt, and the largest error of each kind of stage."""

    weights: str
    files: Files
    engine: str
    length: int

    def __call__(self) -> tuple[Run, dict[str, tuple[float, float]], str]:
        """Return the excess and the error by kind, and the summary of an alarm."""
        torch.set_num_threads(1)
        pair = cached(*self.files)
        engine = checked(pair, engine_of(pair, self.engine))
        verdict = verdict_of(pair, engine, tokens_of(self.length))
        worst: dict[str, tuple[float, float]] = {}
        for judged in verdict.points:
            if judged.errors and (found := judged.errors.worst):
                kind, error = STAGES[judged.point.stage].kind, judged.errors.local.rel_l2
                excess, largest = worst.get(kind, (0.0, 0.0))
                worst[kind] = max(excess, found.excess), max(largest, error)
        quiet = verdict.status in ("PARITY", "QUANTISATION_NOISE")
        return self, worst, "" if quiet else verdict.summary


@cache
def cached(gguf: Path, hf: Path) -> Pair:
    return opened(gguf, hf)


def written_pairs(folder: Path) -> list[tuple[str, Files]]:
    """Return weight type and files of pairs: the fixtures, and random ones of other shapes."""
    found = []
    for (family, kind), path in quantised(folder, TYPES).items():
        home = FIXTURES / f"tiny-{family}"
        found.append((kind, (path or home / "q4_k_m.gguf", home / "hf")))
    for family in FAMILIES:
        config, own = CONFIGURATIONS[family]
        for seed, (hidden, intermediate, heads, kv_heads) in enumerate(SHAPES):
            made = folder / f"{family}-{seed}"
            made.mkdir()
            found.append(("F32", write_random_pair(made, config(
                vocab_size=1000, hidden_size=hidden, intermediate_size=intermediate,
                num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
                pad_token_id=None, **own), seed=seed)))  # fmt: skip
    return found


def runs(pairs: list[tuple[str, Files]]) -> Iterator[Run]:
    """Yield two lengths of every engine on every pair by turns, and 512 tokens of every engine."""
    for e, engine in enumerate(ENGINES):
        for p, (kind, files) in enumerate(pairs):
            for turn in range(2):
                length = LENGTHS[(e + p + 2 * turn) % len(LENGTHS)]
                yield Run(weights=kind, files=files, engine=engine, length=length)
        kind, files = pairs[(7 * e) % len(pairs)]
        if engine != "float32-sequential":  # minutes, and its sums do not depend on the length
            yield Run(weights=kind, files=files, engine=engine, length=512)


def smallest_found(name: str, kind: str) -> float | None:
    """Return the smallest e by which a stage of a kind may be scaled and is still found."""
    torch.set_num_threads(1)
    pair, stage = cached_fixture(), PROBED[kind]

    def is_found(e: float) -> bool:
        changes: dict[Any, Any] = {(1, stage): lambda value, work: value * np.float32(1 + e)}
        engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, changes,
                             **ARITHMETICS[name])  # fmt: skip
        return str(Point(1, stage)) in origins_of(verdict_of(pair, checked(pair, engine)))

    low, high = 0, len(STEPS)  # found up to low, not from high on
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_found(STEPS[middle]) else (low, middle)
    return STEPS[low] if is_found(STEPS[low]) else None


@cache
def cached_fixture() -> Pair:
    return fixture_pair()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for local-error.md")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs) as pool,
    ):
        asked = list(runs(written_pairs(Path(folder))))
        done = list(pool.map(Run.__call__, asked, chunksize=4))
        probes = [(name, kind) for name in PROFILES for kind in PROBED]
        found = dict(zip(probes, pool.map(smallest_found, *zip(*probes, strict=True)), strict=True))
    text = "\n".join(report(done, found))
    alarms = [f"{run}: {alarm}" for run, _, alarm in done if alarm]
    print(text, *alarms, sep="\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "local-error.md").write_text(text + "\n")
    return 1 if alarms else 0


def report(
    done: list[tuple[Run, dict[str, tuple[float, float]], str]],
    found: Mapping[tuple[str, str], float | None],
) -> Iterator[str]:
    """Yield the lines of the tables."""
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    errors: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for run, by_kind, _ in done:
        for kind, (excess, error) in by_kind.items():
            row = worst[run.engine, run.weights]
            row[kind] = max(row[kind], excess)
            errors[run.engine][kind] = max(errors[run.engine][kind], error)
    kinds = list(dict.fromkeys(stage.kind for stage in STAGES.values() if stage.kind != "topk"))
    lengths = ", ".join(map(str, sorted({run.length for run, _, _ in done})))
    yield "# Local error of healthy engines, and the smallest fault that is found\n"
    yield f"`python tests/benchmarks/local_error.py --out evidence/local-error`: {len(done)} runs."
    families = ", ".join(FAMILIES)
    yield f"Families {families}, trained and random weights, {lengths} tokens;"
    yield f"{sum(bool(alarm) for _, _, alarm in done)} alarms.\n"
    yield "## Largest local error of healthy engines, in units of the tolerance\n"
    rows: list[list[Any]] = [[*key, *map(row.get, kinds)] for key, row in sorted(worst.items())]
    yield tabulate(rows, ["engine", "weights", *kinds], tablefmt="github", floatfmt=".2g")
    yield "\n## Smallest fault that is found, and its margin\n"
    yield "One stage of one layer scaled by 1 + e; 7 tokens, Q4_K_M, qwen2. The largest error is"
    yield "that of a whole tensor in any of the healthy runs; the margin is e over it.\n"
    rows = [
        [name, kind, PROBED[kind], errors[name][kind], e, e and e / max(errors[name][kind], 1e-12)]
        for (name, kind), e in found.items()
    ]
    yield tabulate(rows, ["engine", "kind", "stage", "largest healthy error", "smallest e found",
                          "margin"], tablefmt="github", floatfmt=".1e")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
