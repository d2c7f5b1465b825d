"""Scores the instrument: planted faults, clean controls and broken captures, one line each.

    python tests/faults/score.py --out evidence/fault-corpus

Every fault of the corpus is planted in all three families and in three arithmetics, in one layer,
in the first, the last, or in all of them by turns. Clean controls vary what engines and files may
differ in. Further faults and engines run on random models of other shapes. The weights of other
types than Q4_K_M are made by llama.cpp's quantiser (extra ``llamacpp``). Exits 1 unless all are
right.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported; torch's are set by case

import numpy as np
import torch
from tabulate import tabulate
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from harness import (  # noqa: E402
    FIXTURES,
    TOKENS,
    builtin,
    checked,
    faulty,
    fixture_pair,
    opened,
    origins_of,
    verdict_of,
)

from faults.captures import BROKEN, BROKEN_DUMPS, broken, broken_dump  # noqa: E402
from faults.corpus import FAULTS, Fault, has_bias  # noqa: E402
from faults.engines import ARITHMETICS, SUBSETS, Hiding, TorchEngine  # noqa: E402
from faults.shapes import Files, written_shapes  # noqa: E402
from faults.variants import ENGINES, SHAPED_FAULTS, fits  # noqa: E402
from pytest_aprt import weights  # noqa: E402
from pytest_aprt.arithmetic import STORAGE  # noqa: E402
from pytest_aprt.compare import judge  # noqa: E402
from pytest_aprt.pair import Pair, open_headers, open_pair  # noqa: E402
from pytest_aprt.replay import Reference  # noqa: E402
from pytest_aprt.stages import STAGES, Point  # noqa: E402
from pytest_aprt.testing import NumpyEngine, write_random_pair  # noqa: E402
from pytest_aprt.verdict import Verdict  # noqa: E402
from pytest_aprt.views import View  # noqa: E402

FAMILIES = ("qwen2", "llama", "qwen3")
FAULTY_IN = ("float32", "bfloat16", "q8_k")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_NL",
         "Q4_1", "Q5_0")  # fmt: skip
LENGTHS = (1, 7, 100)
SHAPED_LENGTHS = (9, 16, 40)
RIGHT = ("found", "below", "silent", "recognised")


@dataclass(frozen=True)
class Row:
    """One case and how it ended; ``size`` is the planted error in units of the tolerance."""

    group: str
    family: str
    what: str
    arithmetic: str
    where: str
    outcome: str
    size: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """One run: ``run`` returns its outcome, the size of what was planted, and a detail."""

    group: str
    family: str
    what: str
    arithmetic: str
    where: str
    run: Callable[[], tuple[str, float | None, str]]

    def __call__(self) -> Row:
        torch.set_num_threads(1)
        outcome, size, detail = self.run()
        return Row(self.group, self.family, self.what, self.arithmetic, self.where, outcome, size,
                   detail)  # fmt: skip


# --- planted faults -------------------------------------------------------------------------------


def placed(fault: Fault, turn: int, n_layers: int) -> Fault:
    """Return the fault in layer 2, in all, in the first or in the last layer, by turns."""
    if fault.layer in (None, -1) or not fault.movable:
        return fault
    if set(fault.changes) & {"embedding"}:
        return fault
    return replace(fault, layer=(min(2, n_layers - 1), -1, 0, n_layers - 1)[turn % 4])


def layers_of(fault: Fault, pair: Pair) -> list[int | None]:
    return list(range(pair.graph.n_layers)) if fault.layer == -1 else [fault.layer]


def run_fault(
    pair: Pair, fault: Fault, arithmetic: str, tokens: tuple[int, ...] = TOKENS
) -> tuple[str, float | None, str]:
    ways = ARITHMETICS[arithmetic]
    planted: dict[Point, tuple[Any, Any]] = {}

    def noted(stage: str, change: Any) -> Any:
        def changed(value: Any, work: Any) -> Any:
            wrong = change(value.copy(), work)
            planted[Point(work.layer, stage)] = (value, wrong.astype(np.float32))
            return wrong

        return changed

    changes = {
        (fault.layer, stage): noted(stage, change) for stage, change in fault.changes.items()
    }
    engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, changes, **ways)
    verdict = verdict_of(pair, checked(pair, engine), tokens)
    expected = [p for p in pair.graph.points if p in planted]
    found = {judged.point for judged in verdict.origins}
    kept = ways.get("kept", lambda x: x)
    storage = "bfloat16" if arithmetic.startswith("bfloat16") else "float32"
    sizes = {p: size_of(pair, p, *map(kept, planted[p]), storage) for p in expected}
    missed = [p for p in expected if p not in found]
    spurious = [p for p in verdict.origins if p.point not in expected]
    smallest = min(sizes.values(), default=0.0)
    if not planted:
        return "missed", 0.0, "nothing was planted: " + verdict.summary
    if spurious or (verdict.status == "INCONCLUSIVE"):
        return "spurious", smallest, f"{verdict.summary}"
    if not missed:
        return "found", smallest, ""
    if all(sizes[p] <= 2 for p in missed):  # the tolerance itself, doubled for the scale's response
        return "below", smallest, f"{len(missed)} of {len(expected)} places"
    return "missed", smallest, ", ".join(map(str, missed))


def size_of(pair: Pair, point: Point, right: Any, wrong: Any, storage: str) -> float:
    """Return the error that was planted, in units of the tolerance of its worst slice."""
    a, b = (torch.from_numpy(np.asarray(x, np.float32)) for x in (wrong, right))
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    tokens = a.shape[-2] if a.ndim > 1 else 1
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    view = View(STAGES[point.stage], pair.oracle_facts, mask)
    worst = judge(a, Reference(b, lambda: torch.zeros_like(b)), view, STORAGE[storage])
    return 0.0 if worst is None else worst.excess


@cache
def cached_pair(family: str, gguf: Path | None = None) -> Pair:
    return fixture_pair(family, gguf)


@cache
def shaped_pair(gguf: Path, hf: Path) -> Pair:
    return opened(gguf, hf)


def fault_cases() -> Iterator[Case]:
    for f, family in enumerate(FAMILIES):
        pair = cached_pair(family)
        for i, fault in enumerate(FAULTS):
            if not fault.needs(pair):
                continue
            for a, arithmetic in enumerate(FAULTY_IN):
                here = placed(fault, i + f + a, pair.graph.n_layers)
                where = {None: "end", -1: "all"}.get(here.layer, f"layer {here.layer}")
                run = partial(run_fault_named, family, fault.name, here.layer, arithmetic)
                yield Case("fault", family, fault.name, arithmetic, where, run)


# Shifting every position leaves attention as it was: only Q and K themselves show it.
UNSEEN_FROM_OUTSIDE = {"rope-off-by-one"}


def exposed(pair: Pair, fault: Fault, shown: Callable[[int | None, str], bool]) -> set[Point]:
    """Return the points at which a fault becomes visible."""
    expected: set[Point] = set()
    for planted in (Point(fault.layer, stage) for stage in fault.changes):
        after = [p for p in pair.graph.points if p == planted or planted in pair.graph.ancestors(p)]
        after = [p for p in after if shown(p.layer, p.stage)]
        expected |= {p for p in after if not pair.graph.ancestors(p) & set(after)}
    return expected


def run_hidden(
    family: str, name: str, arithmetic: str, subset: str
) -> tuple[str, float | None, str]:
    """A fault in a stage that the engine does not expose belongs to the bracket that spans it."""
    pair, shown = cached_pair(family), SUBSETS[subset]
    fault = next(fault for fault in FAULTS if fault.name == name)
    engine = faulty(pair, fault, **ARITHMETICS[arithmetic])
    verdict = verdict_of(pair, checked(pair, Hiding(engine, shown)))
    expected = exposed(pair, fault, shown)
    found = {judged.point for judged in verdict.origins}
    born = {Point(fault.layer, stage) for stage in fault.changes}
    brackets = [{j.point, *j.errors.bracket} for j in verdict.origins if j.errors]
    if not all(born & bracket for bracket in brackets):
        return "spurious", None, verdict.summary
    if found >= expected:  # and what a missing stage feeds besides, in a bracket that holds it
        return "found", None, ""
    clean = faulty(pair, **ARITHMETICS[arithmetic])
    size = size_from_outside(verdict, expected - found, engine, clean)
    return ("below" if size <= 2 else "missed"), size, verdict.summary


def size_from_outside(verdict: Verdict, points: set[Point], engine: Any, clean: Any) -> float:
    """Return how far a fault moves what the engine exposes, in units of the tolerance there."""
    wrong, right = (
        {Point(n, s): x.double() for n, stages in run.layers(TOKENS) for s, x in stages.items()}
        for run in (engine, clean)
    )
    sizes = [
        float(((wrong[p] - right[p]).norm(dim=-1) / right[p].norm(dim=-1)).max())
        / judged.errors.worst.tolerance
        for judged in verdict.points
        if (p := judged.point) in points and judged.errors and judged.errors.worst
    ]
    return max(sizes, default=float("inf"))


def hidden_cases() -> Iterator[Case]:
    subsets = ("layer-outputs", "no-scores", "residuals", *(f"half-of-all-{n}" for n in range(3)))
    for i, fault in enumerate(f for f in FAULTS if f.layer != -1):
        families = [f for f in FAMILIES if fault.needs(cached_pair(f))]
        if fault.name in UNSEEN_FROM_OUTSIDE:
            continue
        for k, arithmetic in enumerate(("float32", "q8_k")):
            family, subset = families[(i + k) % len(families)], subsets[(i // 2 + k) % len(subsets)]
            yield Case("fault", family, fault.name, arithmetic, f"only {subset}",
                       partial(run_hidden, family, fault.name, arithmetic, subset))  # fmt: skip


def run_fault_named(
    family: str, name: str, layer: int | None, arithmetic: str
) -> tuple[str, float | None, str]:
    fault = next(fault for fault in FAULTS if fault.name == name)
    return run_fault(cached_pair(family), replace(fault, layer=layer), arithmetic)


# --- clean controls -------------------------------------------------------------------------------


def silent(verdict: Verdict) -> tuple[str, float | None, str]:
    excess = [j.errors.worst.excess for j in verdict.points if j.errors and j.errors.worst]
    quiet = verdict.status in ("PARITY", "QUANTISATION_NOISE")
    return ("silent" if quiet else "alarm"), max(excess, default=0.0), (
        "" if quiet else verdict.summary
    )  # fmt: skip


def engine_of(pair: Pair, name: str) -> Any:
    if name == "builtin":
        return builtin(pair)
    if name.startswith("torch-"):
        return TorchEngine(pair, getattr(torch, name.removeprefix("torch-")))
    ways = ARITHMETICS[name]
    return NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, {}, **ways)


def tokens_of(length: int, vocabulary: int = 1000) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(0, vocabulary, length).tolist())


def run_clean(
    family: str, gguf: Path | None, engine: str, length: int, subset: str | None
) -> tuple[str, float | None, str]:
    pair = cached_pair(family, gguf)
    made = engine_of(pair, engine)
    if subset is not None:
        made = Hiding(made, SUBSETS[subset])
    return silent(verdict_of(pair, checked(pair, made), tokens_of(length)))


CONFIGURATIONS = {
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


def sink(state: dict[str, torch.Tensor]) -> None:
    """Token 0 at about 1000 times the norm of the others."""
    state["model.embed_tokens.weight"][0] *= 3000


def massive(state: dict[str, torch.Tensor]) -> None:
    """Two channels that carry far more than all others, from the first layer on."""
    state["model.layers.0.mlp.down_proj.weight"][[5, 40]] *= 300


ADJUSTMENTS = {"sink": sink, "massive": massive}


def run_extreme(
    family: str, adjust: str, engine: str, fault: bool
) -> tuple[str, float | None, str]:
    """A random pair with extreme activations; a fault of 6 % hides on the ordinary tokens."""
    kind, own = CONFIGURATIONS[family]
    config = kind(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, pad_token_id=None, **own,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        gguf, hf = write_random_pair(Path(folder), config, adjust=ADJUSTMENTS[adjust])
        pair = open_pair(open_headers(str(gguf), str(hf)))
        changes: dict[Any, Any] = {}
        if fault:
            changes = {
                (1, "post_attn_residual"): lambda v, w: np.concatenate([v[:1], 1.06 * v[1:]])
            }
        ways = ARITHMETICS[engine]
        made = NumpyEngine(
            pair.model_weights, pair.oracle_facts, pair.architecture, changes, **ways
        )
        verdict = verdict_of(pair, checked(pair, made), (0, 5, 9, 33, 21, 7))
    if not fault:
        return silent(verdict)
    right = origins_of(verdict) == ["L01-post_attn_residual"]
    return ("found" if right else "missed"), None, "" if right else verdict.summary


def clean_cases(files: dict[tuple[str, str], Path | None]) -> Iterator[Case]:
    for family in FAMILIES:

        def case(what: str, engine: str, where: str, *run: Any, family: str = family) -> Case:
            return Case("clean", family, what, engine, where, partial(run_clean, family, *run))

        for kind in TYPES:
            for engine in ("builtin", "q8_k", "torch-bfloat16"):
                yield case(
                    f"{kind} weights", engine, "7 tokens", files[family, kind], engine, 7, None
                )
        for engine in (*ARITHMETICS, "torch-bfloat16", "torch-float16"):
            for length in LENGTHS:
                yield case("engine", engine, f"{length} tokens", None, engine, length, None)
        for engine in ("builtin", "q8_k", "torch-bfloat16"):
            yield case("long prompt", engine, "512 tokens", None, engine, 512, None)
        for subset in SUBSETS:
            for engine in ("float32", "q8_k", "bfloat16"):
                yield case(f"only {subset}", engine, "7 tokens", None, engine, 7, subset)
        for adjust in ADJUSTMENTS:
            for engine in ("float32", "q8_k", "bfloat16"):
                for fault in (False, True):
                    yield Case(
                        "fault" if fault else "clean", family,
                        f"6 % behind a {adjust}" if fault else f"{adjust} activations", engine,
                        "L01" if fault else "6 tokens",
                        partial(run_extreme, family, adjust, engine, fault),
                    )  # fmt: skip


# --- models of other shapes -----------------------------------------------------------------------


def run_shaped_fault(
    files: tuple[Path, Path], name: str, layer: int | None, arithmetic: str, length: int
) -> tuple[str, float | None, str]:
    fault = next(fault for fault in SHAPED_FAULTS if fault.name == name)
    tokens = tokens_of(length, vocabulary=200)
    return run_fault(shaped_pair(*files), replace(fault, layer=layer), arithmetic, tokens)


def run_shaped_engine(
    files: tuple[Path, Path], name: str, length: int
) -> tuple[str, float | None, str]:
    pair = shaped_pair(*files)
    engine = checked(pair, ENGINES[name](pair))
    return silent(verdict_of(pair, engine, tokens_of(length, vocabulary=200)))


def shaped_cases(files: Files) -> Iterator[Case]:
    """Each fault on three shapes, each healthy engine on three, by turns."""
    shapes, arithmetics = list(files), ("float32", "bfloat16", "q8_0")
    pairs = {shape: shaped_pair(*files[shape]) for shape in shapes}
    for i, fault in enumerate(SHAPED_FAULTS):
        fit = [s for s in shapes if fault.needs(pairs[s])]
        for k, arithmetic in enumerate(arithmetics):
            fit_too = [s for s in fit if fits(arithmetic, pairs[s])]
            shape = fit_too[(3 * i + 4 * k) % len(fit_too)]
            here = placed(fault, i + k, pairs[shape].graph.n_layers)
            where = {None: "end", -1: "all"}.get(here.layer, f"layer {here.layer}")
            length = SHAPED_LENGTHS[(i + k) % 3]
            run = partial(run_shaped_fault, files[shape], fault.name, here.layer, arithmetic,
                          length)  # fmt: skip
            yield Case("fault", shape, fault.name, arithmetic, where, run)
    for i, name in enumerate(ENGINES):
        fit = [s for s in shapes if fits(name, pairs[s])]
        for k, length in enumerate(SHAPED_LENGTHS):
            shape = fit[(3 * i + 4 * k) % len(fit)]
            run = partial(run_shaped_engine, files[shape], name, length)
            yield Case("clean", shape, name, "own", f"{length} tokens", run)


# --- matrices that are streamed, as those of large models are ------------------------------------

STREAMED = (
    "o-proj-transposed",
    "tail-block-zero",
    "rope-theta-10k",
    "gelu-for-silu",
    "head-rolled",
)


def run_streamed(family: str, name: str | None, arithmetic: str) -> tuple[str, float | None, str]:
    """The fixtures' matrices are small enough to be held; here none is."""
    folder = FIXTURES / f"tiny-{family}"
    with patch.object(weights, "WHOLE", 0):
        pair = open_pair(open_headers(str(folder / "q4_k_m.gguf"), str(folder / "hf")))
        assert pair.model_weights.layer(0).matrices
        if name is None:
            return silent(verdict_of(pair, checked(pair, engine_of(pair, arithmetic))))
        fault = next(fault for fault in FAULTS if fault.name == name)
        verdict = verdict_of(pair, faulty(pair, fault, **ARITHMETICS[arithmetic]))
    found, planted = origins_of(verdict), [str(Point(fault.layer, s)) for s in fault.changes]
    outcome = "found" if found == planted else "spurious" if set(found) - {*planted} else "missed"
    return outcome, None, "" if outcome == "found" else verdict.summary


