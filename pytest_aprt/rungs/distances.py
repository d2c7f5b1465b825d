"""How far a tensor of the model lies from the oracle's: as a whole, and in its worst block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_aprt.buffers import buffer
from pytest_aprt.compiled import sieve_of
from pytest_aprt.matrices import PIECE
from pytest_aprt.scripted import scripted

BLOCK = 32
"""Values of a row that are judged together: the smallest block of llama.cpp's types with one."""

_RUNS = (256, 128, 64, BLOCK)


@dataclass(frozen=True)
class Distance:
    """How far some rows lie from the oracle's: squared error and squared norm, and the worst block.

    ``worst`` is the distance of the worst block, with its row and first column; (0, 0, 0) where
    the columns make no whole blocks, or no block is farther than was asked for.
    """

    error: float
    norm: float
    worst: tuple[float, int, int]

    @property
    def rel_l2(self) -> float:
        """``|model - oracle| / |oracle|``."""
        return ratio(self.error, self.norm)


def distance_of(model: Tensor, oracle: Tensor) -> Distance:
    """Measure a tensor that is at hand, a few rows at a time."""
    pieces = zip(_pieces(model), _pieces(oracle), strict=True)
    start, found = 0, []
    for a, b in pieces:
        found.append(moved(piece_distance(a, b), start))
        start += len(a)
    return summed(found)


def piece_distance(
    model: Tensor, oracle: Tensor, beyond: float = 0.0, *, overwrite: bool = False
) -> Distance:
    """Measure a piece that fits in cache; runs and rows in float32, their sums in float64.

    Args:
        model: the tensor that is judged.
        oracle: what it is compared with.
        beyond: blocks up to this distance need not be told apart.
        overwrite: whether ``model`` may be overwritten, which spares memory and time.
    """
    if oracle.dim() != 2 or oracle.shape[1] % BLOCK:
        b = oracle.double()
        error = float((model.double() - b).square().sum())
        return Distance(error, float(b.square().sum()), (0.0, 0, 0))
    difference = model if overwrite else buffer("difference", oracle.shape)
    run = next(size for size in _RUNS if oracle.shape[1] % size == 0)
    error, norm, farthest = _sieve(model, oracle, run, difference, beyond)
    worst = (0.0, 0, 0)
    if not farthest <= beyond:  # nor where a row is nothing on both sides
        sizes = _relative(_block_sums(difference, "errors"), _block_norms(oracle))
        row = int(sizes.amax(1).argmax())  # a NaN is the largest; far faster than argmax of all
        size, block = sizes[row].max(0)
        if size != 0:
            far = math.sqrt(float(size.nan_to_num(math.inf, math.inf)))
            worst = far, row, int(block) * BLOCK
    return Distance(error, norm, worst)


_sieve_compiled = sieve_of()


def _sieve(
    model: Tensor, oracle: Tensor, run: int, difference: Tensor, beyond: float
) -> tuple[float, float, float]:
    """Return squared error, squared norm, and how far any block may lie.

    Where that is beyond, ``difference`` is filled. A block is no farther than the run of blocks
    around it, and its norm is taken as its row's mean or larger: a sieve that lets no farther one
    pass.
    """
    found = _sieve_compiled(model, oracle, run)
    if found is None:
        return _sieve_by_torch(model, oracle, run, difference)
    error, norm, farthest = found
    farthest = math.sqrt(farthest * (oracle.shape[1] // BLOCK))
    if not farthest <= beyond:
        torch.sub(model, oracle, out=difference)
    return error, norm, farthest


@scripted
def _sieve_by_torch(
    model: Tensor, oracle: Tensor, run: int, difference: Tensor, block: int = BLOCK
) -> tuple[float, float, float]:
    rows, columns = oracle.shape
    torch.sub(model, oracle, out=difference)
    errors = torch.linalg.vector_norm(difference.view(rows, -1, run), dim=[2])
    norms = torch.linalg.vector_norm(oracle, dim=[1])
    error = torch.linalg.vector_norm(errors, dtype=torch.float64)
    norm = torch.linalg.vector_norm(norms, dtype=torch.float64)
    farthest = (errors.amax([1]) / norms).max() * (columns / block) ** 0.5
    return float(error.square()), float(norm.square()), float(farthest)


def moved(distance: Distance, rows: int) -> Distance:
    """Return the distance of a piece that begins at row ``rows`` of its matrix."""
    size, row, column = distance.worst
    return replace(distance, worst=(size, row + rows, column) if size else distance.worst)


def summed(parts: Iterable[Distance]) -> Distance:
    """Return the distance of all rows, given that of each piece."""
    total = Distance(0.0, 0.0, (0.0, 0, 0))
    for part in parts:
        total = Distance(total.error + part.error, total.norm + part.norm,
                         max(total.worst, part.worst, key=lambda worst: worst[0]))  # fmt: skip
    return total


def ratio(error: float, norm: float) -> float:
    """Return the relative L2 distance of two sums of squares."""
    if norm:
        return math.sqrt(error / norm)
    return math.inf if error else 0.0


def distance(model: Tensor, oracle: Tensor) -> float:
    """Return ``|model - oracle| / |oracle|``."""
    return distance_of(model, oracle).rel_l2


def block_errors(model: Tensor, oracle: Tensor) -> Tensor:
    """Return the distance of every block of a matrix, (rows, blocks); none where none fits.

    It is relative to the block's own norm, or to the root mean square norm of its row's blocks
    where that is larger: what is nearly zero has no relative error worth the name.
    """
    if oracle.dim() != 2 or oracle.shape[1] % BLOCK:
        return oracle.new_zeros(len(oracle), 0)
    errors = _block_sums(model - oracle, "errors")
    sizes = _relative(errors, _block_norms(oracle))
    return sizes.nan_to_num(math.inf, math.inf).sqrt()


def worst_block(model: Tensor, oracle: Tensor) -> tuple[float, int, int]:
    """Return the distance of the worst block of a matrix, its row and its first column."""
    return distance_of(model, oracle).worst


def _block_norms(oracle: Tensor) -> Tensor:
    """Return the squared norm of every block: (rows, blocks)."""
    return _block_sums(buffer("square", oracle.shape).copy_(oracle), "norms")


def _block_sums(values: Tensor, name: str) -> Tensor:
    """Square ``values`` in place and sum every block, in the buffer ``name``: (rows, blocks)."""
    blocks = values.mul_(values).view(-1, BLOCK)
    # A product with ones sums short runs faster than sum does.
    sums = torch.mv(blocks, values.new_ones(BLOCK), out=buffer(name, blocks.shape[:1]))
    return sums.view(len(values), -1)


def _relative(errors: Tensor, norms: Tensor) -> Tensor:
    """Return the squared distance of every block."""
    return errors / norms.maximum(norms.mean(-1, keepdim=True)).clamp(min=1e-30)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, PIECE // max(1, tensor[0].numel())))
