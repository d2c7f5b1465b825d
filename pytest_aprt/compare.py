"""Compares two captures of one point: metrics, and whether an error is more than rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pytest_aprt.arithmetic import FLOAT32_ULP, Tolerance
from pytest_aprt.images import Image, Picture, image_of, picture_of
from pytest_aprt.replay import Reference
from pytest_aprt.strips import mapped
from pytest_aprt.views import Strip, View, by_strips

TOP_DIFFS = 5

QUIET = 0.25
"""Excess up to which an error is not looked at more closely."""

_RUN, _MANY = 128, 256  # values of a run, and runs from which on their maxima are looked at first

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


def non_finite(tensor: Tensor, view: View) -> int:
    """Return how many of the elements that count are NaN or infinite."""

    def counted_in(strip: Strip, values: Tensor) -> int:
        _, bad, _ = strip.usable(values)
        return 0 if bad is None else int(bad[0].sum())

    return sum(by_strips(counted_in, view, tensor))


def measure(a: Tensor, b: Tensor, view: View, top: int = 1, *, pictured: bool = False) -> Metrics:
    """Return the metrics of two tensors of one stage; rows with non-finite values are left out.

    Args:
        a: the tensor that is judged.
        b: what it is compared with, of the same shape.
        view: how to look at both.
        top: how many of the largest differences to keep; the first gives ``max_abs``.
        pictured: whether to keep the difference as a small image too.
    """
    (found,) = measure_each([Comparison(a, b, top, pictured)], view)
    return found


class Comparison(NamedTuple):
    """What ``measure`` is asked for, of one stage."""

    a: Tensor
    b: Tensor
    top: int = 1
    pictured: bool = False


def measure_each(comparisons: Sequence[Comparison], view: View) -> list[Metrics]:
    """Return the metrics of every comparison."""
    parts = by_strips(_sums_of(comparisons), view, *_sides_of(comparisons))
    return _metrics_of(comparisons, parts, view)


def judge_and_measure(
    model: Tensor,
    reference: Reference,
    view: View,
    tolerance: Tolerance,
    comparisons: Sequence[Comparison],
) -> tuple[Slice | None, list[Metrics]]:
    """Do what ``judge`` and ``measure_each`` do, and read each strip once."""
    judged = _judged_by(model, reference, reference.value)
    sums_of, count = _sums_of(comparisons), len(judged)

    def both(strip: Strip, *sides: Tensor) -> tuple[_Judged, list[_Sums]]:
        return _squares(strip, *sides[:count]), sums_of(strip, *sides[count:])

    parts = by_strips(both, view, *judged, *_sides_of(comparisons))
    worst = _worst_of([squares for squares, _ in parts], view, tolerance)
    if worst is not None and worst.excess > QUIET:
        response = mapped(lambda r: r / FLOAT32_ULP, reference.response)
        parts_again = by_strips(_squares, view, *_judged_by(model, reference, response))
        worst = _worst_of(parts_again, view, tolerance)
    return worst, _metrics_of(comparisons, [sums for _, sums in parts], view)


def _sides_of(comparisons: Sequence[Comparison]) -> list[Tensor]:
    return [side for asked in comparisons for side in (asked.a, asked.b)]


def _sums_of(comparisons: Sequence[Comparison]) -> Callable[..., list[_Sums]]:
    def sums_of(strip: Strip, *sides: Tensor) -> list[_Sums]:
        pairs = zip(sides[::2], sides[1::2], comparisons, strict=True)
        return [_sums(a, b, strip, asked.top, asked.pictured) for a, b, asked in pairs]

    return sums_of


def _metrics_of(
    comparisons: Sequence[Comparison], parts: Sequence[Sequence[_Sums]], view: View
) -> list[Metrics]:
    columns = zip(*parts, strict=True)
    return [_metrics(part, view, c.top) for part, c in zip(columns, comparisons, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What metrics are made of, of a tensor or a strip."""

    products: tuple[float, float, float, float]  # <a,a>, <b,b>, <a,b>, <a-b,a-b>
    compared: int
    non_finite: tuple[int, int]
    largest: tuple[Difference, ...]
    tokens: Tensor | None  # (2, T): norm of the error and of b
    picture: Picture | None


def _sums(a: Tensor, b: Tensor, strip: Strip, top: int, pictured: bool) -> _Sums:
    view = strip.view
    used, bad, x, y = strip.usable(a, b)
    d = strip.once(_difference, x, y)
    xx, yy, dd = (strip.square_sum(v) for v in (x, y, d))
    xy = float(x.reshape(-1).dot(y.reshape(-1)))
    compared = round((x.numel() if used is None else int(used.sum())) * view.share(x.shape))
    either = None if bad is None else bad[0] | bad[1]
    norms = [s["token"] for s in map(strip.square_sums, (d, y)) if "token" in s]
    return _Sums(
        products=(xx, yy, xy, dd),
        compared=compared,
        non_finite=(0, 0) if bad is None else (int(bad[0].sum()), int(bad[1].sum())),
        largest=_top(x, y, d, view, top) if compared else (),
        tokens=torch.stack(norms).sqrt() if norms else None,
        picture=picture_of(d, either, view.stage.axes, view.unseen) if pictured else None,
    )


