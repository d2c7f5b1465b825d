"""From errors to statuses, origins and one verdict, on numbers made up for each rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.compare import Metrics, Slice
from pytest_aprt.measure import Measurement
from pytest_aprt.readings import PointErrors
from pytest_aprt.rungs.config import FactRow
from pytest_aprt.rungs.weights import TensorRow
from pytest_aprt.selftest import SelfTest
from pytest_aprt.stages import STAGES, Point
from pytest_aprt.statuses import STATUSES, VERDICTS
from pytest_aprt.verdict import Threshold, conclude, is_below, previous_good

GRAPH = ARCHITECTURES["qwen2"].graph(3)
THRESHOLDS = dict.fromkeys(STAGES, Threshold(cosine=0.999, source="default"))
NAN = math.nan


def metrics(cosine=1.0, **changes):
    size = math.sqrt(max(2 - 2 * cosine, 0.0)) if not math.isnan(cosine) else 1.0
    values = {
        "cosine": cosine, "rel_l2": size, "slope": cosine, "norm_ratio": 1.0, "max_abs": size,
        "max_abs_at": {"token": 0, "channel": 0}, "rms": size, "sqnr_db": 60.0, "non_finite_a": 0,
        "non_finite_b": 0, "worst_token": (0, size), "compared": 8, "top_diffs": (),
    }  # fmt: skip
    return Metrics(**{**values, **changes})


def excess(size, axis="token", index=1):
    return Slice(axis=axis, index=index, rel_l2=size * 1e-5, tolerance=1e-5, excess=size)


def point(text):
    layer, dash, stage = text.partition("-")
    return Point(int(layer[1:]), stage) if dash else Point(None, text)


def healthy(name, prompt=0):
    return PointErrors(
        point=point(name), prompt=prompt, shape=(4, 8), total=metrics(), weights=metrics(),
        engine=metrics(), local=metrics(1.0, rel_l2=2e-8), worst=excess(0.01),
    )  # fmt: skip


def origin(size=1000.0, **changes):
    return {"local": metrics(0.9), "worst": excess(size), **changes}


def below(cosine=0.9):
    """Far from the oracle and from the shadow, with no error of its own."""
    return {"engine": metrics(cosine), "total": metrics(cosine)}


def far(cosine=0.99):
    """Far from the oracle alone."""
    return {"total": metrics(cosine), "weights": metrics(cosine)}


GONE = {"missing": True, "total": None, "engine": None, "local": None, "worst": None}
BLIND = {"local": metrics(NAN, compared=0), "worst": None}
ROWLESS = {"engine": metrics(NAN, compared=0), "total": metrics(NAN, compared=0), **BLIND}


def fact(name="rope_theta", feeds=("q_post_rope", "k_post_rope"), **changes):
    row = FactRow(name=name, model=1e4, oracle=1e6, key="k", config="c", agree=False, broken=True,
                  feeds=feeds)  # fmt: skip
    return replace(row, **changes)


def tensor(name, layer, suffix, reason="1.4 from the oracle's tensor: Q4_K explains at most 0.18"):
    return TensorRow(name=name, layer=layer, suffix=suffix, type="Q4_K", shape=(8, 8), rel_l2=1.4,
                     bound=0.18, reason=reason)  # fmt: skip


def judge(
    changes=(), *, prompts=1, facts=(), tensors=(), self_tests=(), strict=False, selected=None,
    thresholds=THRESHOLDS, more=(),
):  # fmt: skip
    """Judge a healthy run in which some points (of prompt 0) are changed."""
    changes = dict(changes)
    points = list(GRAPH.points) if selected is None else [point(name) for name in selected]
    errors = [
        replace(healthy(str(p), prompt), **(changes.get(str(p), {}) if prompt == 0 else {}))
        for prompt in range(prompts)
        for p in points
    ]
    measured = Measurement(
        errors=[*errors, *more], tensors=list(tensors), self_tests=list(self_tests)
    )
    return conclude(GRAPH, points, measured, list(facts), thresholds, strict=strict)


def status(verdict, name):
    return next(p for p in verdict.points if str(p.point) == name)


def names(judged):
    return [str(p.point) for p in judged]


# The table of statuses


@pytest.mark.parametrize(
    ("changes", "expected", "outcome"),
    [
        (GONE, "missing", "skipped"),
        (ROWLESS, "inconclusive", "skipped"),
        (origin(), "diverged", "failed"),
        (origin(1.01), "diverged", "failed"),
        ({"worst": excess(0.99)}, "pass", "passed"),
        (below(), "drift", "passed"),
        (below(0.9989), "drift", "passed"),
        (far(), "noise", "passed"),
        (far(0.9991), "pass", "passed"),
        ({"total": metrics(0.999), "engine": metrics(0.999)}, "pass", "passed"),
        ({}, "pass", "passed"),
    ],
)
def test_a_point_alone(changes, expected, outcome):
    found = status(judge({"L01-attn_out": changes}), "L01-attn_out")
    assert (found.status, found.outcome) == (expected, outcome)


def test_every_status_has_an_outcome_and_only_divergence_fails():
    assert [name for name, outcome in STATUSES.items() if outcome == "failed"] == ["diverged"]
    assert list(STATUSES) == [
        "missing", "inconclusive", "diverged", "inherited", "drift", "noise", "pass",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**origin(), **GONE}, "missing"),
        ({**origin(), **below()}, "diverged"),
        ({**far(), **below()}, "inherited"),
    ],
    ids=["missing-first", "diverged-before-inherited", "inherited-before-noise"],
)
def test_the_first_row_that_fits_decides(changes, expected):
    verdict = judge({"L00-attn_out": origin(), "L02-ffn_out": changes})
    assert status(verdict, "L02-ffn_out").status == expected


def test_a_point_that_the_run_never_reached_is_inconclusive():
    measured = Measurement(errors=[healthy("L00-embedding")])
    points = [point("L00-embedding"), point("L00-attn_norm")]
    verdict = conclude(GRAPH, points, measured, [], THRESHOLDS)
    found = verdict.points[1]
    assert (found.status, found.outcome) == ("inconclusive", "skipped")
    assert found.reason == "the run ended before this point"


@pytest.mark.parametrize("changes", [GONE, ROWLESS])
def test_what_is_skipped_gives_a_reason(changes):
    assert status(judge({"L01-attn_out": changes}), "L01-attn_out").reason


def test_thresholds_are_those_of_the_stage():
    own = {**THRESHOLDS, "attn_out": Threshold(cosine=0.9, source="--aprt-threshold=attn_out")}
    verdict = judge({"L01-attn_out": far(0.95), "L01-ffn_out": far(0.95)}, thresholds=own)
    assert status(verdict, "L01-attn_out").status == "pass"
    assert status(verdict, "L01-attn_out").threshold.source == "--aprt-threshold=attn_out"
    assert status(verdict, "L01-ffn_out").status == "noise"


# Origins


def test_the_first_divergence_is_the_first_origin_in_computation_order():
    verdict = judge({"L02-ffn_out": origin(5000), "L01-k_post_rope": origin(2)})
    assert str(verdict.first_divergence.point) == "L01-k_post_rope"
    assert names(verdict.origins) == ["L01-k_post_rope", "L02-ffn_out"]
    assert (verdict.status, verdict.rung) == ("DIVERGED", "stages")


def test_what_follows_an_origin_names_it():
    verdict = judge({"L01-q_post_rope": origin(), "L01-attn_scores": below(), "lm_head": below()})
    for name in ("L01-attn_scores", "lm_head"):
        found = status(verdict, name)
        assert (found.status, found.outcome) == ("inherited", "xfailed")
        assert found.follows == "L01-q_post_rope"
        assert "L01-q_post_rope" in found.reason


def test_two_independent_bugs_are_both_origins():
    verdict = judge({
        "L00-ffn_out": origin(), "L01-attn_norm": below(), "L02-attn_out": origin() | below(),
        "lm_head": below(),
    })  # fmt: skip
    assert names(verdict.origins) == ["L00-ffn_out", "L02-attn_out"]
    assert status(verdict, "lm_head").follows == "L00-ffn_out"


def test_siblings_do_not_explain_each_other():
    verdict = judge({"L01-ffn_gate": origin(), "L01-ffn_up": below()})
    assert names(verdict.origins) == ["L01-ffn_gate"]
    assert status(verdict, "L01-ffn_up").status == "drift"
    both = judge({"L01-ffn_gate": origin(), "L01-ffn_up": origin()})
    assert names(both.origins) == ["L01-ffn_gate", "L01-ffn_up"]


def test_an_origin_downstream_explains_nothing():
    verdict = judge({"L01-attn_norm": below(), "L01-attn_out": origin()})
    assert status(verdict, "L01-attn_norm").status == "drift"


def test_noise_beside_an_origin_upstream_stays_noise_where_the_engine_is_fine():
    verdict = judge({"L00-attn_out": origin(2), "L02-ffn_out": far()})
    assert status(verdict, "L02-ffn_out").status == "noise"


def test_noise_before_the_origin_is_noise():
    verdict = judge({"L00-attn_norm": far(), "L01-attn_out": origin()})
    assert status(verdict, "L00-attn_norm").status == "noise"


def test_an_origin_has_a_hint():
    doubled = metrics(1.0, slope=2.0, norm_ratio=2.0, rel_l2=1.0)
    verdict = judge({"L01-attn_out": origin(local=doubled), "L02-q_post_rope": origin()})
    assert "missing or doubled factor" in status(verdict, "L01-attn_out").hint
    assert "rotary embedding" in status(verdict, "L02-q_post_rope").hint
    assert status(verdict, "L00-attn_out").hint is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"born_non_finite": 3}, "overflow"),
        ({"local": metrics(NAN, norm_ratio=0.0)}, "all zero"),
        ({"local": metrics(-1.0)}, "sign is turned"),
        ({"worst": excess(1e5, "channel"), "local": metrics(0.9999)}, "one output channel"),
        ({"worst": excess(1e5, "head"), "local": metrics(0.9999)}, "one head is wrong"),
        ({"worst": excess(1e5, "token"), "local": metrics(0.9999)}, "one token is wrong"),
        ({"worst": excess(1e5, "part"), "local": metrics(0.9999)}, "one of Q, K and V"),
        ({}, "the weight as the engine reads it"),
    ],
)
def test_hints_follow_the_signature(changes, said):
    verdict = judge({"L01-attn_out": origin() | changes})
    assert said in verdict.origins[0].hint


# The bracket of a missing stage


def test_an_origin_behind_a_missing_stage_keeps_its_bracket():
    bracket = (point("L02-q_post_rope"), point("L02-attn_scores"))
    verdict = judge({
        "L02-q_post_rope": GONE, "L02-attn_scores": GONE,
        "L02-attn_softmax": origin(bracket=bracket), "L02-attention": below(),
    })  # fmt: skip
    assert names(verdict.origins) == ["L02-attn_softmax"]
    assert verdict.origins[0].errors.bracket == bracket
    assert status(verdict, "L02-attn_scores").status == "missing"
    assert status(verdict, "L02-attention").follows == "L02-attn_softmax"


def test_previous_good_is_the_nearest_captured_ancestor_that_is_no_origin():
    changes = {
        "L02-qkv_matmul": origin(), "L02-qkv_bias": GONE, "L02-k_post_rope": {},
        "L02-q_post_rope": origin(),
    }  # fmt: skip
    verdict = judge(changes)
    by_point = {p.point: [p.errors] for p in verdict.points}
    rope = status(verdict, "L02-q_post_rope")
    assert str(previous_good(rope, GRAPH, by_point).point) == "L02-attn_norm"
    assert previous_good(status(verdict, "L00-embedding"), GRAPH, by_point) is None


# Non-finite values


def test_non_finite_values_born_of_finite_inputs_are_an_origin():
    verdict = judge({"L01-attn_softmax": {**ROWLESS, "born_non_finite": 7}})
    assert names(verdict.origins) == ["L01-attn_softmax"]
    assert "7 non-finite values, all inputs are finite" in verdict.summary


def test_non_finite_values_that_were_handed_down_are_inherited():
    spread = {"engine": metrics(NAN, compared=0, non_finite_a=9), **BLIND}
    verdict = judge({
        "L01-attn_softmax": {"born_non_finite": 7}, "L01-attention": spread, "lm_head": spread,
    })  # fmt: skip
    assert names(verdict.origins) == ["L01-attn_softmax"]
    assert status(verdict, "lm_head").status == "inherited"
    assert status(verdict, "lm_head").follows == "L01-attn_softmax"


def test_finite_rows_are_still_compared_beside_handed_down_nan():
    beside = {**origin(), "engine": metrics(0.9, non_finite_a=4)}
    verdict = judge({"L01-attn_softmax": {"born_non_finite": 4}, "L01-attn_out": beside})
    assert names(verdict.origins) == ["L01-attn_softmax", "L01-attn_out"]


def test_non_finite_values_from_nowhere_never_pass():
    spread = {"engine": metrics(NAN, compared=0, non_finite_a=9), **BLIND}
    found = status(judge({"lm_head": spread}), "lm_head")
    assert found.outcome != "passed"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cosine": 0.9}, True),
        ({"cosine": 0.999}, False),
        ({"cosine": NAN, "rel_l2": math.inf}, True),  # a value where zero should be
        ({"cosine": NAN, "rel_l2": 1.0}, True),  # zero where a value should be
        ({"cosine": NAN, "rel_l2": 0.0}, False),  # zero on both sides
        ({"non_finite_a": 1}, True),
        ({"non_finite_a": 1, "non_finite_b": 1}, False),
        ({"non_finite_b": 1}, False),
        ({"cosine": NAN, "rel_l2": NAN, "compared": 0}, False),
    ],
)
def test_is_below(changes, expected):
    assert is_below(metrics(**changes), 0.999) is expected


# Facts and tensors


def test_a_broken_fact_is_the_rung_and_explains_what_it_feeds():
    verdict = judge(
        {"L00-q_post_rope": origin() | below(), "L00-attn_scores": below(), "lm_head": below()},
        facts=[fact()],
    )
    assert (verdict.status, verdict.rung) == ("DIVERGED", "config")
    assert verdict.origins == []
    assert verdict.first_divergence is None
    for name in ("L00-q_post_rope", "L00-attn_scores", "lm_head"):
        assert status(verdict, name).follows == "config-rope_theta"
    assert verdict.summary == (
        "DIVERGED: config rope_theta is 10000.0 in the model, 1000000.0 in the oracle"
    )


def test_a_bug_beside_a_broken_fact_is_found_too():
    verdict = judge({"L01-ffn_up": origin()}, facts=[fact(), fact("norm_eps", ("attn_norm",))])
    assert (verdict.rung, names(verdict.origins)) == ("config", ["L01-ffn_up"])
    assert verdict.summary.endswith("; 1 further fact; and 1 origin, first L01-ffn_up")


def test_a_fact_that_differs_without_effect_breaks_nothing():
    verdict = judge(facts=[fact("context_length", broken=False)])
    assert (verdict.status, verdict.rung) == ("PARITY", None)


def test_a_broken_tensor_is_the_rung_and_explains_the_distance():
    bad = tensor("blk.1.attn_q.weight", 1, "self_attn.q_proj.weight")
    verdict = judge(
        {"L00-ffn_out": far(), "L01-qkv_matmul": far(), "L02-ffn_out": far(), "lm_head": far()},
        tensors=[bad],
    )
    assert (verdict.status, verdict.rung) == ("DIVERGED", "weights")
    assert verdict.first_divergence is None
    assert status(verdict, "L00-ffn_out").status == "noise"
    for name in ("L01-qkv_matmul", "L02-ffn_out", "lm_head"):
        found = status(verdict, name)
        assert (found.status, found.follows) == ("inherited", "weights-blk.1.attn_q.weight")
    assert verdict.summary == (
        "DIVERGED: weights blk.1.attn_q.weight 1.4 from the oracle's tensor: Q4_K explains at most "
        "0.18"
    )


def test_a_broken_tensor_does_not_explain_an_error_of_the_engine():
    bad = tensor("blk.1.attn_q.weight", 1, "self_attn.q_proj.weight")
    verdict = judge({"L01-attn_out": origin() | below()}, tensors=[bad])
    assert (verdict.rung, names(verdict.origins)) == ("weights", ["L01-attn_out"])
    assert verdict.summary.endswith("; and 1 origin, first L01-attn_out")


@pytest.mark.parametrize(
    ("row", "untouched", "touched"),
    [
        (tensor("token_embd.weight", None, "model.embed_tokens.weight"), None, "L00-embedding"),
        (tensor("output_norm.weight", None, "model.norm.weight"), "L02-ffn_out", "final_norm"),
        (tensor("output.weight", None, "lm_head.weight"), "final_norm", "lm_head"),
        (tensor("blk.0.strange.weight", None, "", "no such tensor"), None, "L00-embedding"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_broken_tensor_enters_at_the_stage_that_reads_it(row, untouched, touched):
    verdict = judge({name: far() for name in (untouched, touched) if name}, tensors=[row])
    assert status(verdict, touched).follows == f"weights-{row.name}"
    assert untouched is None or status(verdict, untouched).status == "noise"


def test_config_comes_before_weights_and_weights_before_stages():
    bad = tensor("output.weight", None, "lm_head.weight")
    changes = {"L00-attn_out": origin()}
    assert judge(changes, facts=[fact()], tensors=[bad]).rung == "config"
    assert judge(changes, tensors=[bad]).rung == "weights"
    assert judge(changes).rung == "stages"


# Strict


def test_strict_fails_what_the_weights_explain():
    changes = {"L01-attn_out": far(), "L01-ffn_out": below()}
    for name in changes:
        found = status(judge(changes, strict=True), name)
        assert found.outcome == "failed"
        assert found.reason.startswith("--aprt-strict: total below its threshold; ")
        assert status(judge(changes), name).outcome == "passed"


def test_strict_fails_what_is_inherited():
    changes = {"L01-attn_out": origin(), "L01-ffn_out": below()}
    assert status(judge(changes, strict=True), "L01-ffn_out").outcome == "failed"


@pytest.mark.parametrize("changes", [{}, far(0.9991), GONE, ROWLESS])
def test_strict_leaves_the_rest_alone(changes):
    name = "L01-attn_out"
    strict, plain = (status(judge({name: changes}, strict=s), name) for s in (True, False))
    assert (strict.outcome, strict.reason) == (plain.outcome, plain.reason)


def test_strict_looks_at_every_prompt():
    first, second = healthy("L00-embedding"), replace(healthy("L00-embedding", 1), **far(0.9))
    measured = Measurement(errors=[first, second])
    points = [point("L00-embedding")]
    (found,) = conclude(GRAPH, points, measured, [], THRESHOLDS, strict=True).points
    assert (found.outcome, found.errors.prompt) == ("failed", 1)


# Prompts


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_point_takes_the_prompt_where_it_is_worst(order):
    bad, good = order
    runs = {bad: origin(), good: far()}
    errors = [replace(healthy("L00-embedding", p), **runs[p]) for p in (0, 1)]
    points = [point("L00-embedding")]
    (found,) = conclude(GRAPH, points, Measurement(errors=errors), [], THRESHOLDS).points
    assert (found.status, found.errors.prompt) == ("diverged", bad)


@pytest.mark.parametrize("worse", [0, 1])
def test_of_two_diverged_prompts_the_larger_excess_is_shown(worse):
    sizes = {worse: 900.0, 1 - worse: 3.0}
    errors = [replace(healthy("L00-embedding", p), **origin(sizes[p])) for p in (0, 1)]
    points = [point("L00-embedding")]
    (found,) = conclude(GRAPH, points, Measurement(errors=errors), [], THRESHOLDS).points
    assert found.errors.prompt == worse


def test_a_prompt_that_is_judged_beats_one_that_is_not():
    blind = replace(healthy("L00-embedding", 1), **ROWLESS)
    measured = Measurement(errors=[blind, healthy("L00-embedding")])
    (found,) = conclude(GRAPH, [point("L00-embedding")], measured, [], THRESHOLDS).points
    assert found.status == "pass"


# The verdict of a run


def test_parity():
    verdict = judge({"L01-attn_out": {"total": metrics(0.99925)}})
    assert (verdict.status, verdict.rung, verdict.origins) == ("PARITY", None, [])
    assert verdict.summary == (
        "PARITY: all 54 points agree (lowest cosine 0.999250 at L01-attn_out)"
    )


def test_quantisation_noise():
    verdict = judge({"L01-attn_out": far(0.985), "L02-ffn_out": far(), "lm_head": below(0.995)})
    assert (verdict.status, verdict.rung) == ("QUANTISATION_NOISE", None)
    assert verdict.summary == (
        "QUANTISATION_NOISE: no stage adds error of its own; the weights explain the distance "
        "(lowest cosine 0.9850 at L01-attn_out; 2 points in noise, 1 in drift)"
    )


def test_diverged_says_where_how_much_and_what_was_good():
    verdict = judge({"L02-q_post_rope": origin(), "L02-k_post_rope": origin()})
    assert verdict.summary == (
        "DIVERGED: first at L02-q_post_rope (rel_l2 0.01 at token 1, tolerance 1e-05; L02-qkv_bias "
        "was 2e-08); 1 further origin: L02-k_post_rope"
    )


def test_many_origins_are_counted_and_some_named():
    verdict = judge(
        {f"L0{layer}-{s}": origin() for layer in range(3) for s in ("ffn_up", "qkv_bias")}
    )
    assert "; 5 further origins: L00-ffn_up, L01-qkv_bias, L01-ffn_up, ..." in verdict.summary


def test_a_failed_self_test_is_inconclusive_whatever_was_found():
    tests = [SelfTest(name="tokens", passed=True, detail="fine"),
             SelfTest(name="repeat", passed=False, detail="it differs")]  # fmt: skip
    verdict = judge({"L01-attn_out": origin()}, self_tests=tests, facts=[fact()])
    assert (verdict.status, verdict.rung) == ("INCONCLUSIVE", "self-test")
    assert verdict.summary == "INCONCLUSIVE: the self-test 'repeat' failed: it differs"


@pytest.mark.parametrize("changes", [GONE, ROWLESS])
def test_zero_judged_points_are_inconclusive(changes):
    verdict = judge({"L00-embedding": changes}, selected=["L00-embedding"])
    assert (verdict.status, verdict.rung) == ("INCONCLUSIVE", "stages")
    assert verdict.summary.startswith("INCONCLUSIVE: no point could be judged: ")
    assert judge(selected=[]).status == "INCONCLUSIVE"


def test_single_unjudged_points_do_not_change_the_verdict():
    verdict = judge({"L01-attn_out": GONE, "L01-ffn_out": ROWLESS})
    assert verdict.status == "PARITY"
    assert "all 52 points agree" in verdict.summary


def test_the_gate_stops_the_last_two():
    assert VERDICTS == {
        "PARITY": True, "QUANTISATION_NOISE": True, "DIVERGED": False, "INCONCLUSIVE": False,
    }  # fmt: skip
