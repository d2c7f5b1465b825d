"""The vote on an engine's arithmetic, on readings made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_aprt.arithmetic import EXACT, FLOAT32_ULP, Arithmetic
from pytest_aprt.compare import Slice, measure
from pytest_aprt.consensus import Tally, group_of, in_words, settled
from pytest_aprt.readings import PointErrors, Reading, explains
from pytest_aprt.stages import STAGES, Point
from pytest_aprt.views import View

Q8 = Arithmetic(name="q8_k", inputs="q8_k")
HALF = Arithmetic(name="float16 operands", inputs="float16", weights="float16")
BFLOAT = Arithmetic(name="bfloat16 operands", inputs="bfloat16", weights="bfloat16")
UP, OUT, HEAD = ("ffn_up",), ("ffn_out",), ("lm_head",)


def reading(arithmetic, excess=0.1, error=1e-6):
    view = View(STAGES["ffn_up"], None)
    local = measure(torch.tensor([[1 + error]]), torch.tensor([[1.0]]), view)
    worst = Slice(axis="all", index=None, rel_l2=error, tolerance=1e-5, excess=excess)
    return Reading(arithmetic=arithmetic, local=replace(local, rel_l2=error), worst=worst)


def tally(*points):
    found = Tally()
    for group, *arithmetics in points:
        found.add(group, [a if isinstance(a, Reading) else reading(a) for a in arithmetics])
    return found


def test_what_explains():
    assert explains(None)
    assert reading(EXACT, excess=1.0).explains and not reading(EXACT, excess=1.01).explains
    assert reading(Q8, excess=0.5).undoubted == pytest.approx(0.5 * Q8.tolerance.base)


def test_most_points_decide():
    assert tally((UP, Q8), (UP, Q8), (UP, EXACT)).choice(UP) == Q8
    assert tally((UP, Q8), (UP, EXACT), (UP, EXACT)).choice(UP) == EXACT
    assert tally((UP, Q8), (UP, Q8), (UP, EXACT), (UP, EXACT)).choice(UP) == EXACT  # of equals


def test_of_those_that_explain_as_many_the_nearest_is_taken():
    near, far = reading(HALF, error=1e-7), reading(Q8, error=1e-6)
    assert tally((UP, far, near), (UP, far, near)).choice(UP) == HALF
    assert tally((UP, far, near), (UP, far, near), (UP, far)).choice(UP) == Q8


def test_one_point_alone_may_be_a_fault():
    assert tally((UP, Q8)).choice(UP) == EXACT
    assert tally((UP, Q8), (OUT, Q8)).choice(UP) == Q8  # it rounds elsewhere, too


def test_the_head_is_read_by_what_rounds_elsewhere():
    """There is one head: logits in float32 of an engine that keeps all else in bfloat16."""
    kept = BFLOAT.stored("bfloat16")
    assert tally((UP, kept), (OUT, kept), (HEAD, BFLOAT)).choice(HEAD) == BFLOAT
    assert tally((UP, kept), (HEAD, HALF)).choice(HEAD) == EXACT
    # a dtype in which nothing else is kept
    assert tally((UP, BFLOAT), (OUT, BFLOAT), (HEAD, kept)).choice(HEAD) == EXACT


def test_a_group_of_which_nothing_is_explained_is_exact():
    found = tally((UP,), (OUT, Q8), (OUT, Q8))
    assert found.choice(UP) == EXACT
    assert found.arithmetics() == {OUT: Q8}


def test_leaders_are_known_after_three_points():
    found = tally((UP, Q8, HALF), (UP, Q8))
    assert found.leaders(UP) == []
    found.add(UP, [reading(Q8), reading(HALF)])
    assert found.leaders(UP) == [Q8]
    found.add(UP, [reading(HALF)])
    assert found.leaders(UP) == [Q8, HALF]
    assert found.leaders(OUT) == []


def test_what_explained_something_is_carried_across_layers():
    assert tally((UP, EXACT), (OUT, Q8, HALF)).explained_by() == [Q8, HALF]


def errors(stage, *readings, bracket=(), stood_in=False):
    first = readings[0]
    return PointErrors(point=Point(1, stage), prompt=0, shape=(1, 1), local=first.local,
                       worst=first.worst, readings=readings, bracket=bracket,
                       stood_in=stood_in)  # fmt: skip


def test_points_are_read_in_the_arithmetic_of_their_group():
    exact, rounded = reading(EXACT, excess=40), reading(Q8)
    both = errors("ffn_up", exact, rounded)
    (found,) = settled([both], {UP: Q8})
    assert (found.arithmetic, found.worst) == (Q8, rounded.worst)
    (found,) = settled([both], {UP: HALF})  # not read in it: it stays an origin
    assert (found.arithmetic, found.worst) == (EXACT, exact.worst)
    (found,) = settled([both], {})
    assert found.worst.excess == 40


def test_missing_stages_make_another_group():
    bracket = (Point(1, "ffn_gate"), Point(2, "ffn_gate"), Point(2, "ffn_silu"))
    group = group_of(Point(2, "ffn_swigl"), bracket)
    assert group == ("ffn_swigl", "ffn_gate", "ffn_silu")
    both = errors("ffn_swigl", reading(EXACT, excess=40), reading(Q8), bracket=bracket)
    assert settled([both], {("ffn_swigl",): Q8})[0].arithmetic == EXACT
    assert settled([both], {group: Q8})[0].arithmetic == Q8


def test_a_stand_in_has_no_part_in_the_vote():
    exact, far, near = reading(EXACT, excess=2), reading(Q8, error=1e-5), reading(HALF, error=1e-6)
    (found,) = settled([errors("attention", exact, far, near, stood_in=True)], {})
    assert found.arithmetic == HALF
    (found,) = settled([errors("attention", exact, stood_in=True)], {("attention",): Q8})
    assert found.arithmetic == EXACT and found.worst.excess == 2


def test_in_words():
    assert in_words({}) == "float32"
    assert in_words({("embedding",): EXACT, UP: Q8, OUT: Q8}) == "q8_k"
    assert in_words({UP: Q8, OUT: Q8, ("attention", "attn_softmax"): HALF}) == (
        "q8_k; float16 operands at attention"
    )


def test_an_ulp_is_half_the_spacing_at_one():
    assert torch.tensor(1.0) + 2 * FLOAT32_ULP == torch.nextafter(
        torch.tensor(1.0), torch.tensor(2.0)
    )
