"""Products with weight matrices that are read in pieces and never held as a whole.

Whoever runs side by side with others (``together``) shares the reading: a matrix that several of
them wait for passes through the cache once, for all their activations. Each piece is dequantised,
multiplied, and compared with the other side's, by as many threads as there are cores.
"""

from __future__ import annotations

import contextvars
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from pytest_aprt.buffers import buffer
from pytest_aprt.compiled import product_of
from pytest_aprt.cores import available_cores
from pytest_aprt.scripted import scripted

PIECE = 5 << 17
"""Weights in a piece: 2.6 MB of float32. Five layers of a 7B pair take 0.45 s, with a third less
0.49, with half of it, whose calls weigh more, 0.55, with 1.6 times as much 0.47 (with torch 0.95 s,
and 1.29 with half of it)."""

_TILE = 16
"""Rows of a piece come in multiples of it, as wide as a vector of float32: with oneDNN 4 % of those
layers."""

WHOLE = 1 << 20
"""Matrices of up to so many weights are read whole and kept while their layer is at hand. With 4 M,
which keeps K and V of a 7B pair, a run of three steps takes 1 s more."""

_T = TypeVar("_T")
_U = TypeVar("_U")

Watch = Callable[[str, int, Tensor, Tensor], None]
"""Called with a matrix's name, the first row of a piece, and both sides' weights of the piece, of
which it may overwrite the model's."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix, (rows, columns) float32, that is read piece by piece.

    ``side`` is ``model`` or ``oracle``; ``order`` is the layer and the place in it, equal on both
    sides: it sorts the matrices as they are used.
    ``read`` fills some of its rows into a buffer.
    """

    name: str
    side: str
    order: tuple[int, int]
    rows: int
    columns: int
    read: Callable[[range, Tensor], None]

    def pieces(self) -> Iterator[range]:
        """Yield the row numbers of every piece."""
        step = max(1, PIECE // self.columns)
        step -= step % _TILE if step > _TILE else 0
        for start in range(0, self.rows, step):
            yield range(start, min(start + step, self.rows))

    def piece(self, rows: range) -> Tensor:
        """Return some rows, in a buffer that this thread's next piece of this side overwrites."""
        found = buffer(self.side, (len(rows), self.columns))
        self.read(rows, found)
        return found

    def part(self, rows: range) -> Matrix:
        """Return some of the rows as a matrix."""

        def read(wanted: range, out: Tensor) -> None:
            self.read(range(rows.start + wanted.start, rows.start + wanted.stop), out)

        return replace(self, rows=len(rows), read=read)

    def times(self, x: Tensor) -> Tensor:
        """Return ``x @ self.T``: (..., columns) to (..., rows), together with others if there are.

        Weights pass in pieces, so elements may be summed in another order than in one product.
        """
        flat = x.reshape(-1, self.columns)
        lane = getcurrent()
        if isinstance(lane, _Lane):
            found = lane.wait(_Request(self, flat))
        else:
            (found,) = _products([_Request(self, flat)], None)
        return found.view(*x.shape[:-1], self.rows)


class _Request(NamedTuple):
    matrix: Matrix
    x: Tensor  # (rows to multiply, columns)


class _Until(NamedTuple):
    condition: Callable[[], bool]


class _More(NamedTuple):
    functions: Sequence[Callable[[], Any]]


def until(condition: Callable[[], bool]) -> None:
    """Let the others go on until ``condition`` holds; within ``together`` only.

    Raises:
        RuntimeError: the others have ended and it does not hold.
    """
    lane = getcurrent()
    while not condition():
        if not isinstance(lane, _Lane) or not lane.parent.switch(_Until(condition)):
            raise RuntimeError("what is waited for is not to come")


class _Lane(greenlet):  # type: ignore[misc]  # greenlet is not typed
    """One of several functions that run side by side, until each waits for a product."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(function)
        self.gr_context = contextvars.copy_context()

    def wait(self, request: _Request) -> Tensor:
        found: Tensor = self.parent.switch(request)
        return found


def together(functions: Sequence[Callable[[], _T]], watch: Watch | None = None) -> list[_T]:
    """Call functions side by side in this thread, and return what they return.

    Each runs until it needs a product with a Matrix. The matrix that comes first is then read once
    for all who wait for it. What one of them raises ends all of them. Called from within one of
    them, its functions run side by side with the others too.

    Args:
        functions: what to call.
        watch: shown every piece of which both the model's and the oracle's side are at hand.
    """
    caller = getcurrent()
    if isinstance(caller, _Lane):
        joined: list[_T] = caller.parent.switch(_More(functions))
        return joined
    running = _Running(watch)
    try:
        return running.results(running.start(functions))
    finally:
        running.end()


class _Running:
    """The functions that run side by side, and what each of them waits for."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._lanes: list[_Lane] = []
        self._waiting: dict[_Lane, _Request] = {}
        self._idle: dict[_Lane, _Until] = {}
        self._joining: dict[_Lane, list[_Lane]] = {}  # for others to end
        self._returned: dict[_Lane, Any] = {}

    def start(self, functions: Sequence[Callable[[], Any]]) -> list[_Lane]:
        """Call each until it waits, and return what runs them."""
        lanes = [_Lane(function) for function in functions]
        self._lanes += lanes
        for lane in lanes:
            self._go_on(lane)
        return lanes

    def results(self, lanes: Sequence[_Lane]) -> list[Any]:
        """Let all go on to their ends, and return what ``lanes`` returned."""
        while self._waiting or self._idle or self._joining:
            if not self._woken():
                self._serve()
        return self._ended(lanes)

    def _ended(self, lanes: Sequence[_Lane]) -> list[Any]:
        """Return what functions that have ended returned, and keep nothing of them."""
        self._lanes = [lane for lane in self._lanes if lane not in lanes]
        return [self._returned.pop(lane) for lane in lanes]

    def end(self) -> None:
        """Stop those that have not ended."""
        for lane in self._lanes:
            if not lane.dead:
                lane.throw(GreenletExit)

    def _go_on(self, lane: _Lane, *value: object) -> None:
        found = lane.switch(*value)
        if lane.dead:
            self._returned[lane] = found
        elif isinstance(found, _Until):
            self._idle[lane] = found
        elif isinstance(found, _More):
            self._joining[lane] = self.start(found.functions)
        else:
            self._waiting[lane] = found

    def _woken(self) -> bool:
        """Let those go on whose wait is over; with nothing else to do, all that wait in vain."""
        joined = [j for j, lanes in self._joining.items() if all(lane.dead for lane in lanes)]
        for lane in joined:
            self._go_on(lane, self._ended(self._joining.pop(lane)))
        ready = [lane for lane, wait in self._idle.items() if wait.condition()]
        in_vain = [] if joined or self._waiting else list(self._idle)
        for lane in ready or in_vain:
            del self._idle[lane]
            self._go_on(lane, bool(ready))
        return bool(joined or ready or in_vain)

    def _serve(self) -> None:
        """Read the matrix that comes first, for all who wait for it."""
        first = min(request.matrix.order for request in self._waiting.values())
        served = [lane for lane, (matrix, _) in self._waiting.items() if matrix.order == first]
        requests = [self._waiting.pop(lane) for lane in served]
        for lane, product in zip(served, _products(requests, self._watch), strict=True):
            self._go_on(lane, product)


def compare(model: Matrix, oracle: Matrix, watch: Watch) -> None:
    """Show ``watch`` every piece of two matrices of one shape."""

    def one(rows: range) -> None:
        watch(model.name, rows.start, model.piece(rows), oracle.piece(rows))

    in_threads(one, model.pieces())


def _products(requests: Sequence[_Request], watch: Watch | None) -> list[Tensor]:
    """Return every request's product; all matrices are of one name, from one side or both.

    What several ask for alike, as an engine and its replay do, is formed once.
    """
    asked: dict[Matrix, list[Tensor]] = {}
    places = []
    for matrix, x in requests:
        known = asked.setdefault(matrix, [])
        place = next((i for i, k in enumerate(known) if torch.equal(k, x)), len(known))
        known += [x] if place == len(known) else []
        places.append(place)
    matrices = list(asked)
    stacked = [torch.cat(xs) for xs in asked.values()]
    found = [x.new_empty(len(x), m.rows) for x, m in zip(stacked, matrices, strict=True)]
    sides = {matrix.side: number for number, matrix in enumerate(matrices)}
    both = watch is not None and {"model", "oracle"} <= sides.keys()

    def one(rows: range) -> None:
        weights = []
        for matrix, x, out in zip(matrices, stacked, found, strict=True):
            weights.append(matrix.piece(rows))
            _multiply(x, weights[-1], out, rows.start)
        if both and watch is not None:
            name = matrices[0].name
            watch(name, rows.start, weights[sides["model"]], weights[sides["oracle"]])

    in_threads(one, matrices[0].pieces())
    parts = {m: f.split([len(x) for x in asked[m]]) for m, f in zip(matrices, found, strict=True)}
    return [parts[r.matrix][place] for r, place in zip(requests, places, strict=True)]


def _has_onednn() -> bool:
    """Return whether torch has oneDNN's product: on x86 alone, as it was measured nowhere else."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply_by_onednn(x: Tensor, weights: Tensor, out: Tensor, start: int) -> None:
    """Fill columns of ``out`` from ``start`` on with ``x @ weights.T``.

    Of so few rows oneDNN takes half the time of the library behind ``@`` (14 rows of 3584 columns:
    136 GFLOP/s beside 77; of 18944: 121 beside 52), and its sums are as exact.
    """
    product = torch.ops.mkldnn._linear_pointwise(x, weights, None, "none", [], "")
    out[:, start : start + len(weights)] = product


def _multiply_plainly(x: Tensor, weights: Tensor, out: Tensor, start: int) -> None:
    out[:, start : start + len(weights)] = x @ weights.t()


_multiply_by_torch = scripted(_multiply_by_onednn if _has_onednn() else _multiply_plainly)
_multiply_compiled = product_of()


def _multiply(x: Tensor, weights: Tensor, out: Tensor, start: int) -> None:
    if not _multiply_compiled(x, weights, out, start):
        _multiply_by_torch(x, weights, out, start)


# -- threads ---------------------------------------------------------------------------------------

_threads = 0


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # A new thread's first product would otherwise use as many threads as there are cores.
    return ThreadPoolExecutor(threads, "aprt", torch.set_num_threads, (1,))


def in_threads(function: Callable[[_U], object], items: Iterable[_U]) -> None:
    """Call ``function`` on every item; a free thread takes the next, a busy one its share.

    Raises what the first failing call raises, after the others have ended.
    """
    work = list(items)
    threads = min(_threads or available_cores(), len(work))
    if threads <= 1:
        for item in work:
            function(item)
        return
    queue, lock = iter(work), threading.Lock()

    def take() -> None:
        with torch.no_grad():
            while True:
                with lock:
                    try:
                        item = next(queue)
                    except StopIteration:
                        return
                function(item)

    for future in [_pool(threads).submit(take) for _ in range(threads)]:
        future.result()


@contextmanager
def compute_threads(count: int | None = None) -> Iterator[None]:
    """Use ``count`` threads for pieces (0: one per core), and one for everything smaller.

    A matmul as skinny as a prompt gains nothing from a second thread, and loses tenfold if a core
    is busy. Measured on 2 cores beside a process that keeps both busy: a tiny model took 3.0 s
    with two threads in each product, 0.2 s with one.
    """
    global _threads
    before = torch.get_num_threads(), _threads
    _threads = _threads if count is None else count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        _threads = before[1]
