"""A difference of two tensors as a small image: tokens x channels, each pixel its largest error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 64
"""Pixels of either side at most; what is larger is pooled by the maximum."""

DECADES = 6
"""The scale is logarithmic: level 254 is the largest error, 0 is one of 10**-DECADES of it."""

NON_FINITE = 255
"""The level of a pixel that holds a NaN or an infinite value."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """Largest absolute differences, row by row.

    ``shape`` counts the tensor's rows and columns, ``pixels`` the image's; ``levels`` holds one
    byte a pixel.
    """

    rows: str
    columns: str
    shape: tuple[int, int]
    pixels: tuple[int, int]
    largest: float
    levels: bytes


class Picture(NamedTuple):
    """A difference whose columns are pooled, of a tensor or of a strip of it."""

    pooled: Tensor  # (rows, pixels)
    columns: int
    largest: float  # of what is finite


def picture_of(
    difference: Tensor, bad: Tensor | None, axes: tuple[str, ...], further: int = 0
) -> Picture | None:
    """Return the first half of an image; None where the difference has one axis or no element.

    Args:
        difference: ``|a - b|``, shaped as ``axes``, finite.
        bad: which elements are not finite on a side: bool, of the same shape; None where all are.
        axes: names; heads are laid beside each other, or over each other for scores.
        further: columns on the right that were left out, as they are zero.
    """
    from torch import inf
    from torch.nn.functional import pad

    if difference.ndim < 2 or not difference.numel():
        return None
    largest = float(difference.max())
    marked = difference if bad is None else difference.masked_fill(bad, inf)
    if axes[0] == "head":
        marked = marked.amax(0)
    flat = marked.reshape(marked.shape[0], -1)
    flat = pad(flat, (0, further)) if further else flat
    columns = flat.shape[1]
    return Picture(_pooled(flat, min(columns, LARGEST)), columns, largest)


def _pooled(rows: Tensor, pixels: int) -> Tensor:
    """Return the largest value behind each pixel, float32: (rows, pixels)."""
    from torch.nn.functional import adaptive_max_pool1d

    if rows.shape[1] % pixels:
        return adaptive_max_pool1d(rows.float(), pixels)
    return rows.view(len(rows), pixels, -1).amax(2).float()  # of 18,944 in a sixth of the time


def image_of(parts: Sequence[Picture | None], axes: tuple[str, ...]) -> Image | None:
    """Return the image of a difference from its strips; None where it is zero everywhere.

    Args:
        parts: what ``picture_of`` gives for each strip, in order.
        axes: names, as there.
    """
    import torch

    found = [part for part in parts if part is not None]
    if not found:
        return None
    flat = torch.cat([part.pooled for part in found])
    largest = max(part.largest for part in found)
    shape = (flat.shape[0], found[0].columns)
    pixels = (min(shape[0], LARGEST), flat.shape[1])
    pooled = _pooled(flat.T.contiguous(), pixels[0]).T
    if not float(pooled.max()) > 0:
        return None
    scale = math.log10(largest) if largest > 0 else 0.0
    levels = ((pooled.log10() - scale + DECADES) / DECADES * 254).clamp(0, 254).round()
    levels = levels.masked_fill(pooled.isinf(), NON_FINITE).nan_to_num(0)
    return Image(
        rows=next(axis for axis in axes if axis != "head"),
        columns=axes[-1],
        shape=shape,
        pixels=pixels,
        largest=largest,
        levels=bytes(levels.flatten().int().tolist()),
    )
