"""Measures what local error healthy engines leave: the figures behind ``arithmetic.STORAGE``.

    python tests/benchmarks/local_error.py --out evidence/local-error

Runs healthy engines in every arithmetic over families, seeds, shapes, weight types and 1 to 512
tokens, and prints for each kind of stage the largest local error in units of the tolerance; then
the smallest fault of each kind of stage that is found: one stage scaled by 1 + e in one layer.
Weights other than F32 and Q4_K_M need the extra ``llamacpp``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from faults.engines import ARITHMETICS  # noqa: E402
from faults.score import CONFIGURATIONS, FAMILIES, engine_of, quantised, tokens_of  # noqa: E402
from harness import checked, fixture_pair, origins_of, verdict_of  # noqa: E402

from pytest_aprt.pair import Pair, open_headers, open_pair  # noqa: E402
from pytest_aprt.stages import STAGES, Point  # noqa: E402
from pytest_aprt.testing import NumpyEngine, write_random_pair  # noqa: E402

ENGINES = (*ARITHMETICS, "torch-bfloat16", "torch-float16")
TYPES = ("F32", "Q8_0", "Q4_K_M", "Q2_K", "Q4_1")
LENGTHS = (1, 2, 7, 64, 512)
SHAPES = (
    # hidden, intermediate, heads, kv heads
    (256, 512, 4, 1),
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
STEPS = [10 ** (-k / 4) for k in range(29)]  # 1 down to 1e-7


def pairs(folder: Path) -> Iterator[tuple[str, Pair]]:
    """Yield pairs of a weight type: the fixtures, and random ones of other shapes."""
    files = quantised(folder, TYPES)
    for (_family, kind), path in files.items():
        yield kind, fixture_pair(_family, path)
    for family in FAMILIES:
        config, own = CONFIGURATIONS[family]
        for seed, (hidden, intermediate, heads, kv_heads) in enumerate(SHAPES):
            made = folder / f"{family}-{seed}"
            made.mkdir()
            gguf, hf = write_random_pair(made, config(
                vocab_size=1000, hidden_size=hidden, intermediate_size=intermediate,
                num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
                pad_token_id=None, **own), seed=seed)  # fmt: skip
            yield "F32", open_pair(open_headers(str(gguf), str(hf)))


def healthy(folder: Path) -> tuple[dict[tuple[str, str], dict[str, float]], list[str]]:
    """Return the largest excess by (engine, weight type) and kind, and every alarm."""
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    alarms = []
    for kind, pair in pairs(folder):
        for name in ENGINES:
            for length in LENGTHS if kind in ("F32", "Q4_K_M") else (7,):
                if length == 512 and name == "float32-sequential":
                    continue  # minutes, and the order of its sums does not depend on the length
                verdict = verdict_of(pair, checked(pair, engine_of(pair, name)), tokens_of(length))
                if verdict.status not in ("PARITY", "QUANTISATION_NOISE"):
                    alarms.append(
                        f"{pair.architecture.name} {kind} {name} {length}: {verdict.summary}"
                    )
                for judged in verdict.points:
                    if judged.errors and judged.errors.worst:
                        row = worst[name, kind]
                        key = STAGES[judged.point.stage].kind
                        row[key] = max(row[key], judged.errors.worst.excess)
    return worst, alarms


def smallest_found(pair: Pair, name: str) -> dict[str, float]:
    """Return, for each kind of stage, the smallest factor 1 + e that is found at its place."""
    found = {}
    for kind, stage in PROBED.items():
        for e in STEPS:
            changes: dict[Any, Any] = {(1, stage): lambda value, work, e=e: value * (1 + e)}
            engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, changes,
                                 **ARITHMETICS[name])  # fmt: skip
            if str(Point(1, stage)) not in origins_of(verdict_of(pair, checked(pair, engine))):
                break
            found[kind] = e
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for local-error.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        worst, alarms = healthy(Path(folder))
    kinds = list(dict.fromkeys(stage.kind for stage in STAGES.values() if stage.kind != "topk"))
    text = [
        "# Local error of healthy engines, and the smallest fault that is found\n",
        f"Families {', '.join(FAMILIES)}; prompts of {', '.join(map(str, LENGTHS))} tokens; "
        f"{len(alarms)} alarms.\n",
        "## Largest local error, in units of the tolerance\n",
        tabulate([[*key, *(row.get(kind) for kind in kinds)] for key, row in worst.items()],
                 ["engine", "weights", *kinds], tablefmt="github", floatfmt=".2g"),
        "\n## Smallest factor 1 + e that is found\n\nOne stage of one layer, 7 tokens, Q4_K_M.\n",
    ]  # fmt: skip
    pair = fixture_pair()
    rows = [[name, *map(smallest_found(pair, name).get, PROBED)] for name in ARITHMETICS]
    text.append(tabulate(rows, ["engine", *PROBED], tablefmt="github", floatfmt=".1e"))
    print("\n".join(text), *alarms, sep="\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "local-error.md").write_text("\n".join([*text, ""]))
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
