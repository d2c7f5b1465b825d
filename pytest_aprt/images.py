"""A difference of two tensors as a small image: tokens x channels, each pixel its largest error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def image_of(difference: Tensor, bad: Tensor | None, axes: tuple[str, ...]) -> Image | None:
    """Return the image of a difference; None where it has one axis, or is zero everywhere.

    Args:
        difference: ``|a - b|``, shaped as ``axes``, finite.
        bad: which elements are not finite on a side: bool, of the same shape; None where all are.
        axes: names; heads are laid beside each other, or over each other for scores.
    """
    from torch import inf
    from torch.nn.functional import adaptive_max_pool2d

    if difference.ndim < 2 or not difference.numel():
        return None
    largest = float(difference.max())
    marked = difference if bad is None else difference.masked_fill(bad, inf)
    if axes[0] == "head":
        marked, axes = marked.amax(0), axes[1:]
    flat = marked.reshape(marked.shape[0], -1)
    shape = (flat.shape[0], flat.shape[1])
    pixels = (min(shape[0], LARGEST), min(shape[1], LARGEST))
    pooled = adaptive_max_pool2d(flat[None].float(), pixels)[0]
    if not float(pooled.max()) > 0:
        return None
    scale = math.log10(largest) if largest > 0 else 0.0
    levels = ((pooled.log10() - scale + DECADES) / DECADES * 254).clamp(0, 254).round()
    levels = levels.masked_fill(pooled.isinf(), NON_FINITE).nan_to_num(0)
    return Image(
        rows=axes[0],
        columns=axes[-1],
        shape=shape,
        pixels=pixels,
        largest=largest,
        levels=bytes(levels.flatten().int().tolist()),
    )
