"""Dumps with Q and K in GGUF's order of rows are put in order, and judged as any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from faults.corpus import FAULTS
from faults.engines import ARITHMETICS
from harness import TOKENS, Changed, faulty, fixture_pair, origins_of, verdict_of, written

from pytest_aprt.capture import LayerStages
from pytest_aprt.dump import DumpRunner
from pytest_aprt.dump_checks import CheckedDump
from pytest_aprt.positions import token_axis
from pytest_aprt.row_order import RowOrder, in_hf_order

ALL = ("qkv_matmul", "q_post_rope", "k_post_rope")


@pytest.fixture(scope="module")
def pair():
    return fixture_pair("llama")


def in_gguf_order(x, head_dim):
    """(0, 1, 2, 3) of a head becomes (0, 2, 1, 3), and so on."""
    halves = np.asarray(x).reshape(len(x), -1, 2, head_dim // 2)
    return np.ascontiguousarray(halves.swapaxes(2, 3)).reshape(len(x), -1)


def permuted(pair, engine, stages=ALL):
    """An engine that leaves Q and K as llama.cpp computes them."""
    turned, d = sum(pair.oracle_facts.qkv_sizes[:2]), pair.oracle_facts.head_dim

    def change(layer, captured):
        for stage in set(stages) & set(captured):
            value = np.asarray(captured[stage])
            ours = in_gguf_order(value[:, :turned], d)
            captured[stage] = np.concatenate([ours, value[:, turned:]], axis=-1)
        return captured

    return Changed(engine, change)


def dump_of(pair, engine, folder):
    return CheckedDump(DumpRunner.open(str(written(engine, folder))), pair, "dump")


def test_the_order_of_a_head():
    gguf = torch.tensor([[0.0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15]])
    assert in_hf_order(gguf, 6).tolist() == [[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize(
    ("arithmetic", "stages"),
    [("float32", ALL), ("float32", ALL[1:]), ("q8_k", ALL), ("bfloat16", ALL[:1]), ("float32", ())],
)
def test_it_is_no_fault_and_is_named(pair, tmp_path, arithmetic, stages):
    engine = permuted(pair, faulty(pair, **ARITHMETICS[arithmetic]), stages)
    dump = dump_of(pair, engine, tmp_path)
    assert verdict_of(pair, dump).status == "QUANTISATION_NOISE"
    assert bool(dump.notes) == bool(stages)
    for note in dump.notes:
        assert f"the dump holds {', '.join(stages)} in GGUF's order of Q and K rows" in note


@pytest.mark.parametrize(
    "name", ["rope-theta-10k", "rope-neighbour-pairs", "rope-off-by-one", "values-by-modulo",
             "rope-absent-on-k", "scale-missing"]
)  # fmt: skip
@pytest.mark.parametrize("layer", [0, 2])
def test_faults_are_found_behind_it(pair, tmp_path, name, layer):
    fault = replace(next(f for f in FAULTS if f.name == name), layer=layer)
    live = verdict_of(pair, faulty(pair, fault))
    dump = dump_of(pair, permuted(pair, faulty(pair, fault)), tmp_path)
    again = verdict_of(pair, dump)
    assert origins_of(live) and again.summary == live.summary
    assert dump.notes


def test_the_first_layers_may_be_missing(pair, tmp_path):
    def late(layer, stages):
        return {} if layer in (0, 1) else stages

    for arithmetic in ("float32", "q8_k"):
        engine = permuted(pair, faulty(pair, **ARITHMETICS[arithmetic]))
        dump = dump_of(pair, Changed(engine, late), tmp_path / arithmetic)
        assert verdict_of(pair, dump).status == "QUANTISATION_NOISE"
        assert dump.notes


def test_the_last_position_alone(pair, tmp_path):
    fault = next(f for f in FAULTS if f.name == "rope-theta-10k")
    for planted in (None, fault):
        engine = permuted(pair, Changed(faulty(pair, planted), last_row))
        dump = dump_of(pair, engine, tmp_path / str(planted is None))
        verdict = verdict_of(pair, dump)
        assert origins_of(verdict) == ([f"L02-{s}" for s in ALL[1:]] if planted else [])
        assert ", ".join(ALL) in dump.notes[0]


def last_row(layer, stages):
    return {n: v if token_axis(n) is None else np.asarray(v).take([-1], token_axis(n))
            for n, v in stages.items()}  # fmt: skip


def test_of_other_weights_too(pair):
    """Where the weights behind a dump are not known, the other side's are near enough."""
    order = RowOrder(pair.oracle_facts, pair.architecture, pair.oracle_weights)
    turned = permuted(pair, faulty(pair)).layers(TOKENS)
    for (layer, changed), (_, right) in zip(turned, faulty(pair).layers(TOKENS), strict=True):
        held = {name: torch.as_tensor(value) for name, value in changed.items()}
        put = order.undone(LayerStages(layer, held), TOKENS).stages
        assert all(torch.equal(put[name], value) for name, value in right.items())
    assert order.notes


def test_other_families_are_left_alone(tmp_path):
    pair = fixture_pair("qwen2")
    dump = dump_of(pair, permuted(pair, faulty(pair), ALL[1:]), tmp_path)
    assert origins_of(verdict_of(pair, dump))[:2] == ["L00-q_post_rope", "L00-k_post_rope"]
    assert dump.notes == []
