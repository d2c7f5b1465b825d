"""Stages that an engine does not expose are bridged, and what is born in them lies in a bracket."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from faults.corpus import FAULTS
from faults.engines import SUBSETS, Hiding
from faults.score import UNSEEN_FROM_OUTSIDE, exposed
from harness import TOKENS, builtin, checked, faulty, fixture_pair, verdict_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_aprt.arithmetic import EXACT, PROFILES
from pytest_aprt.bridges import BridgedReplay
from pytest_aprt.capture import LayerStages
from pytest_aprt.consensus import Tally
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.stages import Point
from pytest_aprt.views import View


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


@pytest.fixture(scope="module")
def layers(pair):
    return [LayerStages(*item) for item in builtin(pair).layers(TOKENS)]


def entered(pair, layers, shown=lambda layer, name: True):
    """Yield the replay of each layer of a run of which some stages are shown."""
    prelude = TransformersRunner(pair.config, pair.model_weights).prelude(TOKENS)
    found = BridgedReplay(pair, TOKENS, prelude, PROFILES["float32"], Tally())
    for layer, stages in layers:
        found.enter(LayerStages(layer, {n: v for n, v in stages.items() if shown(layer, n)}))
        yield layer, found


def off(found, point, stages):
    right = stages[point.stage].double()
    return float((found.reference(point).value - right).norm() / right.norm())


def names(points):
    return [str(point) for point in points]


def test_where_all_is_captured_nothing_is_bridged(pair, layers):
    for (layer, found), (_, stages) in zip(entered(pair, layers), layers, strict=True):
        for stage in pair.graph.of_layer(layer):
            if stage.name in ("attn_scores", "lm_head"):
                continue  # compared where they count, by view, elsewhere
            point = Point(layer, stage.name)
            assert found.bracket(point) == ()
            assert off(found, point, stages) < 1e-6


def test_a_bridge_leads_from_the_nearest_captured_ancestors(pair, layers):
    hidden = ("q_post_rope", "attn_scores", "ffn_gate", "ffn_silu")
    for layer, found in entered(pair, layers, lambda layer, name: name not in hidden):
        if layer is None:
            continue
        at = f"L{layer:02d}-"
        assert names(found.bracket(Point(layer, "attn_softmax"))) == [
            at + "q_post_rope",
            at + "attn_scores",
        ]
        assert names(found.bracket(Point(layer, "ffn_swigl"))) == [at + "ffn_gate", at + "ffn_silu"]
        assert found.bracket(Point(layer, "attn_out")) == ()
        for stage in ("attn_softmax", "ffn_swigl"):
            assert off(found, Point(layer, stage), layers[layer].stages) < 1e-6


def test_a_bridge_spans_layers(pair, layers):
    def shown(layer, name):
        return layer in (0, None) or (layer, name) == (2, "ffn_norm")

    runs = entered(pair, layers, shown)
    for _ in range(3):
        _, found = next(runs)
    bracket = found.bracket(Point(2, "ffn_norm"))
    assert bracket[0] == Point(1, "attn_norm") and bracket[-1] == Point(2, "post_attn_residual")
    assert len(bracket) == 17 + 10
    assert off(found, Point(2, "ffn_norm"), layers[2].stages) < 1e-6
    *_, (_, found) = runs
    bracket = found.bracket(Point(None, "final_norm"))
    assert {p.layer for p in bracket} == {1, 2, 3}, "attention needs all of layer 1 and 2"


def test_a_bridged_value_responds_more_than_a_captured_one(pair, layers):
    """What was computed on the way may be off by more than one rounding."""
    point = Point(1, "ffn_silu")
    responses = []
    for hidden in ((), ("ffn_gate",), ("ffn_gate", "ffn_norm", "post_attn_residual")):
        runs = entered(pair, layers, lambda layer, name, hidden=hidden: name not in hidden)
        next(runs)
        _, found = next(runs)
        responses.append(float(found.reference(point).response.norm()))
    assert responses[0] < responses[1] < responses[2]


def test_responses_are_formed_once_for_all_arithmetics(pair, layers):
    found = next(entered(pair, layers))[1]
    point = Point(0, "ffn_up")
    exact = found.reference(point).response
    for arithmetic in PROFILES["auto"].arithmetics(["matmul"])[1:4]:
        assert arithmetic != EXACT
        assert found.reference(point, arithmetic).response is exact
    assert found.reference(Point(0, "ffn_gate")).response is not exact


def test_a_parent_that_is_not_finite_is_told(pair, layers):
    def view_of(stage):
        mask = torch.ones(len(TOKENS), len(TOKENS), dtype=torch.bool).tril()
        return View(stage, pair.oracle_facts, mask)

    stages = dict(layers[0].stages)
    stages["ffn_gate"] = stages["ffn_gate"].clone()
    stages["ffn_gate"][2, 5] = torch.inf
    scores = stages["attn_scores"] = stages["attn_scores"].clone()
    scores[:, 0, 1:] = -torch.inf  # masked: these do not count
    _, found = next(entered(pair, [LayerStages(0, stages)]))
    assert not found.parents_finite(Point(0, "ffn_silu"), view_of)
    assert found.parents_finite(Point(0, "ffn_up"), view_of)
    assert found.parents_finite(Point(0, "attn_softmax"), view_of)
    _, found = next(entered(pair, [LayerStages(0, stages)], lambda layer, n: n != "ffn_silu"))
    assert not found.parents_finite(Point(0, "ffn_swigl"), view_of)


PLANTED = [f for f in FAULTS if f.layer == 2 and f.name not in UNSEEN_FROM_OUTSIDE]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_missing_the_origin_lies_in_its_bracket(pair, data):
    fault = data.draw(st.sampled_from([f for f in PLANTED if f.needs(pair)]))
    fault = replace(fault, layer=data.draw(st.sampled_from([0, 2, 3]) if fault.movable else
                                           st.just(2)))  # fmt: skip
    missing = data.draw(st.sets(st.sampled_from(pair.graph.points), max_size=60))

    def shown(layer, name):
        return Point(layer, name) not in missing

    verdict = verdict_of(pair, checked(pair, Hiding(faulty(pair, fault), shown)))
    expected = exposed(pair, fault, shown)
    assert {origin.point for origin in verdict.origins} >= expected
    born = {Point(fault.layer, stage) for stage in fault.changes}
    for origin in verdict.origins:
        assert born & {origin.point, *origin.errors.bracket}
        assert missing >= set(origin.errors.bracket)


@pytest.mark.parametrize("name", [n for n in SUBSETS if n.startswith("half")])
def test_a_healthy_engine_that_shows_half_of_its_stages(pair, name):
    verdict = verdict_of(pair, checked(pair, Hiding(faulty(pair), SUBSETS[name])))
    assert verdict.status == "QUANTISATION_NOISE"
    assert sum(judged.status == "missing" for judged in verdict.points) > 20
