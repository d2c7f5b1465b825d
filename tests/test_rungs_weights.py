"""The weights rung: every fault planted in a tensor is named; healthy tensors of all types pass."""

from __future__ import annotations

import pytest
import torch
from faults.files import rewritten
from faults.ladder import WEIGHT_FAULTS
from harness import FIXTURES, fixture_pair

from pytest_aprt.quants import QUANT_TYPES
from pytest_aprt.rungs.distances import distance, worst_block
from pytest_aprt.rungs.weights import layer_rows, model_rows


def weight_rows(pair):
    rows = [row for layer in range(pair.graph.n_layers) for row in layer_rows(pair, layer)]
    return rows + model_rows(pair)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_clean_pair_is_silent(family):
    rows = weight_rows(fixture_pair(family))
    assert [row.reason for row in rows] == [""] * len(rows)


@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_at_its_tensor_and_at_no_other(fault, tmp_path):
    source = FIXTURES / f"tiny-{fault.family}" / "q4_k_m.gguf"
    with fixture_pair(fault.family).model.file as file:
        path = rewritten(source, tmp_path / "faulty.gguf", tensors=fault.tensors(file))
    rows = {row.name: row for row in weight_rows(fixture_pair(fault.family, path))}
    assert {name for name, row in rows.items() if row.broken} == fault.found
    for name in fault.found:
        assert fault.says in rows[name].reason or len(fault.found) > 1
    assert any(fault.says in rows[name].reason for name in fault.found)


def test_block_bounds_lie_above_tensor_bounds():
    for kind in QUANT_TYPES.values():
        assert kind.block_bound > kind.bound > 0


def test_the_worst_block_is_found_and_small_blocks_do_not_alarm():
    oracle = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    model = oracle.clone()
    assert worst_block(model, oracle) == (0.0, 0, 0)
    model[31, 96:128] *= 1.5
    size, row, column = worst_block(model, oracle)
    assert (row, column) == (31, 96)
    assert 0.3 < size <= 0.5 + 1e-6  # sums of 32 squares are in float32
    oracle[4, :32] *= 1e-6
    model = oracle.clone()
    model[4, :32] *= 3
    assert worst_block(model, oracle)[0] < 1e-5
    assert worst_block(oracle[:, :40], oracle[:, :40]) == (0.0, 0, 0)


def test_distances_of_nothing():
    zeros = torch.zeros(4, 32)
    assert distance(zeros, zeros) == 0.0
    assert distance(zeros + 1, zeros) == float("inf")
