"""How stages are looked at: heads as an axis, only what counts, and a strip of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pytest_aprt.facts import Facts
from pytest_aprt.stages import Stage
from pytest_aprt.strips import each, rows, too_large

_T = TypeVar("_T")


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


def by_strips(function: Callable[..., _T], view: View, *sides: Tensor) -> list[_T]:
    """Return ``function(strip, *sides)`` of what the view makes of them, of every strip of tokens.

    In float64 a large stage would take several times its memory, and leave the cache in between.
    Whatever is large is made anew whenever it is read, so a side that comes twice is read once.
    """
    distinct = {id(side): side for side in sides}

    def looked_at(view: View, made: Mapping[int, Tensor]) -> _T:
        view, found = view.seen_part({key: view(side) for key, side in made.items()})
        strip = Strip(view, next(iter(found.values())).shape)
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


class Strip:
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


def _rows_with(bad: Tensor) -> Tensor:
    """Spread bad elements over their rows: a token's channels, a head's scores of one token."""
    if bad.ndim == 1:
        return bad.any().expand_as(bad)
    return bad.any(-1, keepdim=True).expand_as(bad)
