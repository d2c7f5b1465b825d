"""Runs of transformers as engine, for the tests on the CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path

import int8  # enters its quantiser  # noqa: F401
import numpy as np
from harness import FIXTURES, THRESHOLDS, TOKENS

from pytest_aprt.measure import measure_pair
from pytest_aprt.pair import open_headers
from pytest_aprt.readings import Prompt
from pytest_aprt.run import profile_of, set_up
from pytest_aprt.rungs.config import fact_rows
from pytest_aprt.settings import read_settings
from pytest_aprt.sides import open_sides
from pytest_aprt.totals import run_totals
from pytest_aprt.verdict import conclude

FAMILIES = ("qwen2", "llama", "qwen3")
UNSEEN = {"eager": set(), "sdpa": {"attn_scores", "attn_softmax"}}
"""What an attention does not compute apart."""


def tokens_of(length, vocab=1024):
    return tuple(int(t) for t in np.random.default_rng(length).integers(5, vocab, length))


IDS = ",".join(map(str, TOKENS))
PROMPTS = tuple(tokens_of(length) for length in (1, 7, 100))


def folder_of(family):
    return FIXTURES / f"tiny-{family}" / "hf"


def fused(family):
    """Stages that are not computed apart: products to which a bias is added at once."""
    return {"qkv_matmul"} if family == "qwen2" else set()


class Live:
    """A model under test in transformers, set up as a run sets it up."""

    def __init__(self, model, oracle=None, device="cpu", **options):
        given = {
            "aprt_model": str(model),
            "aprt_oracle": str(oracle or model),
            "aprt_engine": "transformers",
            "aprt_engine_option": [f"{name}={value}" for name, value in options.items()],
            "aprt_device": device,
            "aprt_tokens": ["1,2"],
        }
        settings = read_settings(given.get, command="")
        headers = open_headers(settings.weights, settings.oracle)
        self.pair, _, chosen = set_up(headers, settings, None)
        self.engine = chosen.engine
        self.raw = chosen.engine.raw

    def measured(self, *prompts):
        asked = [Prompt(text="", tokens=tokens) for tokens in prompts or PROMPTS]
        profile = profile_of("auto", self.engine)
        return measure_pair(self.pair, self.engine, asked, self.pair.graph.points, profile)

    def verdict(self, result):
        facts = fact_rows(self.pair, max(len(f.prompt.tokens) for f in result.finals))
        return conclude(self.pair.graph, self.pair.graph.points, result, facts, THRESHOLDS)


def missing_in(result):
    return {e.point.stage for e in result.errors if e.missing}


def worst_of(result):
    return max((e for e in result.errors if e.worst), key=lambda e: e.worst.excess)


def copy_of(folder: Path, to: Path, change) -> Path:
    """Copy a Hugging Face folder with its tensors changed: ``change(tensors)``."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def quantised(family, device="cpu"):
    given = '{"quant_method": "aprt_int8"}'
    return Live(folder_of(family), device=device, quantization_config=given)


def report_of(model, oracle, ours=None, theirs=None, **given):
    """Run two sides; ``ours`` and ``theirs`` make engines of one's own of the opened sides."""
    options = {f"aprt_{name}": value for name, value in given.items()}
    asked = {"aprt_model": model, "aprt_oracle": oracle, "aprt_tokens": [IDS], **options}
    settings = read_settings(asked.get, command="")
    assert settings.oracle_is_engine and not settings.has_shadow
    sides = open_sides(settings)
    own = [None if make is None else make(sides) for make in (ours, theirs)]
    return run_totals(sides, settings, own[0], lambda what, done, total: None, user_oracle=own[1])
