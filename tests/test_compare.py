"""Metrics and slices on arrays whose answers can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_aprt.arithmetic import FLOAT32_ULP, Tolerance
from pytest_aprt.compare import TOP_DIFFS, judge, measure, non_finite
from pytest_aprt.facts import Facts, RopeScaling
from pytest_aprt.replay import Reference
from pytest_aprt.stages import STAGES
from pytest_aprt.views import View

FACTS = Facts(
    layers=1, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocab=5, context=64,
    eps=1e-6, rope_theta=1e4, rope_scaling=RopeScaling(), windows=(None,), tied_embeddings=False,
    activation="silu",
)  # fmt: skip
TOLERANCE = 1e-5


def of(base):
    return Tolerance(base=base, spread=0.0, source="a test")


NAN, INF = math.nan, math.inf
QUICK = settings(max_examples=60, deadline=None)


def view(stage, tokens=None):
    causal = None if tokens is None else torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return View(STAGES[stage], FACTS, causal)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metrics(a, b, stage="attn_norm", tokens=None):
    return measure(tensor(a), tensor(b), view(stage, tokens))


def worst(a, b, stage="attn_norm", response=None, tokens=None, tolerance=TOLERANCE):
    response = torch.zeros_like(b, dtype=torch.float64) if response is None else response
    return judge(a, Reference(b.double(), lambda: response), view(stage, tokens), of(tolerance))


# Metrics


def test_every_metric_by_hand():
    m = metrics([[3.0, 0.0], [0.0, 4.0]], [[3.0, 4.0], [0.0, 0.0]])
    assert m.cosine == pytest.approx(9 / 25)
    assert m.rel_l2 == pytest.approx(math.sqrt(32) / 5)
    assert m.slope == pytest.approx(9 / 25)
    assert m.norm_ratio == pytest.approx(1.0)
    assert m.max_abs == 4.0
    assert m.rms == pytest.approx(math.sqrt(32 / 4))
    assert m.sqnr_db == pytest.approx(10 * math.log10(25 / 32))
    assert m.compared == 4
    assert (m.non_finite_a, m.non_finite_b) == (0, 0)


def test_equal_tensors():
    m = metrics([[1.0, 2.0]], [[1.0, 2.0]])
    assert m.cosine == pytest.approx(1.0, abs=1e-15)
    assert (m.rel_l2, m.max_abs, m.rms, m.sqnr_db) == (0.0, 0.0, 0.0, INF)
    assert (m.slope, m.norm_ratio) == (1.0, 1.0)
    assert m.worst_token == (0, 0.0)


def test_scaling_shows_in_slope_and_not_in_cosine():
    m = metrics([[2.0, 4.0]], [[1.0, 2.0]])
    assert m.cosine == pytest.approx(1.0, abs=1e-15)
    assert (m.slope, m.norm_ratio, m.rel_l2) == (2.0, 2.0, 1.0)


def test_a_turned_sign():
    m = metrics([[-1.0, -2.0]], [[1.0, 2.0]])
    assert m.cosine == pytest.approx(-1.0, abs=1e-15)
    assert (m.slope, m.norm_ratio, m.rel_l2) == (-1.0, 1.0, 2.0)


def test_sums_are_formed_in_float64():
    a, b = torch.full((1, 4), 3e38), torch.full((1, 4), 1.5e38)
    m = measure(a, b, view("attn_norm"))
    assert (m.slope, m.norm_ratio, m.rel_l2) == (2.0, 2.0, 1.0)
    tiny = torch.full((1, 4), 1e-30)
    assert measure(tiny, tiny, view("attn_norm")).cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("stage", "shape", "place", "expected"),
    [
        ("attn_norm", (3, 4), (2, 1), {"token": 2, "channel": 1}),
        ("q_post_rope", (3, 4), (2, 3), {"token": 2, "head": 1, "channel": 1}),
        ("attn_scores", (2, 3, 3), (1, 2, 0), {"head": 1, "token": 2, "key": 0}),
        ("lm_head", (5,), (3,), {"channel": 3}),
    ],
)
def test_the_largest_difference_is_told_as_coordinates(stage, shape, place, expected):
    b = random(*shape)
    a = b.clone()
    a[place] += 7
    m = measure(a, b, view(stage, 3))
    assert m.max_abs_at == expected
    assert m.max_abs == pytest.approx(7, rel=1e-6)
    assert m.top_diffs[0].at == expected
    assert m.top_diffs[0].a - m.top_diffs[0].b == pytest.approx(7, rel=1e-6)


def test_top_diffs_are_ordered_and_few():
    b = torch.zeros(3, 4)
    a = torch.arange(12.0).reshape(3, 4)
    sizes = [abs(d.a - d.b) for d in measure(a, b, view("attn_norm"), TOP_DIFFS).top_diffs]
    assert sizes == [11.0, 10.0, 9.0, 8.0, 7.0]
    assert len(sizes) == TOP_DIFFS
    few = measure(torch.ones(1, 2), torch.ones(1, 2), view("attn_norm"), TOP_DIFFS)
    assert len(few.top_diffs) == 2


# in the same run of a few hundred, at both ends, and behind the last whole run
FAR = ((0, 0), (1, 77), (1, 78), (1, 79), (2, 39_999))


@pytest.mark.parametrize("top", [1, TOP_DIFFS])
def test_the_largest_differences_of_a_large_tensor(top):
    a, b = 1e-3 * random(3, 40_001), torch.zeros(3, 40_001)
    for size, place in enumerate(FAR, 1):
        a[place] = size
    found = measure(a, b, view("attn_norm"), top)
    expected = [{"token": t, "channel": c} for t, c in reversed(FAR)][:top]
    assert [d.at for d in found.top_diffs] == expected
    assert found.max_abs == 5.0
    assert found.max_abs_at == expected[0]


def test_the_worst_token_is_the_one_off_most_by_its_own_norm():
    m = metrics([[1000.0, 1.0], [1.0, 0.5]], [[1000.0, 0.0], [1.0, 0.0]])
    assert m.worst_token == (1, 0.5)


def test_a_token_that_should_be_zero_is_the_worst():
    assert metrics([[2.0, 1.0], [0.0, 1e-9]], [[1.0, 1.0], [0.0, 0.0]]).worst_token == (1, INF)


@pytest.mark.parametrize(
    ("stage", "shape", "place", "token"),
    [
        ("attn_norm", (3, 4), (1, 0), 1),
        ("q_post_rope", (3, 4), (2, 3), 2),
        ("attn_scores", (2, 3, 3), (1, 2, 0), 2),
        ("lm_head", (5,), (3,), None),
    ],
)
def test_the_worst_token_where_a_stage_has_tokens(stage, shape, place, token):
    a = torch.ones(shape)
    a[place] += 1
    found = measure(a, torch.ones(shape), view(stage, 3)).worst_token
    assert (found and found[0]) == token


# Zero norms


@pytest.mark.parametrize(
    ("a", "b", "rel_l2", "slope", "ratio", "sqnr"),
    [
        ([[0.0, 0.0]], [[3.0, 4.0]], 1.0, 0.0, 0.0, 0.0),
        ([[3.0, 4.0]], [[0.0, 0.0]], INF, NAN, NAN, NAN),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, NAN, NAN, INF),
    ],
    ids=["model", "reference", "both"],
)
def test_a_zero_norm_has_no_cosine(a, b, rel_l2, slope, ratio, sqnr):
    m = metrics(a, b)
    assert math.isnan(m.cosine)
    assert m.rel_l2 == rel_l2
    assert (m.slope, m.norm_ratio, m.sqnr_db) == pytest.approx((slope, ratio, sqnr), nan_ok=True)


# Non-finite values


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_with_a_non_finite_value_is_left_out(value):
    m = metrics([[9.0, value], [1.0, 2.0]], [[1.0, 1.0], [1.0, 2.0]])
    assert (m.non_finite_a, m.non_finite_b) == (1, 0)
    assert m.compared == 2
    assert (m.rel_l2, m.max_abs) == (0.0, 0.0)


def test_rows_are_left_out_on_either_side():
    m = metrics([[1.0, NAN], [1.0, 2.0], [5.0, 5.0]], [[1.0, 1.0], [INF, NAN], [5.0, 5.0]])
    assert (m.non_finite_a, m.non_finite_b, m.compared) == (1, 2, 2)


def test_nothing_finite_is_all_nan_and_never_0_or_1():
    m = metrics([[NAN, 1.0]], [[1.0, 1.0]])
    for name in ("cosine", "rel_l2", "slope", "norm_ratio", "max_abs", "rms", "sqnr_db"):
        assert math.isnan(getattr(m, name)), name
    assert (m.compared, m.max_abs_at, m.top_diffs, m.worst_token) == (0, {}, (), None)


def test_a_row_of_heads_is_one_head_of_one_token():
    m = metrics([[NAN, 1.0, 5.0, 5.0]], [[1.0, 1.0, 5.0, 5.0]], "q_post_rope")
    assert (m.compared, m.non_finite_a, m.rel_l2) == (2, 1, 0.0)


def test_a_row_of_logits_is_all_of_them():
    assert metrics([NAN, 1, 1, 1, 1], [1, 1, 1, 1, 1], "lm_head").compared == 0


@pytest.mark.parametrize("masked", [0.0, 123.0, -INF, NAN])
def test_scores_behind_the_mask_do_not_count(masked):
    b = random(2, 3, 3)
    a = b.clone()
    a[:, torch.ones(3, 3).triu(1).bool()] = masked
    v = view("attn_scores", 3)
    m = measure(a, b, v)
    assert (m.rel_l2, m.non_finite_a, m.compared) == (0.0, 0, 2 * 6)
    assert non_finite(a, v) == 0
    assert worst(a, b, "attn_scores", tokens=3).excess == 0


def test_probabilities_behind_the_mask_do_count():
    b = torch.eye(3).expand(2, 3, 3).clone()
    a = b.clone()
    a[0, 0, 2] = 0.5
    assert measure(a, b, view("attn_softmax", 3)).max_abs == 0.5
    assert worst(a, b, "attn_softmax", tokens=3).excess > 1


def test_non_finite_counts_elements():
    assert non_finite(tensor([[NAN, INF], [-INF, 0.0]]), view("attn_norm")) == 3


# Slices


def test_no_error_is_no_excess():
    b = random(5, 4)
    found = worst(b, b)
    assert (found.excess, found.rel_l2, found.axis, found.index) == (0.0, 0.0, "all", None)


@pytest.mark.parametrize(("factor", "beyond"), [(0.9, False), (1.1, True)])
def test_excess_is_the_error_in_units_of_the_tolerance(factor, beyond):
    b = random(5, 4).double()
    found = judge(
        b * (1 + factor * TOLERANCE), Reference(b, lambda: b * 0), view("attn_norm"), of(TOLERANCE)
    )
    assert found.excess == pytest.approx(factor, rel=1e-6)
    assert (found.excess > 1) is beyond
    assert found.rel_l2 == pytest.approx(factor * TOLERANCE, rel=1e-6)
    assert found.tolerance == pytest.approx(TOLERANCE)


def test_an_error_of_all_tokens_hides_behind_a_sink_and_is_found_by_the_token():
    b = random(8, 64)
    b[0] *= 1000
    a = b.clone()
    a[1:] *= 1.03
    assert measure(a, b, view("attn_out")).rel_l2 < 1e-4
    assert measure(a, b, view("attn_out")).cosine > 1 - 1e-8
    found = worst(a, b, tolerance=1e-3)
    assert found.axis == "token"
    assert found.index != 0
    assert found.rel_l2 == pytest.approx(0.03, rel=1e-3)


def test_one_bad_channel_is_found():
    b = random(16, 64)
    b[:, 5] *= 1e-3
    a = b.clone()
    a[:, 5] *= 1.5
    found = worst(a, b, "attn_out")
    assert (found.axis, found.index) == ("channel", 5)
    assert found.rel_l2 == pytest.approx(0.5, rel=1e-4)


def test_one_bad_head_is_found():
    b = random(6, 4)
    b[:, 2:] *= 1e-3
    a = b.clone()
    a[:, 2:] *= 1.5
    found = worst(a, b, "q_post_rope")
    assert (found.axis, found.index) == ("head", 1)


def test_one_bad_head_of_the_scores_is_found():
    b = random(2, 4, 4)
    b[1] *= 1e-4
    a = b.clone()
    a[1] *= 1.5
    found = worst(a, b, "attn_scores", tokens=4)
    assert (found.axis, found.index) == ("head", 1)


@pytest.mark.parametrize(
    ("part", "channels"), [(0, slice(0, 4)), (1, slice(4, 6)), (2, slice(6, 8))]
)
def test_q_k_and_v_are_judged_apart(part, channels):
    b = random(6, 8)
    b[:, channels] *= 1e-3
    a = b.clone()
    noise = random(6, 8, seed=1) * 1e-3
    a[:, channels] += noise[:, channels] * 1e-3
    by_part = view("qkv_matmul").parts()
    assert by_part[part] == ("qkv"[part], channels)
    along_parts = View(replace(STAGES["qkv_matmul"], slices=("part",)), FACTS)
    found = judge(a, Reference(b.double(), lambda: b.double() * 0), along_parts, of(TOLERANCE))
    assert (found.axis, found.index) == ("part", part)


def test_one_bad_logit_is_found():
    b = tensor([100.0, 50.0, 0.01, 30.0, 20.0])
    a = b.clone()
    a[2] = 0.011
    found = worst(a, b, "lm_head")
    assert (found.axis, found.index) == ("channel", 2)
    assert found.rel_l2 == pytest.approx(0.1, rel=1e-4)


def test_a_whole_that_is_off_everywhere_is_told_as_some_slice_of_full_size():
    b = random(8, 4)
    found = worst(b * 2, b)
    assert found.rel_l2 == pytest.approx(1.0)
    assert found.excess == pytest.approx(1 / TOLERANCE)


def test_cancellation_is_tolerated_as_far_as_the_response_says():
    terms = 1e4
    b = tensor([[1e-3, 1.0, 1.0, 1.0]])  # channel 0: a small difference of large terms
    a = b.clone()
    a[0, 0] += terms * FLOAT32_ULP
    response = torch.tensor([[terms, 1.0, 1.0, 1.0]]).double() * FLOAT32_ULP
    assert worst(a, b).excess > 1
    assert worst(a, b, response=response).excess < 1


def test_a_small_response_does_not_tighten_the_tolerance():
    b = random(4, 4)
    a = b * (1 + 5e-6)
    assert worst(a, b, response=torch.full((4, 4), 1e-30).double()).excess < 1


@pytest.mark.parametrize("flushed", [0.0, 1e-40, -1e-40])
def test_denormals_are_no_error(flushed):
    b = torch.full((2, 4), 1e-39)
    a = torch.full((2, 4), flushed)
    assert worst(a, b).excess < 1


def test_a_value_where_zero_should_be_is_an_error():
    found = worst(tensor([[1e-3, 0.0]]), tensor([[0.0, 0.0]]))
    assert found.excess > 1
    assert found.rel_l2 == INF


@pytest.mark.parametrize("side", ["model", "replay", "response"])
def test_rows_that_are_not_finite_are_left_out_of_slices(side):
    b, response = random(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    a = b.clone()
    a[1] += 1  # hidden by the NaN beside it
    {"model": a, "replay": b, "response": response}[side][1, 2] = NAN
    assert worst(a, b, response=response).excess == 0
    a[2] *= 2
    assert worst(a, b, response=response).excess > 1


def test_nothing_finite_is_no_slice():
    assert worst(torch.full((2, 4), NAN), random(2, 4)) is None


# Properties

SEEDS = st.integers(0, 10_000)
SHAPES = st.sampled_from(
    [("attn_norm", (3, 4)), ("q_post_rope", (3, 4)), ("attn_scores", (2, 3, 3)), ("lm_head", (5,))]
)
SCALES = st.sampled_from([2.0**k for k in (-60, -20, -1, 0, 3, 50)])


def near(shape, seed):
    b = random(*shape, seed=seed)
    return b + 1e-3 * random(*shape, seed=seed + 1), b


@QUICK
@given(SHAPES, SEEDS, SCALES)
def test_relative_metrics_do_not_see_a_common_scale(kind, seed, scale):
    stage, shape = kind
    a, b = near(shape, seed)
    m, n = measure(a, b, view(stage, 3)), measure(a * scale, b * scale, view(stage, 3))
    for name in ("cosine", "rel_l2", "slope", "norm_ratio", "sqnr_db"):
        assert getattr(n, name) == pytest.approx(getattr(m, name), rel=1e-9), name
    assert n.max_abs == pytest.approx(m.max_abs * scale)
    assert n.max_abs_at == m.max_abs_at


@QUICK
@given(SHAPES, SEEDS, SCALES)
def test_the_worst_slice_does_not_see_a_common_scale(kind, seed, scale):
    stage, shape = kind
    a, b = near(shape, seed)
    found, again = worst(a, b, stage, tokens=3), worst(a * scale, b * scale, stage, tokens=3)
    assert (again.axis, again.index) == (found.axis, found.index)
    assert again.excess == pytest.approx(found.excess, rel=1e-9)


@QUICK
@given(SHAPES, SEEDS)
def test_cosine_is_within_bounds_and_symmetric(kind, seed):
    stage, shape = kind
    a, b = random(*shape, seed=seed), random(*shape, seed=seed + 1)
    m, n = measure(a, b, view(stage, 3)), measure(b, a, view(stage, 3))
    assert abs(m.cosine) <= 1 + 1e-15
    assert m.cosine == pytest.approx(n.cosine, rel=1e-12)
    assert m.norm_ratio == pytest.approx(1 / n.norm_ratio)
    assert m.max_abs == n.max_abs


@QUICK
@given(SEEDS, st.permutations(range(6)))
def test_the_order_of_tokens_does_not_change_the_size_of_an_error(seed, order):
    a, b = near((6, 4), seed)
    m, n = measure(a, b, view("attn_norm")), measure(a[order], b[order], view("attn_norm"))
    assert n.rel_l2 == pytest.approx(m.rel_l2, rel=1e-12)
    assert order[n.worst_token[0]] == m.worst_token[0]
    assert order[n.max_abs_at["token"]] == m.max_abs_at["token"]
    found, again = worst(a, b), worst(a[order], b[order])
    assert again.axis == found.axis
    assert again.excess == pytest.approx(found.excess, rel=1e-12)
    if found.axis == "token":
        assert order[again.index] == found.index


@QUICK
@given(SEEDS, st.integers(0, 7), st.integers(0, 3))
def test_one_wrong_element_is_found_where_it_is(seed, token, channel):
    b = random(8, 4, seed=seed)
    a = b.clone()
    a[token, channel] += 1
    found = worst(a, b)
    assert found.excess > 1
    assert measure(a, b, view("attn_norm")).max_abs_at == {"token": token, "channel": channel}
    assert found.index == {"token": token, "channel": channel, "all": None}[found.axis]
