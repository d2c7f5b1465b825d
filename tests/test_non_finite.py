"""Values that are no numbers: an origin only where all that the stage reads is finite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from faults.corpus import Fault
from faults.engines import ARITHMETICS, Hiding
from harness import TOKENS, Changed, builtin, checked, faulty, fixture_pair, origins_of, verdict_of

from pytest_aprt.stages import Point
from pytest_aprt.weights import HfWeights

BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


def filled(value, first=0):
    """A change of captures: every stage from a layer on holds one value alone."""

    def change(layer, stages):
        if layer is not None and layer < first:
            return stages
        return {name: np.full_like(np.asarray(found), value) for name, found in stages.items()}

    return change


def statuses(verdict):
    return {str(judged.point): judged.status for judged in verdict.points}


@pytest.mark.parametrize("value", BAD)
def test_an_engine_of_nothing_else(pair, value):
    """The embedding reads token ids alone, so it is the origin, and all else follows from it."""
    engine = Changed(builtin(pair), filled(value))
    verdict = verdict_of(pair, checked(pair, engine))
    assert verdict.status == "DIVERGED" and "first at L00-embedding" in verdict.summary
    assert origins_of(verdict) == ["L00-embedding"]
    assert set(statuses(verdict).values()) == {"diverged", "inherited"}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("first", [1, 3])
def test_from_a_layer_on(pair, value, first):
    verdict = verdict_of(pair, checked(pair, Changed(builtin(pair), filled(value, first))))
    assert origins_of(verdict) == [f"L{first:02d}-attn_norm"]
    found = statuses(verdict)
    for judged in verdict.points:
        layer = judged.point.layer
        if layer is not None and layer < first:
            assert judged.status in ("pass", "noise")
        elif judged not in verdict.origins:
            assert judged.status == "inherited", judged.point
            assert judged.follows == f"L{first:02d}-attn_norm"
    assert found["lm_head"] == "inherited"
    (origin,) = verdict.origins
    assert origin.errors.born_non_finite == len(TOKENS) * pair.oracle_facts.hidden


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("arithmetic", ["float32", "q8_k", "bfloat16"])
@pytest.mark.parametrize("stage", ["qkv_matmul", "attn_softmax", "ffn_swigl", "post_ffn_residual"])
def test_born_in_a_stage_and_carried_on(pair, stage, arithmetic, value):
    fault = Fault(name="", like="", layer=1, changes={stage: lambda v, w: np.full_like(v, value)})
    verdict = verdict_of(pair, faulty(pair, fault, **ARITHMETICS[arithmetic]))
    assert origins_of(verdict) == [f"L01-{stage}"]
    assert verdict.status == "DIVERGED" and "non-finite" in verdict.summary


def test_one_row_and_a_fault_in_another(pair):
    """Rows that are finite on both sides are compared, so a second fault is found beside it."""

    def overflow(value, work):
        value[2] = np.inf
        return value

    def off(value, work):
        value[5:] *= 1.01
        return value

    fault = Fault(name="", like="", layer=2, changes={"ffn_gate": overflow, "ffn_up": off})
    verdict = verdict_of(pair, faulty(pair, fault))
    assert origins_of(verdict) == ["L02-ffn_gate", "L02-ffn_up"]


def test_behind_missing_stages(pair):
    fault = Fault(name="", like="", layer=1,
                  changes={"ffn_gate": lambda v, w: np.full_like(v, np.nan)})  # fmt: skip
    hiding = Hiding(faulty(pair, fault), lambda layer, name: name not in ("ffn_gate", "ffn_silu"))
    verdict = verdict_of(pair, checked(pair, hiding))
    assert origins_of(verdict) == ["L01-ffn_swigl"]
    assert Point(1, "ffn_gate") in verdict.origins[0].errors.bracket


def test_unseen_scores_count_for_nothing(pair):
    """Engines leave what the mask hides as 0, -inf, NaN or raw values."""
    unseen = ~np.tril(np.ones((len(TOKENS), len(TOKENS)), bool))
    for value in (0.0, *BAD, 1e30):

        def change(layer, stages, value=value):
            if layer is None:
                return stages
            scores = np.where(unseen, np.float32(value), np.asarray(stages["attn_scores"]))
            return stages | {"attn_scores": scores}

        verdict = verdict_of(pair, checked(pair, Changed(builtin(pair), change)))
        assert verdict.status == "QUANTISATION_NOISE", (value, verdict.summary)


class Poisoned(HfWeights):
    """An oracle's weights with one value in them that is no number."""

    def __init__(self, pair):
        super().__init__(pair.oracle, pair.architecture, pair.oracle_facts)
        plain = self.layer

        def layer(index):
            found = {name: tensor.clone() for name, tensor in plain(index).items()}
            if index == 1:
                found["mlp.up_proj.weight"][3, 4] = torch.nan
            return found

        self.layer = layer


def test_in_the_oracle(pair):
    """A broken oracle is no fault of the engine: nothing is blamed on it."""
    verdict = verdict_of(replace(pair, oracle_weights=Poisoned(pair)), builtin(pair))
    assert origins_of(verdict) == []
    assert verdict.status == "DIVERGED" and verdict.rung == "weights"
    assert "blk.1.ffn_up.weight" in verdict.summary and "non-finite" in verdict.summary
    by_point = {str(judged.point): judged for judged in verdict.points}
    assert by_point["L01-ffn_up"].errors.total.non_finite_b == len(TOKENS)
    assert by_point["L01-ffn_gate"].status in ("pass", "noise")
    assert by_point["L03-ffn_up"].status in ("pass", "noise", "inherited")
