"""Compares two captures of one point: metrics, and whether an error is more than rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pytest_aprt.arithmetic import FLOAT32_ULP, Tolerance
from pytest_aprt.facts import Facts
from pytest_aprt.images import Image, image_of
from pytest_aprt.replay import Reference
from pytest_aprt.stages import Stage

TOP_DIFFS = 5

QUIET = 0.25
"""Excess up to which an error is not looked at more closely."""

_SMALLEST_NORMAL = 1.2e-38
"""Below it float32 loses bits and some engines flush to zero: such differences are no error."""


class Difference(NamedTuple):
    """One element that differs: where, and the two values."""

    at: dict[str, int]
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How far ``a`` is from ``b``, over the elements that count and are finite on both sides.

    Undefined values are nan: cosine, slope and ratios where a norm is zero. ``compared`` is the
    number of elements; where it is 0 everything is nan.
    """

    cosine: float  # <a,b> / (|a| |b|)
    rel_l2: float  # |a-b| / |b|
    slope: float  # <a,b> / <b,b>: 1 unless a is b scaled
    norm_ratio: float  # |a| / |b|
    max_abs: float
    max_abs_at: dict[str, int]
    rms: float  # sqrt(mean((a-b)^2))
    sqnr_db: float  # 20 log10(|b| / |a-b|)
    non_finite_a: int
    non_finite_b: int
    worst_token: tuple[int, float] | None  # token, rel_l2
    compared: int
    top_diffs: tuple[Difference, ...]
    image: Image | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The slice of a point whose error is largest in units of its tolerance.

    ``axis`` is ``all`` for the whole tensor. ``error`` is ``|a-b| / scale`` and ``excess`` is
    ``error / tolerance``: above 1 it is no rounding. ``rel_l2`` is relative to the slice itself.
    """

    axis: str
    index: int | None
    rel_l2: float
    tolerance: float  # in the unit of rel_l2
    excess: float


@dataclass(frozen=True)
class View:
    """How a stage's tensor is looked at: with heads as an axis, and only where it counts.

    ``visible`` (T, T) bool says which keys each query may see; only those scores count. ``first``
    is the position of the first token that the tensor holds.
    """

    stage: Stage
    facts: Facts
    visible: Tensor | None = None
    first: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor in float64, shaped as the stage's axes."""
        tensor = tensor.double()
        if "head" in self.stage.axes and self.stage.axes[-1] == "channel":
            return tensor.reshape(tensor.shape[0], -1, self.facts.head_dim)
        return tensor

    def counted(self, shape: Sequence[int]) -> Tensor | None:
        """Return which elements of a view count at all: bool, of ``shape``; None where all do."""
        if self.stage.kind == "scores" and self.visible is not None:
            return self.visible[self.first :].expand(*shape)
        return None

    def place(self, axis: str | None, index: int) -> int:
        """Return an index along an axis as the whole prompt counts it."""
        return index + self.first if axis == "token" else index

    def parts(self) -> list[tuple[str, slice]]:
        """Return the channels of Q, K and V where the stage concatenates them."""
        if "part" not in self.stage.slices:
            return []
        ends, start = [], 0
        for name, size in zip("qkv", self.facts.qkv_sizes, strict=True):
            ends.append((name, slice(start, start + size)))
            start += size
        return ends


def non_finite(tensor: Tensor, view: View) -> int:
    """Return how many of the elements that count are NaN or infinite."""
    values = view(tensor)
    counted = view.counted(values.shape)
    if counted is not None:
        values = values.where(counted, 0.0)
    return 0 if _is_finite(values) else int((~torch.isfinite(values)).sum())


