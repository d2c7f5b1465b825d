"""Scores llama.cpp itself under test: healthy in every type, and with faults planted.

    python tests/faults/score_live.py --out evidence/llama.cpp

Needs the extra ``llamacpp``, whose quantiser makes the types. Exits 1 unless every healthy run is
silent and every fault is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import harness  # noqa: E402
from harness import TOKENS, fixture_pair  # noqa: E402

from faults.live import IN_THE_ENGINE, IN_THE_FILE, LiveFault, plant  # noqa: E402
from faults.score import quantised  # noqa: E402
from pytest_aprt.arithmetic import profile_named  # noqa: E402
from pytest_aprt.engines.llamacpp import LlamaCpp  # noqa: E402
from pytest_aprt.measure import Prompt, measure_pair  # noqa: E402
from pytest_aprt.rungs.config import fact_rows  # noqa: E402
from pytest_aprt.rungs.decode import decode_rows  # noqa: E402
from pytest_aprt.rungs.path import path_rows  # noqa: E402
from pytest_aprt.verdict import conclude  # noqa: E402

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32")
LENGTHS = (1, 7, 100, 512)
STEPS = 4
ERRORS = ("total", "weights", "engine", "local")
QUIET = ("PARITY", "QUANTISATION_NOISE")


class Healthy(NamedTuple):
    """One file in llama.cpp: what every prompt, step and rung gave."""

    family: str
    kind: str
    threads: int
    right: bool
    verdict: str
    worst: float  # local error, in units of the tolerance
    at: str
    steps: int  # that agree with the prefill
    changes: dict[str, float]  # by production settings: relative L2 of the logits
    stages: dict[str, dict[str, float]]  # relative L2 at the worst layer, 7 tokens
    details: dict[str, Any]
    seconds: float


def tokens_of(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(5, 1000, length).tolist())


def run_healthy(family: str, kind: str, path: Path | None, threads: int) -> Healthy:
    torch.set_num_threads(1)
    started = time.monotonic()
    pair = fixture_pair(family, path)
    options = {"n_threads": threads, "n_threads_batch": threads}
    raw = LlamaCpp(pair.gguf.path, pair.model_facts, pair.architecture, options)
    engine = harness.checked(pair, raw)
    prompts = [Prompt(text="", tokens=t) for t in (TOKENS, *map(tokens_of, LENGTHS))]
    points = pair.graph.points
    result = measure_pair(pair, engine, prompts, points, profile_named(raw.arithmetic))
    facts = fact_rows(pair, max(LENGTHS))
    verdict = conclude(pair.graph, points, result, facts, harness.THRESHOLDS)
    judged = [e for e in result.errors if e.worst]
    worst = max(judged, key=lambda e: e.worst.excess)
    stages: dict[str, dict[str, float]] = {}
    for e in result.errors:
        if e.prompt or e.missing:
            continue
        row = stages.setdefault(e.point.stage, dict.fromkeys(ERRORS, 0.0))
        for name in ERRORS:
            row[name] = max(row[name], getattr(e, name).rel_l2)
    decoded = decode_rows(pair, engine, result.finals[:2], STEPS)
    steps = sum(not row.broken for row in decoded if row.name.startswith("step"))
    (path_row,) = path_rows(pair, engine, result.finals[:1], 0.999)
    silent = verdict.status in QUIET and steps == STEPS and not path_row.broken
    return Healthy(
        family, kind, threads, silent, verdict.status, worst.worst.excess,
        f"{worst.point}, {len(prompts[worst.prompt].tokens)} tokens", steps,
        path_row.figures["changes"], stages, dict(raw.details), time.monotonic() - started,
    )  # fmt: skip


class Planted(NamedTuple):
    """One fault and what was said of it."""

    place: str
    family: str
    name: str
    right: bool
    said: str


def run_fault(fault: LiveFault) -> Planted:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = plant(fault, Path(folder))
    place = "engine" if fault.rung == "stages" else "file"
    return Planted(place, fault.family, fault.name, found.right, found.verdict.summary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for score.json and score.md")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs) as pool:
        files = quantised(Path(folder), TYPES)
        runs = [
            pool.submit(partial(run_healthy, family, kind, path, threads))
            for (family, kind), path in files.items()
            for threads in (1, 2)
        ]
        planted = list(pool.map(run_fault, [*IN_THE_ENGINE, *IN_THE_FILE]))
        healthy = [run.result() for run in runs]
    seconds = time.monotonic() - started
    wrong = [case for case in (*healthy, *planted) if not case.right]
    for case in wrong:
        print(case)
    print(
        f"{len(healthy)} healthy runs, {len(planted)} faults, {len(wrong)} wrong, {seconds:.0f} s"
    )
    if options.out is not None:
        write(options.out, healthy, planted, seconds)
    return 1 if wrong else 0


def write(folder: Path, healthy: list[Healthy], planted: list[Planted], seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"healthy": [h._asdict() for h in healthy], "faults": [p._asdict() for p in planted]}
    (folder / "score.json").write_text(json.dumps(content, indent=0) + "\n")
    packages = ("numpy", "torch", "transformers", "gguf", "llama-cpp-python")
    told = {name: version(name) for name in packages} | {
        key: healthy[0].details[key] for key in ("ggml", "system")
    }
    text = [
        "# llama.cpp, live, under test\n",
        f"`python tests/faults/score_live.py --out evidence/llama.cpp`: {len(healthy)} healthy "
        f"runs, {sum(h.right for h in healthy)} of them silent, and {len(planted)} faults, "
        f"{sum(p.right for p in planted)} of them named, on two processes in {seconds:.0f} s.\n",
        tabulate(told.items(), ["what", "version"], tablefmt="github"),
        "\n## Healthy\n\nPrompts of 1, 7, 100 and 512 tokens, each at every stage but `ffn_silu`, "
        f"and {STEPS} steps with the cache. The worst local error is in units of the tolerance: "
        "above 1 is an origin. Production settings, each alone: relative L2 of the logits.\n",
        tabulate(
            [
                [h.family, h.kind, h.threads, h.verdict, h.worst, h.at, f"{h.steps} of {STEPS}",
                 *(h.changes.get(name) for name in healthy[0].changes)]
                for h in healthy
            ],
            ["family", "type", "threads", "verdict", "worst", "at", "steps", *healthy[0].changes],
            tablefmt="github", floatfmt=".2g",
        ),
        "\n## Faults\n\nIn the engine: the run is given what is right. In the file: the run is "
        "given what the engine reads.\n",
        tabulate([[p.place, p.family, p.name, "yes" if p.right else "NO", p.said] for p in planted],
                 ["in", "family", "fault", "named", "verdict"], tablefmt="github"),
        "\n## The four errors of every stage\n\nRelative L2 at the worst layer, 7 tokens, 1 "
        "thread. `total` is model against oracle, `weights` shadow against oracle, `engine` model "
        "against shadow, `local` model against replay.\n",
    ]  # fmt: skip
    for h in healthy:
        if h.threads == 1:
            rows = [[stage, *errors.values()] for stage, errors in h.stages.items()]
            table = tabulate(rows, ["stage", *ERRORS], tablefmt="github", floatfmt=".1e")
            text += [f"### {h.family} {h.kind}\n", table, ""]
    (folder / "score.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