def streamed_cases() -> Iterator[Case]:
    for family in FAMILIES:
        for arithmetic in ("float32", "q8_k"):
            for name in (None, *STREAMED):
                what = "streamed matrices" if name is None else f"{name}, streamed"
                yield Case("fault" if name else "clean", family, what, arithmetic, "7 tokens",
                           partial(run_streamed, family, name, arithmetic))  # fmt: skip


# --- broken captures ------------------------------------------------------------------------------


def run_broken(family: str, name: str) -> tuple[str, float | None, str]:
    verdict = broken(cached_pair(family), name)
    test, says = BROKEN[name].test, BROKEN[name].says
    right = verdict.status == "INCONCLUSIVE" and verdict.rung == "self-test" and (
        f"{test!r}" in verdict.summary and says in verdict.summary
    )  # fmt: skip
    return ("recognised" if right else "taken for a fault"), None, verdict.summary


def run_broken_dump(family: str, name: str) -> tuple[str, float | None, str]:
    with tempfile.TemporaryDirectory() as folder:
        said = broken_dump(cached_pair(family), name, Path(folder))
    right = said.startswith(("INCONCLUSIVE", "error")) and BROKEN_DUMPS[name].says in said
    return ("recognised" if right else "taken for a fault"), None, said


def broken_cases() -> Iterator[Case]:
    for family in FAMILIES:
        for name, dump in BROKEN_DUMPS.items():
            if has_bias(cached_pair(family)) or not dump.needs_bias:
                yield Case("broken capture", family, name, "float32", "dump",
                           partial(run_broken_dump, family, name))  # fmt: skip
        for name in BROKEN:
            yield Case("broken capture", family, name, "float32", "",
                       partial(run_broken, family, name))  # fmt: skip


