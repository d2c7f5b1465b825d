"""Distances of weights: sums of squares, the worst block, and the sieve that spares the search."""

from __future__ import annotations

import math

import pytest
import torch
from harness import PROCESSORS

from pytest_aprt.compiled import sieve_of
from pytest_aprt.rungs import distances
from pytest_aprt.rungs.distances import BLOCK, piece_distance

WAYS = ("torch", *PROCESSORS)


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Of no processor is the sieve that leaves it to torch."""
    monkeypatch.setattr(distances, "_sieve_compiled", sieve_of(request.param))


def pair(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    oracle = torch.randn(rows, columns, generator=generator)
    return oracle + 0.05 * torch.randn(rows, columns, generator=generator), oracle


def worst_of(model: torch.Tensor, oracle: torch.Tensor) -> tuple[float, int, int]:
    """Block by block, in float64, as ``block_errors`` says."""
    a, b = (x.double().view(len(x), -1, BLOCK) for x in (model, oracle))
    norms = b.square().sum(-1)
    norms = norms.maximum(norms.mean(-1, keepdim=True))
    sizes = (a - b).square().sum(-1) / norms
    place = int(sizes.argmax())
    row, block = divmod(place, sizes.shape[1])
    return math.sqrt(float(sizes.max())), row, block * BLOCK


SHAPES = [(1, 32), (3, 96), (7, 128), (40, 896), (5, 3584), (2, 18944)]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_error_norm_and_worst_block(rows, columns, overwrite):
    model, oracle = pair(rows, columns)
    model[rows // 2, columns - 5] += 3
    expected, kept = worst_of(model, oracle), model.clone()
    error = float((model.double() - oracle.double()).square().sum())
    found = piece_distance(model, oracle, overwrite=overwrite)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.norm == pytest.approx(float(oracle.double().square().sum()), rel=1e-5)
    assert found.worst == (pytest.approx(expected[0], rel=1e-4), *expected[1:])
    assert overwrite or torch.equal(model, kept)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_block_beyond_passes_the_sieve(rows, columns):
    for seed in range(20):
        model, oracle = pair(rows, columns, seed)
        oracle[:, : columns // 2] *= 10.0 ** (seed % 5 - 2)  # blocks of very different norms
        worst, *place = worst_of(model, oracle)
        assert piece_distance(model, oracle, 0.99 * worst).worst[1:] == tuple(place)
        assert piece_distance(model, oracle, 20.0 * worst * columns).worst == (0.0, 0, 0)


NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("row", [0, 3, 6])
def test_what_is_not_finite_is_the_worst(value, row):
    """Whichever row it is in: those after it must not hide it."""
    model, oracle = pair(7, 512)
    model[row, 200] = NOT_FINITE[value]
    found = piece_distance(model, oracle, beyond=1e6)
    assert not math.isfinite(found.rel_l2)
    assert found.worst == (math.inf, row, 192)


def test_a_row_of_nothing():
    model, oracle = pair(4, 256)
    model[2], oracle[2] = 0, 0
    assert piece_distance(model, oracle, beyond=1e6).worst[1] != 2
    model[2, 70] = 1e-3  # beside nothing, anything is far
    assert piece_distance(model, oracle, beyond=1e6).worst[1:] == (2, 64)


def test_two_of_nothing():
    found = piece_distance(torch.zeros(3, 64), torch.zeros(3, 64))
    assert (found.error, found.norm, found.worst) == (0.0, 0.0, (0.0, 0, 0))


def test_what_lies_in_memory_otherwise():
    """Columns first, as of a matrix that is looked at transposed; and in float64."""
    model, oracle = pair(96, 64)
    expected = piece_distance(model.T.contiguous(), oracle.T.contiguous())
    for found in (piece_distance(model.T, oracle.T),
                  piece_distance(model.T.double(), oracle.T.contiguous().double())):  # fmt: skip
        assert found.error == pytest.approx(expected.error, rel=1e-5)
        assert found.worst == (pytest.approx(expected.worst[0], rel=1e-5), *expected.worst[1:])
