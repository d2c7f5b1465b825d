"""How far a tensor of the model lies from the oracle's: as a whole, and in its worst block."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

BLOCK = 32
"""Values of a row that are judged together: the smallest block of llama.cpp's types with one."""


def squares(model: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Return ``|model - oracle|^2`` and ``|oracle|^2``, summed in float64 a few rows at a time."""
    error = norm = 0.0
    for a, b in zip(_pieces(model), _pieces(oracle), strict=True):
        b = b.double()
        error += float((a.double() - b).square().sum())
        norm += float(b.square().sum())
    return error, norm


def ratio(error: float, norm: float) -> float:
    """Return the relative L2 distance of two sums of squares."""
    if norm:
        return math.sqrt(error / norm)
    return math.inf if error else 0.0


def distance(model: Tensor, oracle: Tensor) -> float:
    """Return ``|model - oracle| / |oracle|``."""
    return ratio(*squares(model, oracle))


def block_errors(model: Tensor, oracle: Tensor) -> Tensor:
    """Return the distance of every block of a matrix, (rows, blocks); none where none fits.

    It is relative to the block's own norm, or to the root mean square norm of its row's blocks
    where that is larger: what is nearly zero has no relative error worth the name.
    """
    if oracle.dim() != 2 or oracle.shape[1] % BLOCK:
        return oracle.new_zeros(len(oracle), 0)
    own = oracle.unflatten(1, (-1, BLOCK)).square().sum(-1)
    error = (model - oracle).unflatten(1, (-1, BLOCK)).square().sum(-1)
    scale = own.maximum(own.mean(-1, keepdim=True)).clamp(min=1e-30)
    found: Tensor = (error / scale).nan_to_num(math.inf, math.inf).sqrt()
    return found


def worst_block(model: Tensor, oracle: Tensor) -> tuple[float, int, int]:
    """Return the distance of the worst block of a matrix, its row and its first column."""
    worst, row, column, start = 0.0, 0, 0, 0
    for a, b in zip(_pieces(model), _pieces(oracle), strict=True):
        errors = block_errors(a, b)
        if errors.numel() and float(errors.max()) > worst:
            place = int(errors.argmax())
            worst = float(errors.view(-1)[place])
            row, block = divmod(place, errors.shape[1])
            row, column = row + start, block * BLOCK
        start += len(b)
    return worst, row, column


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, (1 << 20) // max(1, tensor[0].numel())))
