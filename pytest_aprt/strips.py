"""Long prompts by strips: what has a number for every query and key is never held as a whole.

A *strip* is some queries of such a stage, with all heads and all keys. Who makes a stage says how
to make one strip of it; who compares or writes it takes one strip after another. Of any other large
stage it is some tokens, with all channels: it is held, and compared so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from pytest_aprt.buffers import give_back
from pytest_aprt.matrices import in_threads

_T = TypeVar("_T")

LARGE = 1 << 20
"""Elements up to which a stage is an ordinary tensor: 4 MB of float32."""

STRIP = 1 << 18
"""Elements of a strip. Four times as many are no faster, and take 0.2 GB more (a prompt of 512
tokens, 16 heads: two threads hold a dozen float64 copies of a strip)."""


TRIMMED = 16
"""Strips after which free memory is given back. Without, a run of 1,024 tokens (2 layers, 8 heads)
peaked at 960 MB, with it at 789: each strip took fresh memory."""


class Strips(Tensor):
    """A stage (heads, queries, keys) that is made a strip at a time, as often as it is read.

    A tensor in name, shape and dtype; whoever reads its elements otherwise is told not to.

    Args:
        shape: heads, queries, keys.
        make: returns the strip of some queries: (heads, their number, keys).
        dtype: that of the strips.
    """

    _make: Callable[[range], Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], make: Callable[[range], Tensor], dtype: torch.dtype
    ) -> Strips:
        """Return a tensor without storage."""
        found: Strips = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        found._make = make
        return found

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func}: the stage of a long prompt is read by strips alone")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Strips(shape={tuple(self.shape)}, dtype={self.dtype})"

    def rows(self, queries: range) -> Tensor:
        """Return the strip of some queries."""
        return self._make(queries)

    def ranges(self) -> list[range]:
        """Return the queries of every strip."""
        return ranges(self.shape)

    def arrays(self) -> Iterator[tuple[range, NDArray[Any]]]:
        """Yield every strip and its queries."""
        for queries in self.ranges():
            yield queries, self.rows(queries).numpy()

    def detach(self) -> Strips:
        """Return itself."""
        return self

    def narrow(self, dim: int, start: Any, length: Any) -> Tensor:
        """Return a part of the queries, the only axis that can be cut."""
        assert dim == 1
        heads, _, keys = self.shape
        return stripped(
            (heads, length, keys),
            lambda q: self.rows(range(start + q.start, start + q.stop)),
            self.dtype,
        )


def stripped(
    shape: Sequence[int], make: Callable[[range], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the stage that ``make`` makes: a tensor, or Strips where it is larger than one."""
    return Strips(shape, make, dtype) if too_large(shape) else make(range(shape[1]))


def too_large(shape: Sequence[int]) -> bool:
    """Return whether a stage of this shape is read by strips."""
    return math.prod(shape) > LARGE


def longest_whole(heads: int) -> int:
    """Return how many tokens a prompt has at most whose scores are an ordinary tensor."""
    return math.isqrt(LARGE // heads)


def ranges(shape: Sequence[int]) -> list[range]:
    """Return the queries of every strip of a stage (heads, queries, keys)."""
    heads, queries, keys = shape
    step = max(1, STRIP // (heads * keys))
    return [range(at, min(at + step, queries)) for at in range(0, queries, step)]


def of_array(tensor: Tensor) -> Tensor:
    """Return a stage that is held, or lies in a file, as one that is read by strips."""
    return stripped(tensor.shape, lambda q: rows(tensor, q), tensor.dtype)


def rows(x: Tensor, queries: range) -> Tensor:
    """Return some queries of a stage (heads, queries, keys) or (queries, channels)."""
    if isinstance(x, Strips):
        return x.rows(queries)
    return x[..., queries.start : queries.stop, :]


def parts(x: Tensor) -> Iterator[Tensor]:
    """Yield a stage strip by strip, or as it is."""
    if isinstance(x, Strips):
        yield from map(x.rows, x.ranges())
    else:
        yield x


def mapped(change: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Return ``change(*values)``, elementwise, by strips where the values are."""
    if not isinstance(values[0], Strips):
        return change(*values)

    def make(queries: range) -> Tensor:
        return change(*(rows(value, queries) for value in values))

    return Strips(values[0].shape, make, torch.float64)


def joined(x: Tensor, function: Callable[[Tensor, range], Tensor]) -> Tensor:
    """Return what ``function`` makes of every strip and its queries, joined along the queries.

    What it returns begins with the axis of the queries.
    """
    if not isinstance(x, Strips):
        return function(x, range(x.shape[1]))
    return torch.cat(each(x.shape, lambda q: function(x.rows(q), q)))


def each(shape: Sequence[int], function: Callable[[range], _T]) -> list[_T]:
    """Return what ``function`` makes of the queries of every strip; threads share the strips."""
    found: dict[int, _T] = {}

    def one(queries: range) -> None:
        found[queries.start] = function(queries)
        if len(found) % TRIMMED == 0:
            give_back()

    in_threads(one, ranges(shape))
    give_back()
    return [found[start] for start in sorted(found)]


def write(file: BinaryIO, x: Strips) -> None:
    """Write all elements in row-major order at the file's place, strip by strip."""
    start, (_, queries, keys) = file.tell(), x.shape
    for some, array in x.arrays():
        for head, block in enumerate(array):
            file.seek(start + (head * queries + some.start) * keys * array.itemsize)
            file.write(block.tobytes())