def measure(a: Tensor, b: Tensor, view: View, top: int = 1, *, pictured: bool = False) -> Metrics:
    """Return the metrics of two tensors of one stage; rows with non-finite values are left out.

    Args:
        a: the tensor that is judged.
        b: what it is compared with, of the same shape.
        view: how to look at both.
        top: how many of the largest differences to keep; the first gives ``max_abs``.
        pictured: whether to keep the difference as a small image too.
    """
    used, bad, x, y = _usable(view, view(a), view(b))
    bad_x, bad_y = bad or (None, None)
    d = (x - y).abs()
    xx, yy, xy, dd = (
        float(v.reshape(-1).dot(w.reshape(-1))) for v, w in ((x, x), (y, y), (x, y), (d, d))
    )
    compared = x.numel() if used is None else int(used.sum())
    largest = _top(x, y, d, view, top) if compared else ()
    nan = math.nan
    return Metrics(
        cosine=xy / math.sqrt(xx * yy) if xx and yy else nan,
        rel_l2=_ratio(math.sqrt(dd), math.sqrt(yy)) if compared else nan,
        slope=xy / yy if yy else nan,
        norm_ratio=math.sqrt(xx / yy) if yy else nan,
        max_abs=abs(largest[0].a - largest[0].b) if largest else nan,
        max_abs_at=largest[0].at if largest else {},
        rms=math.sqrt(dd / compared) if compared else nan,
        sqnr_db=10 * math.log10(yy / dd)
        if dd and yy
        else (math.inf if compared and not dd else nan),
        non_finite_a=0 if bad_x is None else int(bad_x.sum()),
        non_finite_b=0 if bad_y is None else int(bad_y.sum()),
        worst_token=_worst_token(d, y, view) if compared else None,
        compared=compared,
        top_diffs=largest,
        image=image_of(d, None if bad is None else bad[0] | bad[1], view.stage.axes)
        if pictured
        else None,
    )


def judge(model: Tensor, reference: Reference, view: View, tolerance: Tolerance) -> Slice | None:
    """Return the slice whose error is largest in units of what rounding explains.

    A slice's scale is its norm, or its response to one-ulp changes of the inputs in ulps where
    that is larger: a value that is the small difference of large terms may be off by the rounding
    of the terms. It is asked for where the norms alone leave more than QUIET. None where nothing
    can be compared.

    Args:
        model: the model's stage.
        reference: its replay.
        view: how to look at both.
        tolerance: bound on ``|model - reference| / scale`` of every slice; an element's doubt
            is taken off its error first.
    """
    worst = _judged(model, reference, view, tolerance, None)
    if worst is None or worst.excess <= QUIET:
        return worst
    return _judged(model, reference, view, tolerance, reference.response / FLOAT32_ULP)


def _judged(
    model: Tensor, reference: Reference, view: View, tolerance: Tolerance, response: Tensor | None
) -> Slice | None:
    sides = (model, reference.value) if response is None else (model, reference.value, response)
    used, _, x, y, *others = _usable(view, *map(view, sides))
    if used is not None and not bool(used.any()):
        return None
    error = x - y
    if reference.doubt is not None:
        error = (error.abs() - view(reference.doubt)).clamp(min=0.0)
        error = error if used is None else error.where(used, 0.0)
    squared, value, *responses = (_sums(v.square(), view) for v in (error, y, *others))
    elements = _elements(view, x.shape) if used is None else _sums(used.double(), view)
    bound = tolerance.base * (1 + tolerance.spread / elements.clamp(min=1.0).sqrt())
    floor = elements * (_SMALLEST_NORMAL / bound) ** 2
    scale = torch.stack([value, floor, *responses]).amax(0).sqrt()
    excess = (squared.sqrt() / (bound * scale)).where(squared > 0, 0.0)
    worst = int(excess.argmax())
    axis, index = _slice_at(worst, view, x.shape)
    norm = float(value[worst].sqrt())
    return Slice(
        axis=axis,
        index=None if axis == "all" else view.place(axis, index),
        rel_l2=_ratio(float(squared[worst].sqrt()), norm),
        tolerance=_ratio(float(bound[worst] * scale[worst]), norm),
        excess=float(excess[worst]),
    )


