"""Compares two captures of one point: metrics, and whether an error is more than rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pytest_aprt.arithmetic import FLOAT32_ULP, Tolerance
from pytest_aprt.facts import Facts
from pytest_aprt.images import Image, Picture, image_of, picture_of
from pytest_aprt.replay import Reference
from pytest_aprt.stages import Stage
from pytest_aprt.strips import each, mapped, rows, too_large

_T = TypeVar("_T")

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


@dataclass(frozen=True)
class View:
    """How a stage's tensor is looked at: with heads as an axis, and only where it counts.

    ``visible`` (T, T) bool says which keys each query may see; only those scores count. ``first``
    is the position of the first token that the tensor holds. ``unseen`` last keys, which no query
    sees, are left out of the tensor.
    """

    stage: Stage
    facts: Facts
    visible: Tensor | None = None
    first: int = 0
    unseen: int = 0

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

    def part(self, queries: range) -> View:
        """Return the view of a strip of these queries."""
        first, visible = self.first + queries.start, self.visible
        if visible is not None:
            visible = visible[: self.first + queries.stop]
        return replace(self, first=first, visible=visible)

    def seen_part(self, sides: Mapping[int, Tensor]) -> tuple[View, Mapping[int, Tensor]]:
        """Return both without the last keys, if no query sees them and nothing counts there.

        Of a causal mask that is half the work.
        """
        if self.visible is None or self.stage.axes[-1] != "key":
            return self, sides
        total = self.visible.shape[-1]
        seen = self.visible[self.first :].any(0).nonzero()
        keys = int(seen[-1]) + 1 if len(seen) else total
        counts = self.stage.kind != "scores"  # probabilities are to be zero where nothing is seen
        if keys == total or (counts and any(s[..., keys:].any() for s in sides.values())):
            return self, sides
        view = replace(self, visible=self.visible[:, :keys], unseen=total - keys)
        return view, {key: side[..., :keys] for key, side in sides.items()}

    def share(self, shape: Sequence[int]) -> float:
        """Return for how many elements each one stands, as unseen keys count too."""
        return 1.0 if self.stage.kind == "scores" else 1 + self.unseen / shape[-1]

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

    def counted_in(strip: _Strip, values: Tensor) -> int:
        _, bad, _ = strip.usable(values)
        return 0 if bad is None else int(bad[0].sum())

    return sum(_by_strips(counted_in, view, tensor))


def _by_strips(function: Callable[..., _T], view: View, *sides: Tensor) -> list[_T]:
    """Return ``function(strip, *sides)`` of what the view makes of them, of every strip of tokens.

    In float64 a large stage would take several times its memory, and leave the cache in between.
    Whatever is large is made anew whenever it is read, so a side that comes twice is read once.
    """
    distinct = {id(side): side for side in sides}

    def looked_at(view: View, made: Mapping[int, Tensor]) -> _T:
        view, found = view.seen_part({key: view(side) for key, side in made.items()})
        strip = _Strip(view, next(iter(found.values())).shape)
        return function(strip, *(found[id(side)] for side in sides))

    shape = tuple(sides[0].shape)
    if "token" not in view.stage.axes or not too_large(shape):
        return [looked_at(view, distinct)]
    if len(shape) == 2:
        shape = (1, *shape)
    return each(
        shape,
        lambda queries: looked_at(
            view.part(queries), {key: rows(side, queries) for key, side in distinct.items()}
        ),
    )


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
    parts = _by_strips(_sums_of(comparisons), view, *_sides_of(comparisons))
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

    def both(strip: _Strip, *sides: Tensor) -> tuple[_Judged, list[_Sums]]:
        return _squares(strip, *sides[:count]), sums_of(strip, *sides[count:])

    parts = _by_strips(both, view, *judged, *_sides_of(comparisons))
    worst = _worst_of([squares for squares, _ in parts], view, tolerance)
    if worst is not None and worst.excess > QUIET:
        response = mapped(lambda r: r / FLOAT32_ULP, reference.response)
        parts_again = _by_strips(_squares, view, *_judged_by(model, reference, response))
        worst = _worst_of(parts_again, view, tolerance)
    return worst, _metrics_of(comparisons, [sums for _, sums in parts], view)


def _sides_of(comparisons: Sequence[Comparison]) -> list[Tensor]:
    return [side for asked in comparisons for side in (asked.a, asked.b)]


def _sums_of(comparisons: Sequence[Comparison]) -> Callable[..., list[_Sums]]:
    def sums_of(strip: _Strip, *sides: Tensor) -> list[_Sums]:
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


def _sums(a: Tensor, b: Tensor, strip: _Strip, top: int, pictured: bool) -> _Sums:
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
    strip: _Strip, model: Tensor, value: Tensor, response: Tensor, doubt: Tensor | None = None
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


class _Strip:
    """Looks at some tokens of several sides; what is made of a side is made once, and kept."""

    def __init__(self, view: View, shape: Sequence[int]) -> None:
        self.view, self._shape = view, shape
        self._counted = view.counted(shape)
        self._made: dict[tuple[object, ...], tuple[Any, tuple[Tensor, ...]]] = {}
        self._sums: dict[int, tuple[dict[str, Tensor], Tensor]] = {}
        named = ["token"] if "token" in view.stage.axes else []
        self._axes = dict.fromkeys(("all", *named, *view.stage.slices))

    def once(self, make: Callable[..., _T], *of: Tensor) -> _T:
        """Return ``make(*of)``, of a function that does not hold this strip: it would stay.

        ``of`` is held, so that no later tensor is taken for it.
        """
        key = make, *map(id, of)
        if key not in self._made:
            self._made[key] = make(*of), of
        found: _T = self._made[key][0]
        return found

    def square_sum(self, values: Tensor) -> float:
        """Return the squared norm."""
        return float(self.square_sums(values)["all"])

    def square_sums(self, values: Tensor) -> dict[str, Tensor]:
        """Return the squared norm of every slice along each axis: (slices,)."""
        if id(values) not in self._sums:
            squares = values.square()
            sums = {axis: self._summed(squares, axis) for axis in self._axes}
            self._sums[id(values)] = sums, values
        return self._sums[id(values)][0]

    def _summed(self, values: Tensor, axis: str) -> Tensor:
        """Sum a view over everything but ``axis``."""
        if axis == "all":
            return values.sum()[None]
        if axis == "part":
            return torch.stack([values[:, part].sum() for _, part in self.view.parts()])
        others = [i for i, name in enumerate(self.view.stage.axes) if name != axis]
        return values.sum(dim=others) if others else values

    def sizes(self) -> dict[str, Tensor]:
        """Return how many elements every slice along each axis has: (slices,)."""
        return {axis: self._sizes(axis) for axis in self._axes}

    def _sizes(self, axis: str) -> Tensor:
        if axis == "part":
            tokens, _ = self._shape
            return _numbers([tokens * (part.stop - part.start) for _, part in self.view.parts()])
        count = 1 if axis == "all" else self._shape[self.view.stage.axes.index(axis)]
        return _numbers([math.prod(self._shape) // count]).expand(count)

    def usable(self, *sides: Tensor) -> tuple[Any, ...]:
        """Return which elements can be compared, which are not finite, and the sides.

        The first is None where all elements can be, the second None where all are finite, else of
        every side. Where nothing can be compared the sides are set to zero: elements that do not
        count, and rows with non-finite values.
        """
        counted = self._counted
        if counted is not None:
            sides = tuple(self.once(_kept, side, counted) for side in sides)
        if all(self.once(_is_finite, side) for side in sides):
            return counted, None, *sides
        bad = [~torch.isfinite(side) for side in sides]
        used = ~_rows_with(torch.stack(bad).any(0))
        if counted is not None:
            used = used & counted
        return used, bad, *(side.where(used, 0.0) for side in sides)


def _is_finite(values: Tensor) -> bool:
    return math.isfinite(float(values.sum()))  # a NaN stays one, and Inf - Inf becomes one


def _kept(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, 0.0)


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs_()


def _rows_with(bad: Tensor) -> Tensor:
    """Spread bad elements over their rows: a token's channels, a head's scores of one token."""
    if bad.ndim == 1:
        return bad.any().expand_as(bad)
    return bad.any(-1, keepdim=True).expand_as(bad)


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
