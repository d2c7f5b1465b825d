"""Scores llama.cpp itself under test: healthy in every type, and with faults planted.

    python tests/faults/score_live.py --out evidence/llama.cpp

Three parts: the four errors of all ``stages`` in all types, the planted ``faults``, and a
``sweep`` of healthy runs over threads, lengths of prompt and steps. Needs the extra
``llamacpp``, whose quantiser makes the types. Exits 1 unless every healthy run is silent and
every fault is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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

from faults.live import IN_THE_ENGINE, IN_THE_FILE, plant  # noqa: E402
from faults.score import quantised  # noqa: E402
from pytest_aprt.arithmetic import profile_named  # noqa: E402
from pytest_aprt.engines.llamacpp import LlamaCpp  # noqa: E402
from pytest_aprt.measure import measure_pair  # noqa: E402
from pytest_aprt.pair import Pair  # noqa: E402
from pytest_aprt.readings import Prompt  # noqa: E402
from pytest_aprt.rungs.config import fact_rows  # noqa: E402
from pytest_aprt.rungs.decode import decode_rows  # noqa: E402
from pytest_aprt.rungs.path import path_rows  # noqa: E402
from pytest_aprt.verdict import Verdict, conclude  # noqa: E402

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32")
LENGTHS = (1, 7, 100, 512)
STEPS = 4
ERRORS = ("total", "weights", "engine", "local")
FAULTS = (*IN_THE_ENGINE, *IN_THE_FILE)
QUIET = ("PARITY", "QUANTISATION_NOISE")
VERSIONS = {
    name: version(name)
    for name in ("pytest-aprt", "llama-cpp-python", "gguf", "torch", "transformers", "numpy")
}
Files = dict[tuple[str, str], Path | None]
"""Path by family and type; None for the fixture's own."""


def tokens_of(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(5, 1000, length).tolist())


def live(family: str, path: Path | None, threads: int = 1) -> tuple[Pair, Any]:
    torch.set_num_threads(1)
    pair = fixture_pair(family, path)
    options = {"n_threads": threads, "n_threads_batch": threads}
    raw = LlamaCpp(pair.model.file.path, pair.model_facts, pair.architecture, options)
    return pair, harness.checked(pair, raw)


def measured(pair: Pair, engine: Any, *prompts: tuple[int, ...]) -> tuple[Any, Verdict]:
    asked = [Prompt(text="", tokens=tokens) for tokens in prompts]
    points = pair.graph.points
    result = measure_pair(pair, engine, asked, points, profile_named(engine.arithmetic))
    facts = fact_rows(pair, max(map(len, prompts)))
    return result, conclude(pair.graph, points, result, facts, harness.THRESHOLDS)


class Stages(NamedTuple):
    """The errors of one file's stages: relative L2 at the worst layer."""

    family: str
    kind: str
    right: bool
    verdict: str
    engine: dict[str, Any]
    stages: dict[str, dict[str, float]]


def run_stages(family: str, kind: str, path: Path | None) -> Stages:
    pair, engine = live(family, path)
    result, verdict = measured(pair, engine, TOKENS)
    stages: dict[str, dict[str, float]] = {}
    for e in result.errors:
        if not e.missing:
            row = stages.setdefault(e.point.stage, dict.fromkeys(ERRORS, 0.0))
            for name in ERRORS:
                row[name] = max(row[name], getattr(e, name).rel_l2)
    right = verdict.status in QUIET
    return Stages(family, kind, right, verdict.status, dict(engine.raw.details), stages)


def stages_in_words(found: list[Stages]) -> list[str]:
    ggml, system = (found[0].engine[name] for name in ("ggml", "system"))
    text = [
        "Relative L2 at the worst layer, on 7 tokens; `ffn_silu` is fused and not shown. `total` "
        "is model against oracle, `weights` shadow against oracle, `engine` model against shadow, "
        "`local` model against replay.\n",
        f"ggml {ggml}; {system.replace(' |', ',').rstrip(',')}.\n",
    ]  # fmt: skip
    for f in found:
        rows = [[stage, *errors.values()] for stage, errors in f.stages.items()]
        table = tabulate(rows, ["stage", *ERRORS], tablefmt="github", floatfmt=".1e")
        text += [f"## {f.family} {f.kind}: {f.verdict}\n", table, ""]
    return text


class Planted(NamedTuple):
    """One fault and what was said of it."""

    place: str
    family: str
    name: str
    right: bool
    said: str