# --- the score ------------------------------------------------------------------------------------


def quantised(folder: Path, types: tuple[str, ...] = TYPES) -> dict[tuple[str, str], Path | None]:
    """Quantise the fixtures to these types; the fixtures' own file is Q4_K_M."""
    sys.path.insert(0, str(FIXTURES))
    import make_fixtures

    files: dict[tuple[str, str], Path | None] = {}
    for family in FAMILIES:
        for kind in types:
            path = folder / f"{family}-{kind.lower()}.gguf"
            files[family, kind] = None if kind == "Q4_K_M" else path
            if kind != "Q4_K_M":
                make_fixtures.write_gguf(FIXTURES / f"tiny-{family}" / "hf", path, kind)
    return files


def sample(cases: list[Case]) -> list[Case]:
    """Return every fault and every broken capture once, family and arithmetic by turns."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.what, []).append(case)
    return [group[4 * i % len(group)] for i, group in enumerate(groups.values())]


def table(rows: list[Row]) -> str:
    lines = []
    for group in ("fault", "clean", "broken capture"):
        counts = Counter(row.outcome for row in rows if row.group == group)
        lines += [[group, outcome, count] for outcome, count in counts.most_common()]
    return tabulate(lines, ["cases", "outcome", "count"], tablefmt="github")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for score.json and score.md")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose description contains this")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            *fault_cases(),
            *hidden_cases(),
            *clean_cases(quantised(Path(folder))),
            *shaped_cases(written_shapes(Path(folder))),
            *streamed_cases(),
            *broken_cases(),
        ]
        cases = [
            c
            for c in cases
            if options.only in f"{c.group} {c.family} {c.what} {c.arithmetic} {c.where}"
        ]
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(_run, cases, chunksize=8))
    seconds = time.monotonic() - started
    cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    wrong = [row for row in rows if row.outcome not in RIGHT]
    print(table(rows))
    for row in wrong:
        print(row)
    print(f"{len(rows)} cases, {len(wrong)} wrong, {seconds:.0f} s ({cpu:.0f} s of CPU time)")
    if options.out is not None:
        write(options.out, rows, seconds, cpu)
    return 1 if wrong else 0


def _run(case: Case) -> Row:
    return case()


def write(folder: Path, rows: list[Row], seconds: float, cpu: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    as_json = [{k: str(v) if v == float("inf") else v for k, v in asdict(r).items()} for r in rows]
    (folder / "score.json").write_text(json.dumps(as_json, indent=0) + "\n")
    below = [r for r in rows if r.outcome == "below"]
    found = [r for r in rows if r.outcome == "found" and r.size is not None]
    margins = [
        [
            arithmetic,
            max((r.size for r in rows if r.outcome == "silent" and r.arithmetic == arithmetic),
                default=None),
            min(r.size for r in found if r.arithmetic == arithmetic),
        ]
        for arithmetic in (*FAULTY_IN, "q8_0")
    ]  # fmt: skip
    faults = len({row.what for row in rows if row.group == "fault"})
    text = [
        "# The fault corpus, scored\n",
        f"`python tests/faults/score.py --out evidence/fault-corpus`: {len(rows)} cases on two "
        f"processes in {seconds:.0f} s, {cpu:.0f} s of CPU time. {faults} faults in three "
        "arithmetics, those of corpus.py in the families qwen2, llama and qwen3, those of "
        "variants.py in models of ten other shapes.\n",
        table(rows),
        "\n## Margins\n\nIn units of the tolerance: above 1 is an origin.\n",
        tabulate(margins, ["arithmetic", "largest healthy", "smallest fault found"],
                 tablefmt="github", floatfmt=".3g"),
        "\n## Faults below what their arithmetic shows\n\nTheir size in units of the tolerance.\n",
        tabulate([[r.what, r.family, r.arithmetic, r.where, r.size] for r in below],
                 ["fault", "family", "arithmetic", "where", "size"], tablefmt="github",
                 floatfmt=".2g"),
        "",
    ]  # fmt: skip
    (folder / "score.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
