"""Measures the gaps at which healthy engines flip: the figure of pytest_aprt/rungs/logits.py.

    PYTHONPATH=tests python tests/benchmarks/near_ties.py

Runs the NumPy engine in every arithmetic on 512 tokens of each fixture pair and prints how many
positions flip against the shadow, and the largest gap relative to the shadow's highest logit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from faults.engines import ARITHMETICS
from harness import checked, faulty, fixture_pair
from tabulate import tabulate

from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.readings import Finals, Prompt
from pytest_aprt.rungs.logits import at_all

TEXT = "".join(p.read_text("utf-8")[:3000] for p in sorted(Path(__file__).parent.glob("*.py")))


@torch.no_grad()
def main() -> None:
    rows = []
    for family in ("qwen2", "llama", "qwen3"):
        pair = fixture_pair(family)
        tokens = tuple(pair.tokenizer(TEXT, verbose=False)["input_ids"][:512])
        sides = [TransformersRunner(pair.config, w) for w in (pair.model_weights,
                                                              pair.oracle_weights)]  # fmt: skip
        shadow, oracle = ([*side.layers(tokens)][-1].stages for side in sides)
        for name, ways in ARITHMETICS.items():
            model = [*checked(pair, faulty(pair, **ways)).layers(tokens)][-1].stages
            prompt = Prompt(text="", tokens=tokens)
            finals = Finals(prompt=prompt, model=model, shadow=shadow, oracle=oracle)
            engine = at_all(pair, finals).errors["engine"]
            rows.append([family, name, int((~engine.same).sum()), float(engine.gap.max())])
    print(tabulate(rows, ["family", "arithmetic", "flips", "largest gap"], floatfmt=".4f"))


if __name__ == "__main__":
    main()