def run_fault(index: int) -> Planted:
    torch.set_num_threads(1)
    fault = FAULTS[index]
    with tempfile.TemporaryDirectory() as folder:
        found = plant(fault, Path(folder))
    place = "engine" if fault.rung == "stages" else "file"
    return Planted(place, fault.family, fault.name, found.right, found.verdict.summary)


def faults_in_words(found: list[Planted]) -> list[str]:
    rows = [[f.place, f.family, f.name, "yes" if f.right else "NO", f.said] for f in found]
    return [
        "In the engine: the run is told what is right, and the engine computes something else. In "
        "the file: the run is given the file that the engine reads.\n",
        tabulate(rows, ["in", "family", "fault", "named", "verdict"], tablefmt="github"), "",
    ]  # fmt: skip


class Healthy(NamedTuple):
    """One file on some threads: what every prompt, step and rung gave."""

    family: str
    kind: str
    threads: int
    right: bool
    verdict: str
    worst: float
    at: str
    steps: int
    changes: dict[str, float]


def run_healthy(family: str, kind: str, path: Path | None, threads: int) -> Healthy:
    pair, engine = live(family, path, threads)
    prompts = [*map(tokens_of, LENGTHS)]
    result, verdict = measured(pair, engine, *prompts)
    worst = max((e for e in result.errors if e.worst), key=lambda e: e.worst.excess)
    decoded = decode_rows(pair, engine, result.finals[:2], STEPS)
    steps = sum(not row.broken for row in decoded if row.name.startswith("step"))
    (path_row,) = path_rows(pair, engine, result.finals[1:2], 0.999)
    silent = verdict.status in QUIET and steps == STEPS and not path_row.broken
    at = f"{worst.point}, {len(prompts[worst.prompt])} tokens"
    return Healthy(family, kind, threads, silent, verdict.status, worst.worst.excess, at, steps,
                   path_row.figures["changes"])  # fmt: skip


def sweep_in_words(found: list[Healthy]) -> list[str]:
    changes = list(found[0].changes)
    rows = [
        [h.family, h.kind, h.threads, h.verdict, h.worst, h.at, f"{h.steps} of {STEPS}",
         *map(h.changes.get, changes)]
        for h in found
    ]  # fmt: skip
    columns = ["family", "type", "threads", "verdict", "worst", "at", "steps", *changes]
    return [
        f"Prompts of {', '.join(map(str, LENGTHS))} tokens, and {STEPS} steps with the cache. The "
        "worst local error is in units of the tolerance: above 1 is an origin. Production "
        "settings, each alone, on 7 tokens: relative L2 of the logits.\n",
        tabulate(rows, columns, tablefmt="github", floatfmt=".2g"), "",
    ]  # fmt: skip


class Part(NamedTuple):
    """One file of the evidence."""

    title: str
    run: Callable[..., Any]
    in_words: Callable[[list[Any]], list[str]]
    cases: Callable[[Files], list[tuple[Any, ...]]]


PARTS = {
    "stages": Part("The four errors of every stage of llama.cpp", run_stages, stages_in_words,
                   lambda files: [(*key, path) for key, path in files.items()]),
    "faults": Part("Faults planted in llama.cpp", run_fault, faults_in_words,
                   lambda files: [(index,) for index in range(len(FAULTS))]),
    "sweep": Part("Healthy runs of llama.cpp", run_healthy, sweep_in_words,
                  lambda files: [(*key, path, n) for key, path in files.items() for n in (1, 2)]),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <part>.json and <part>.md")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs) as pool:
        files = {} if options.parts == ["faults"] else quantised(Path(folder), TYPES)
        for name in options.parts:
            started, part = time.monotonic(), PARTS[name]
            runs = [pool.submit(part.run, *case) for case in part.cases(files)]
            found = [run.result() for run in runs]
            bad = [case for case in found if not case.right]
            said = f"{len(found)} cases, {len(bad)} wrong, {time.monotonic() - started:.0f} s"
            print(f"{name}: {said}", *bad, sep="\n", flush=True)
            wrong += len(bad)
            if options.out is not None:
                write(options.out, name, found, said)
    return 1 if wrong else 0


def write(folder: Path, name: str, found: list[Any], said: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"versions": VERSIONS, "cases": [case._asdict() for case in found]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n")
    text = [
        f"# {PARTS[name].title}\n",
        f"`python tests/faults/score_live.py --out evidence/llama.cpp --parts {name}`: {said}; "
        f"{', '.join(f'{what} {number}' for what, number in VERSIONS.items())}.\n",
        *PARTS[name].in_words(found),
    ]
    (folder / f"{name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