def _slice_at(place: int, view: View, shape: Sequence[int]) -> tuple[str, int]:
    """Return axis and index of a slice in the order of ``_sums``."""
    counts = {"part": len(view.parts()), **dict(zip(view.stage.axes, shape, strict=True))}
    for axis in view.stage.slices:
        if 0 < place <= counts[axis]:
            return axis, place - 1
        place -= counts[axis]
    return "all", 0


def _sums(values: Tensor, view: View) -> Tensor:
    """Return the sum of every slice of a view: the whole, then every index of every axis."""
    found = []
    for axis in view.stage.slices:
        if axis == "part":
            found.append(torch.stack([values[:, part].sum() for _, part in view.parts()]))
            continue
        others = [i for i, name in enumerate(view.stage.axes) if name != axis]
        found.append(values.sum(dim=others) if others else values)
    return torch.cat([found[0].sum()[None] if found else values.sum()[None], *found])


def _elements(view: View, shape: Sequence[int]) -> Tensor:
    """Return how many elements every slice has, in the order of ``_sums``."""
    whole, sizes = math.prod(shape), dict(zip(view.stage.axes, shape, strict=True))
    counts = [whole]
    for axis in view.stage.slices:
        if axis == "part":
            counts += [shape[0] * (part.stop - part.start) for _, part in view.parts()]
        else:
            counts += [whole // max(sizes[axis], 1)] * sizes[axis]
    return torch.tensor(counts, dtype=torch.float64)


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return math.inf if a else 0.0


def _is_finite(values: Tensor) -> bool:
    return math.isfinite(float(values.sum()))  # a NaN stays one, and Inf - Inf becomes one


def _usable(view: View, *sides: Tensor) -> tuple[Any, ...]:
    """Return which elements can be compared, which are not finite, and the sides.

    The first is None where all elements can be, the second None where all are finite, else of
    every side. Where nothing can be compared the sides are set to zero: elements that do not
    count, and rows with non-finite values.
    """
    counted = view.counted(sides[0].shape)
    if counted is not None:
        sides = tuple(side.where(counted, 0.0) for side in sides)
    if all(_is_finite(side) for side in sides):
        return counted, None, *sides
    bad = [~torch.isfinite(side) for side in sides]
    used = ~_rows_with(torch.stack(bad).any(0))
    if counted is not None:
        used = used & counted
    return used, bad, *(side.where(used, 0.0) for side in sides)


def _rows_with(bad: Tensor) -> Tensor:
    """Spread bad elements over their rows: a token's channels, a head's scores of one token."""
    if bad.ndim == 1:
        return bad.any().expand_as(bad)
    return bad.any(-1, keepdim=True).expand_as(bad)


def _worst_token(d: Tensor, y: Tensor, view: View) -> tuple[int, float] | None:
    if "token" not in view.stage.axes:
        return None
    others = [i for i, name in enumerate(view.stage.axes) if name != "token"]
    error, norm = (torch.linalg.vector_norm(v, dim=others) for v in (d, y))
    ratio = torch.where(norm > 0, error / norm, torch.where(error > 0, torch.inf, 0.0))
    index = int(ratio.argmax())
    return view.place("token", index), float(ratio[index])


def _top(x: Tensor, y: Tensor, d: Tensor, view: View, count: int) -> tuple[Difference, ...]:
    flat = d.flatten().topk(min(count, d.numel())).indices
    a, b = x.flatten()[flat].tolist(), y.flatten()[flat].tolist()
    places = zip(*np.unravel_index(flat.numpy(), d.shape), strict=True)
    return tuple(
        Difference(
            at={
                name: view.place(name, int(index))
                for name, index in zip(view.stage.axes, place, strict=True)
            },
            a=a[i],
            b=b[i],
        )
        for i, place in enumerate(places)
    )
