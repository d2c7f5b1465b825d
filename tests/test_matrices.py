"""Matrices that stream: the same numbers as held ones, read once for all who wait."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from harness import checked, fixture_pair

from pytest_aprt import matrices, weights
from pytest_aprt.architectures import HEAD
from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.matrices import Matrix, compute_threads, in_threads, together, until
from pytest_aprt.measure import measure_pair
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.readings import Prompt
from pytest_aprt.rungs.logits import logit_rows
from pytest_aprt.testing import NumpyEngine

TOKENS = (5, 9, 300, 22, 7, 8, 100)
FAMILIES = ("qwen2", "llama", "qwen3")


class Counted:
    """A random matrix that counts how often each of its rows is read."""

    def __init__(self, name: str = "w", side: str = "model", order: int = 0) -> None:
        generator = torch.Generator().manual_seed(order)
        self.values = torch.randn(1000, 64, generator=generator)
        self.reads = torch.zeros(1000)
        self.matrix = Matrix(name, side, (0, order), 1000, 64, self._read)

    def _read(self, rows: range, out: torch.Tensor) -> None:
        self.reads[rows.start : rows.stop] += 1
        out.copy_(self.values[rows.start : rows.stop])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(matrices, "PIECE", 1 << 12)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_pass_serves_all_who_wait(threads):
    w, v = Counted("w"), Counted("v", order=1)
    xs = [torch.randn(n, 64) for n in (7, 1, 3)]

    def run(x):
        return x @ w.values.T, w.matrix.times(x), v.matrix.times(x)

    with compute_threads(threads):
        found = together([lambda x=x: run(x) for x in xs])
    for (expected, first, second), x in zip(found, xs, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, x @ v.values.T, rtol=1e-5, atol=1e-5)
    assert set(w.reads.tolist()) == set(v.reads.tolist()) == {1}


def test_outside_of_together():
    w = Counted()
    x = torch.randn(1, 7, 64)
    torch.testing.assert_close(w.matrix.times(x), x @ w.values.T, rtol=1e-5, atol=1e-5)


def test_those_behind_catch_up():
    """The matrix that comes first in its layer goes first, whoever asks for it."""
    w, v = Counted("w"), Counted("v", order=1)
    x = torch.randn(2, 64)
    together([lambda: v.matrix.times(x), lambda: [w.matrix.times(x), v.matrix.times(x)]])
    assert set(w.reads.tolist()) == set(v.reads.tolist()) == {1}


def test_watch_sees_both_sides_of_every_row():
    a, b = Counted(), Counted(side="oracle", order=0)
    seen = torch.zeros(1000)
    lock = threading.Lock()

    def watch(name, start, model, oracle):
        with lock:
            seen[start : start + len(model)] += 1
        torch.testing.assert_close(model, oracle)

    x = torch.randn(2, 64)
    together([lambda: b.matrix.times(x), lambda: a.matrix.times(x)], watch)
    assert set(seen.tolist()) == {1}


def test_waiting_for_one_another():
    w = Counted()
    done = []

    def first():
        w.matrix.times(torch.randn(1, 64))
        done.append("first")

    def second():
        until(lambda: bool(done))
        done.append("second")

    together([second, first])
    assert done == ["first", "second"]


def test_those_within_run_beside_those_without():
    w = Counted()
    x = torch.randn(2, 64)
    product = x @ w.values.T

    def one():
        return w.matrix.times(x)

    def several():
        return together([one, one, lambda: "third"])

    found = together([one, several, lambda: together([several])])
    torch.testing.assert_close(found[0], product, rtol=1e-5, atol=1e-5)
    assert [f if isinstance(f, str) else len(f) for f in (*found[1], *found[2][0])] == [
        2, 2, "third", 2, 2, "third"
    ]  # fmt: skip
    assert set(w.reads.tolist()) == {1}


def test_what_was_returned_within_is_not_kept():
    """Of every layer of a decode it was, as views of whole products: 0.2 GB of a 7B pair."""
    w, returned = Counted(), []

    def product():
        found = w.matrix.times(torch.randn(2, 64))
        returned.append(weakref.ref(found))
        return found

    def outer():
        for _ in range(3):
            together([product, product])
        return [each() is None for each in returned]

    assert together([outer])[0][:4] == [True] * 4  # the last two are just handed over


def test_an_error_within_ends_all():
    def fails():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        together([lambda: together([fails]), lambda: None])


def test_waiting_within_for_what_never_comes():
    with pytest.raises(RuntimeError, match="not to come"):
        together([lambda: together([lambda: until(lambda: False)])])


@pytest.mark.parametrize(
    ("rows", "columns", "step"),
    [(1000, 3584, 176), (100, 18_944, 32), (40, 100_000, 6), (3, 1 << 20, 1), (7, 64, 7)],
)
def test_pieces_are_whole_tiles_that_hold_every_row_once(rows, columns, step, monkeypatch):
    monkeypatch.undo()  # small_pieces
    matrix = Matrix("w", "model", (0, 0), rows, columns, lambda some, out: None)
    pieces = list(matrix.pieces())
    assert [row for piece in pieces for row in piece] == list(range(rows))
    assert len(pieces[0]) == step


def test_a_part_is_some_of_the_rows():
    w = Counted()
    x = torch.randn(2, 64)
    found = w.matrix.part(range(300, 700)).times(x)
    torch.testing.assert_close(found, x @ w.values[300:700].T, rtol=1e-5, atol=1e-5)
    assert w.reads.sum() == w.reads[300:700].sum() == 400


def test_waiting_for_what_never_comes():
    with pytest.raises(RuntimeError, match="not to come"):
        together([lambda: until(lambda: False), lambda: None])


@pytest.mark.parametrize("columns", [64, 3584, 18944])
@pytest.mark.parametrize("library", ["onednn", "plainly"])
def test_products_are_exact_in_either_library(library, columns):
    """Measured: at most 5.3e-7 in oneDNN, 7.7e-7 in MKL."""
    if library == "onednn" and not matrices._has_onednn():
        pytest.skip("torch has no oneDNN on this machine")
    x, w = (torch.randn(n, columns, generator=torch.Generator().manual_seed(n)) for n in (7, 55))
    expected = x.double() @ w.double().T
    found = torch.full((7, 60), torch.nan)
    multiply = {"onednn": matrices._multiply_by_onednn, "plainly": matrices._multiply_plainly}
    multiply[library](x, w, found, 3)
    assert found[:, :3].isnan().all() and found[:, 58:].isnan().all()
    assert (found[:, 3:58].double() - expected).norm() < 2e-6 * expected.norm()


def test_an_error_ends_all():
    w = Counted()
    ended = []

    def waits():
        try:
            w.matrix.times(torch.randn(1, 64))
        finally:
            ended.append(True)

    def fails():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        together([waits, fails])
    assert ended == [True]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_thread(threads):
    def fails(item):
        if item == 3:
            raise ValueError("broken")

    with compute_threads(threads), pytest.raises(ValueError, match="broken"):
        in_threads(fails, range(10))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_reads_every_matrix_once(family, monkeypatch):
    """Prompt and steps share the reading, and say what they say with matrices that are held."""
    found, formed = [], matrices._products
    for whole in (1 << 22, 0):
        monkeypatch.setattr(weights, "WHOLE", whole)
        pair = fixture_pair(family)
        reads = []

        def products(requests, watch, reads=reads):
            reads.append(requests[0].matrix.order)
            return formed(requests, watch)

        monkeypatch.setattr(matrices, "_products", products)
        engine = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
        found.append(list(engine.decode(TOKENS, (3, 1, 4))))
    assert len(reads) == len(set(reads)) == 7 * pair.model_facts.layers + 1
    assert pair.model_weights.matrix(HEAD) is pair.model_weights.matrix(HEAD)  # else read anew
    for held, streamed in zip(*found, strict=True):
        for (layer, a), (_, b) in zip(held, streamed, strict=True):
            for name, value in a.items():
                assert (b[name] - value).norm() <= 1e-5 * value.norm(), (layer, name)


def test_a_decoded_step_holds_no_more_than_its_own_rows(monkeypatch):
    monkeypatch.setattr(weights, "WHOLE", 0)
    pair = fixture_pair("qwen2")
    engine = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
    for step in engine.decode(TOKENS, (3, 1, 4)):
        for layer, stages in step:
            for name, value in stages.items():
                if layer is not None:
                    assert value.untyped_storage().nbytes() == 4 * value.numel(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_runs_are_held_runs(family, monkeypatch):
    """Everything that a run measures, with every matrix in pieces and with none."""
    found = []
    for whole in (1 << 22, 0):
        monkeypatch.setattr(weights, "WHOLE", whole)
        pair = fixture_pair(family)
        engine = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
        found.append(
            measure_pair(pair, engine, [Prompt(text="", tokens=TOKENS)], pair.graph.points,
                         PROFILES["float32"])
        )  # fmt: skip
    held, streamed = found
    assert [t.passed for t in streamed.self_tests] == [True] * len(held.self_tests)
    for a, b in zip(held.errors, streamed.errors, strict=True):
        assert a.point == b.point
        assert abs(a.total.rel_l2 - b.total.rel_l2) < 2e-6  # measured: at most 1.2e-6
        assert b.local.rel_l2 < 1e-6
        assert b.worst is None or b.worst.excess < 0.5
    for c, d in zip(held.tensors, streamed.tensors, strict=True):
        assert (c.name, c.reason) == (d.name, d.reason) == (c.name, "")
        assert c.rel_l2 == pytest.approx(d.rel_l2, rel=1e-12)


@pytest.mark.parametrize(("engine", "passes"), [(BuiltinRunner, 1), (NumpyEngine, 2)])
def test_the_head_passes_once_for_all_logits(engine, passes, monkeypatch):
    """Those of the last position and those of all, as from a head that is held.

    Sums in another order leave an error whose response is asked for, which takes a pass more.
    """
    found, formed = [], matrices._products
    for whole in (1 << 22, 0):
        monkeypatch.setattr(weights, "WHOLE", whole)
        pair = fixture_pair()
        reads = []

        def products(requests, watch, reads=reads):
            reads.append(requests[0].matrix.name)
            return formed(requests, watch)

        monkeypatch.setattr(matrices, "_products", products)
        ours = engine is BuiltinRunner
        facts = pair.model_facts if ours else pair.oracle_facts
        runner = engine(pair.model_weights, facts, pair.architecture)
        runner = runner if ours else checked(pair, runner)
        result = measure_pair(pair, runner, [Prompt(text="", tokens=TOKENS)], pair.graph.points,
                              PROFILES["float32"])  # fmt: skip
        found.append({row.name: row for row in logit_rows(pair, result.finals)})
    assert reads.count(HEAD) == passes
    held, streamed = found
    assert held.keys() == streamed.keys() == {"last", "all"}
    for name, row in held.items():
        assert streamed[name].status == row.status
        for error in ("total", "engine", "weights"):
            assert streamed[name].figures[error] == pytest.approx(
                row.figures[error], rel=1e-3, abs=1e-6
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_oracle_is_the_held_one_but_for_rounding(family, monkeypatch):
    runs = []
    for whole in (1 << 22, 0):
        monkeypatch.setattr(weights, "WHOLE", whole)
        pair = fixture_pair(family)
        runs.append(list(TransformersRunner(pair.config, pair.oracle_weights).layers(TOKENS)))
    for held, streamed in zip(*runs, strict=True):
        assert held.stages.keys() == streamed.stages.keys()
        for name, value in held.stages.items():
            error = (streamed.stages[name] - value).norm() / value.norm()
            assert error < 2e-6, (held.layer, name)  # measured: at most 1.1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_in_a_streamed_run(family, monkeypatch):
    """An engine of one's own goes first; its fault is found where it is."""
    monkeypatch.setattr(weights, "WHOLE", 0)
    pair = fixture_pair(family)
    faults = {(2, "ffn_up"): lambda value, w: value * np.float32(1.001)}
    engine = NumpyEngine(pair.model_weights, pair.model_facts, pair.architecture, faults)
    prompt = Prompt(text="", tokens=TOKENS)
    found = measure_pair(
        pair, checked(pair, engine), [prompt], pair.graph.points, PROFILES["float32"]
    )
    wrong = [str(e.point) for e in found.errors if e.worst is not None and e.worst.excess > 1]
    assert wrong == ["L02-ffn_up"]
