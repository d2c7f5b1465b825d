"""The committed ledger against runs of today: our contracts as items, on every fixture."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from contract_bench import IDS, ROOT

from pytest_aprt.ledger.record import read

COMMITTED = ROOT / "evidence" / "contracts" / "ledger.jsonl"
OF_THE_MACHINE = {"run.peak_rss_bytes"}
ROUNDING = {"excess"}  # rounding in units of the tolerance: 0.10 to 0.15 with two releases of NumPy


def near(fresh, committed, name=""):
    """Whether two values agree: numbers up to what another processor's rounding changes."""
    if isinstance(fresh, (int, float)) and isinstance(committed, (int, float)):
        least = 0.1 if name in ROUNDING else 2e-3
        return math.isclose(fresh, committed, rel_tol=0.02, abs_tol=least)
    if isinstance(fresh, list) and isinstance(committed, list):
        return len(fresh) == len(committed) and all(map(near, fresh, committed))
    return fresh == committed


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_a_fresh_run_says_what_the_committed_ledger_says(family, tmp_path):
    model, oracle = f"fixtures/{family}/q4_k_m.gguf", f"fixtures/{family}/hf"
    kept = tmp_path / "ledger.jsonl"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "FALSIFY", "-p", "no:cacheprovider",
         f"--aprt-model={model}", f"--aprt-oracle={oracle}", f"--aprt-ledger={kept}"],
        cwd=ROOT, capture_output=True, text=True, env=env, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    fresh, problems = read(kept)
    assert problems == [] and sorted(r.id for r in fresh) == sorted(IDS)
    committed = {
        r.id: r for r in read(COMMITTED)[0] if r.model is None or r.model["source"] == model
    }
    for record in fresh:
        told = committed[record.id]
        for name in ("outcome", "claim", "check", "version", "contract", "declared", "verdict"):
            assert getattr(record, name) == getattr(told, name), (record.id, name)
        assert (record.model and record.model["sha256"]) == (told.model and told.model["sha256"])
        assert record.values.keys() == told.values.keys(), record.id
        for name in record.values.keys() - OF_THE_MACHINE:
            value, before = record.values[name], told.values[name]
            assert near(value, before, name), (record.id, name, value, before)