def _metrics(parts: Sequence[_Sums], view: View, top: int) -> Metrics:
    xx, yy, xy, dd = (sum(column) for column in zip(*(p.products for p in parts), strict=True))
    compared = sum(part.compared for part in parts)
    bad_a, bad_b = (sum(column) for column in zip(*(p.non_finite for p in parts), strict=True))
    found = [difference for part in parts for difference in part.largest]
    largest = tuple(sorted(found, key=lambda d: -abs(d.a - d.b))[:top])
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
        non_finite_a=bad_a,
        non_finite_b=bad_b,
        worst_token=_worst_token([p.tokens for p in parts], view) if compared else None,
        compared=compared,
        top_diffs=largest,
        image=image_of([part.picture for part in parts], view.stage.axes),
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
    worst, _ = judge_and_measure(model, reference, view, tolerance, ())
    return worst


def _judged_by(model: Tensor, reference: Reference, response: Tensor) -> tuple[Tensor, ...]:
    doubts = () if reference.doubt is None else (reference.doubt,)
    return model, reference.value, response, *doubts


_Judged = tuple[bool, "dict[str, _Squares]"]


def _worst_of(parts: Sequence[_Judged], view: View, tolerance: Tolerance) -> Slice | None:
    if not any(used for used, _ in parts):
        return None
    sums = {axis: [found[axis] for _, found in parts] for axis in ("all", *view.stage.slices)}
    slices = [_worst(axis, _together(axis, some), tolerance, view) for axis, some in sums.items()]
    return max(slices, key=lambda s: s.excess)


def _squares(
    strip: Strip, model: Tensor, value: Tensor, response: Tensor, doubt: Tensor | None = None
) -> _Judged:
    """Return whether anything can be compared, and the sums of every slice by axis."""
    used, _, x, y, r = strip.usable(model, value, response)
    error = strip.once(_difference, x, y)
    if doubt is not None:
        error = (error - doubt).clamp(min=0.0)
        error = error if used is None else error.where(used, 0.0)
    errors, values, responses = map(strip.square_sums, (error, y, r))
    counts = strip.sizes() if used is None else strip.square_sums(used.double())
    share = strip.view.share(y.shape)
    found = {
        axis: _Squares(errors[axis], values[axis], responses[axis], counts[axis] * share)
        for axis in ("all", *strip.view.stage.slices)
    }
    return used is None or bool(used.any()), found


class _Squares(NamedTuple):
    """Squared error, value and response in ulps, and how many elements, of every slice."""

    error: Tensor
    value: Tensor
    response: Tensor
    elements: Tensor


def _together(axis: str, parts: Sequence[_Squares]) -> _Squares:
    """Return the sums over all strips, each of which has tokens of its own."""
    if axis == "token" or len(parts) == 1:
        return _Squares(*map(torch.cat, zip(*parts, strict=True)))
    return _Squares(*(torch.stack(some).sum(0) for some in zip(*parts, strict=True)))


def _worst(axis: str, sums: _Squares, tolerance: Tolerance, view: View) -> Slice:
    error, value, response, elements = sums
    bound = tolerance.base * (1 + tolerance.spread / elements.clamp(min=1.0).sqrt())
    floor = elements * (_SMALLEST_NORMAL / bound) ** 2
    scale = torch.maximum(torch.maximum(value, response), floor).sqrt()
    excess = error.sqrt() / (bound * scale)
    excess = excess.where(error > 0, 0.0)
    index = int(excess.argmax())
    norm = float(value[index].sqrt())
    return Slice(
        axis=axis,
        index=None if axis == "all" else view.place(axis, index),
        rel_l2=_ratio(float(error[index].sqrt()), norm),
        tolerance=_ratio(float(bound[index] * scale[index]), norm),
        excess=float(excess[index]),
    )


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return math.inf if a else 0.0


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs_()


def _worst_token(parts: Sequence[Tensor | None], view: View) -> tuple[int, float] | None:
    norms = [part for part in parts if part is not None]
    if not norms:
        return None
    error, norm = torch.cat(norms, dim=1)
    ratio = torch.where(norm > 0, error / norm, torch.where(error > 0, torch.inf, 0.0))
    index = int(ratio.argmax())
    return view.place("token", index), float(ratio[index])


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the largest values are, largest first: of many, in the runs of largest maximum.

    Of 133,000 values topk takes 0.12 ms, max 0.07, their runs' maxima and topk of those 0.04.
    """
    runs = len(values) // _RUN
    if runs < _MANY:
        return values.max(0).indices[None] if count == 1 else values.topk(count).indices
    head = values[: runs * _RUN].view(runs, _RUN)
    likely = head.amax(1).topk(min(count, runs)).indices
    within = (likely[:, None] * _RUN + torch.arange(_RUN)).flatten()
    places = torch.cat([within, torch.arange(runs * _RUN, len(values))])
    return places[values[places].topk(count).indices]


def _top(x: Tensor, y: Tensor, d: Tensor, view: View, count: int) -> tuple[Difference, ...]:
    flat = _largest(d.flatten(), min(count, d.numel()))
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
