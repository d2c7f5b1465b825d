"""Masks and rotary tables that a model's own files say: those that transformers prepares.

They are made by the builtin engine's code and judge that engine where the oracle is an engine too,
so a mistake in them would be on both sides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import CONFIGURATIONS

from pytest_aprt.checkpoints import HfCheckpoint
from pytest_aprt.errors import ArchitectureError
from pytest_aprt.facts import RopeScaling
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.preludes import prelude_of
from pytest_aprt.testing import write_random_pair

TOKENS = tuple(range(1, 25))  # beyond every window and every stretched context


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_they_are_those_of_transformers(tmp_path, name):
    gguf, hf = write_random_pair(tmp_path, CONFIGURATIONS[name]())
    pair = open_pair(open_headers(str(gguf), str(hf)))
    theirs = TransformersRunner(pair.config, pair.oracle_weights).prelude(TOKENS)
    for facts in (pair.model.facts, HfCheckpoint(pair.oracle, pair.architecture).facts):
        ours = prelude_of(facts, pair.architecture, TOKENS)
        for a, b in zip(ours.calls, theirs.calls, strict=True):
            assert torch.equal(a["attention_mask"] == 0, visible(b["attention_mask"]))
            for table, expected in zip(
                a["position_embeddings"], b["position_embeddings"], strict=True
            ):
                assert table.shape == expected.shape
                # transformers' angles are float32: at most 2.0e-6 off at 24 positions
                torch.testing.assert_close(table, expected, rtol=0, atol=5e-6)


def visible(mask):
    if mask is None:
        return torch.ones(1, 1, len(TOKENS), len(TOKENS), dtype=torch.bool).tril()
    return mask if mask.dtype == torch.bool else mask == 0


def test_a_scaling_that_is_not_known_is_refused(tmp_path):
    gguf, hf = write_random_pair(tmp_path, CONFIGURATIONS["qwen2-gqa2"]())
    pair = open_pair(open_headers(str(gguf), str(hf)))
    facts = replace(pair.model.facts, rope_scaling=RopeScaling(kind="longrope"))
    with pytest.raises(ArchitectureError, match="'longrope' is not known without the oracle's own"):
        prelude_of(facts, pair.architecture, TOKENS)
