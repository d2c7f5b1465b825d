"""Runs in which `total` alone can be measured: dumps without weights, oracles that are dumps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from harness import TOKENS, builtin, checked, fixture_pair
from test_dumps import dump, foreign

from pytest_aprt.capture import LayerStages
from pytest_aprt.errors import ArchitectureError, SettingsError, SourceError
from pytest_aprt.facts import Facts
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.settings import read_settings
from pytest_aprt.sides import open_sides
from pytest_aprt.sources.aprt import DumpFolder
from pytest_aprt.testing import NumpyEngine
from pytest_aprt.totals import run_totals


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


@pytest.fixture(scope="module")
def oracle(pair):
    return TransformersRunner(pair.config, pair.oracle_weights)


def with_oracle_weights(pair, changes=None):
    """An engine that agrees with the oracle up to rounding, apart from what is changed."""
    engine = NumpyEngine(pair.oracle_weights, pair.oracle_facts, pair.architecture, changes or {})
    return checked(pair, engine)


def oracle_dump(pair, oracle, folder, *prompts):
    fields = {"oracle": {"config": pair.oracle.config}}
    return dump(oracle, folder, *prompts, side="oracle", fields=fields)


def report_of(model, oracle, tokens=TOKENS, **options):
    asked = {"aprt_tokens": [",".join(map(str, tokens))]} if tokens else {}
    asked |= {"aprt_model": str(model), "aprt_oracle": str(oracle), **options}
    settings = read_settings(asked.get, command="")
    assert not settings.has_shadow
    return run_totals(open_sides(settings), settings, None, lambda what, done, total: None)


def point(report, name):
    return next(p for p in report["points"] if p["point"] == name)


def test_a_dump_without_weights_that_agrees(pair, tmp_path):
    folder = dump(with_oracle_weights(pair), tmp_path)
    report = report_of(folder, pair.oracle.path)
    assert report["verdict"]["summary"].startswith("PARITY: all 71 points agree on total alone")
    assert {p["status"] for p in report["points"]} == {"pass"}
    assert all(p[e] is None for p in report["points"] for e in ("weights", "engine", "local"))
    assert [t["name"] for t in report["self_test"]] == [
        "tokens", "capture", "layers", "repeat", "hooks", "canary"]  # fmt: skip
    assert all(t["passed"] for t in report["self_test"])
    assert "total alone was judged: without --aprt-weights" in report["notes"][0]
    ladder = report["ladder"]
    assert ladder["config"] == ladder["weights"] == []
    for rung in ("tokens", "decode", "path"):
        assert {row["status"] for row in ladder[rung]} == {"unavailable"}
    assert [row["status"] for row in ladder["logits"]] == ["pass", "unavailable"]


def test_a_distance_that_weights_may_explain_is_left_open(pair, tmp_path):
    report = report_of(dump(builtin(pair), tmp_path), pair.oracle.path)
    verdict = report["verdict"]
    assert (verdict["status"], verdict["rung"]) == ("INCONCLUSIVE", "stages")
    assert verdict["origins"] == [] and verdict["first_divergence"] is None
    assert "of 71 points, first at L00-embedding (cosine 0.997" in verdict["summary"]
    assert "quantised weights and a fault cannot be told apart" in verdict["summary"]
    left_open = [p for p in report["points"] if p["status"] == "inconclusive"]
    assert len(left_open) > 50 and {p["outcome"] for p in left_open} == {"skipped"}


def test_strict_fails_what_is_beyond_its_threshold(pair, tmp_path):
    report = report_of(dump(builtin(pair), tmp_path), pair.oracle.path, aprt_strict=True)
    assert report["verdict"]["status"] == "INCONCLUSIVE"
    for p in report["points"]:
        below = p["total"]["cosine"] < 0.999
        assert (p["outcome"] == "failed") == below
    assert sum(p["outcome"] == "failed" for p in report["points"]) > 50


@pytest.mark.parametrize("factor", [1.2, 0.9])
def test_a_wrong_length_is_no_parity(pair, tmp_path, factor):
    """Cosine is blind to it."""
    changes = {(2, "attention"): lambda value, work: value * factor}
    report = report_of(dump(with_oracle_weights(pair, changes), tmp_path), pair.oracle.path)
    assert report["verdict"]["status"] == "INCONCLUSIVE"
    assert "first at L02-attention (cosine 1.0000" in report["verdict"]["summary"]
    assert point(report, "L02-attn_softmax")["status"] == "pass"


def test_one_wrong_token_beside_a_large_one_is_no_parity(pair, tmp_path):
    def change(value, work):
        value[0] *= 1000
        return value

    def wrong(value, work):
        value = change(value, work)
        value[3] *= -1
        return value

    healthy, faulty_ = (
        list(with_oracle_weights(pair, {(3, "ffn_out"): c}).layers(TOKENS)) for c in (change, wrong)
    )

    class Recorded:
        def __init__(self, layers):
            self._layers = layers

        def layers(self, tokens) -> Iterator[LayerStages]:
            yield from self._layers

    theirs = oracle_dump(pair, Recorded(healthy), tmp_path / "a")
    ours = dump(Recorded(faulty_), tmp_path / "b")
    report = report_of(ours, theirs)
    found = point(report, "L03-ffn_out")
    assert found["total"]["cosine"] > 0.99999 and found["status"] == "inconclusive"
    assert "first at L03-ffn_out" in report["verdict"]["summary"]


def test_values_that_turn_non_finite_are_an_origin_whatever_the_weights(pair, tmp_path):
    def change(value, work):
        value[4, 7] = np.inf
        return value

    engine = NumpyEngine(
        pair.model_weights, pair.oracle_facts, pair.architecture, {(1, "ffn_up"): change}
    )
    for theirs in ("live", "dumped"):
        source = pair.oracle.path
        if theirs == "dumped":
            live = TransformersRunner(pair.config, pair.oracle_weights)
            source = oracle_dump(pair, live, tmp_path / "oracle")
        report = report_of(dump(checked(pair, engine), tmp_path / theirs), source)
        verdict = report["verdict"]
        assert (verdict["status"], verdict["rung"]) == ("DIVERGED", "stages")
        assert verdict["first_divergence"]["point"] == "L01-ffn_up"
        assert len(verdict["origins"]) == 1
        assert "1 non-finite values, all inputs are finite" in verdict["summary"]
        after = point(report, "L01-ffn_swigl")
        assert (after["status"], after["follows"]) == ("inherited", "L01-ffn_up")


def test_missing_stages(pair, tmp_path):
    def shown(layer, stages):
        return {n: v for n, v in stages.items() if layer != 1 or n == "post_ffn_residual"}

    foreign(with_oracle_weights(pair), tmp_path, change=shown)
    report = report_of(tmp_path, pair.oracle.path)
    assert report["verdict"]["status"] == "PARITY"
    assert point(report, "L01-ffn_up")["status"] == "missing"
    assert point(report, "L01-post_ffn_residual")["status"] == "pass"


def test_an_oracle_that_lacks_stages(pair, oracle, tmp_path):
    class Part:
        def layers(self, tokens):
            for layer, stages in oracle.layers(tokens):
                yield LayerStages(layer, {n: v for n, v in stages.items() if n != "attn_scores"})

    theirs = oracle_dump(pair, Part(), tmp_path)
    report = report_of(dump(with_oracle_weights(pair), tmp_path), theirs)
    assert report["verdict"]["status"] == "PARITY"
    found = point(report, "L00-attn_scores")
    assert (found["status"], found["reason"]) == (
        "inconclusive", "the oracle's side does not expose this stage")  # fmt: skip


# An oracle that is a dump


def test_two_dumps(pair, oracle, tmp_path):
    theirs = oracle_dump(pair, oracle, tmp_path)
    ours = dump(with_oracle_weights(pair), tmp_path)
    report = report_of(ours, theirs, tokens=None)
    assert report["verdict"]["status"] == "PARITY"
    assert tuple(report["run"]["prompts"][0]["tokens"]) == TOKENS
    assert report["notes"][0].startswith("total alone was judged: the oracle is a dump")
    assert report["oracle"]["kind"] == "dump"
    live = report_of(ours, pair.oracle.path)
    for a, b in zip(report["points"], live["points"], strict=True):
        assert a["total"] == b["total"]


def test_a_live_model_against_a_dumped_oracle(pair, oracle, tmp_path):
    """The GGUF says the shapes, so the oracle's dump needs no manifest."""
    with_manifest = report_of(pair.model.path, oracle_dump(pair, oracle, tmp_path), tokens=None)
    foreign(oracle, tmp_path / "foreign")
    without = report_of(pair.model.path, tmp_path / "foreign")
    for report in (with_manifest, without):
        assert report["verdict"]["status"] == "INCONCLUSIVE"
        assert report["model"]["quantisation"]
        assert report["model"]["sha256"] == pair.model.sha256()
    assert [p["total"] for p in with_manifest["points"]] == [p["total"] for p in without["points"]]


def test_a_dump_with_weights_against_a_dumped_oracle(pair, oracle, tmp_path):
    ours, theirs = dump(builtin(pair), tmp_path), oracle_dump(pair, oracle, tmp_path)
    report = report_of(ours, theirs, aprt_weights=str(pair.model.path))
    live = report_of(ours, pair.oracle.path)
    assert report["verdict"]["status"] == live["verdict"]["status"] == "INCONCLUSIVE"
    assert [p["total"] for p in report["points"]] == [p["total"] for p in live["points"]]


def test_the_oracles_own_dump_is_said_to_be_that(pair, oracle, tmp_path):
    report = report_of(dump(oracle, tmp_path), pair.oracle.path)
    assert report["verdict"]["status"] == "PARITY"
    assert "equals the oracle's bit for bit at all 71 points" in report["notes"][1]


def test_another_prompts_dump_is_recognised(pair, oracle, tmp_path):
    other = (*TOKENS[:6], 10)
    for engine, place in ((builtin(pair), "ours"), (with_oracle_weights(pair), "exact")):
        foreign(engine, tmp_path / place, other)
        report = report_of(tmp_path / place, pair.oracle.path)
        assert report["verdict"]["status"] == "INCONCLUSIVE"
        assert "row 6 of its embedding is that of token 10, the prompt has 9" in (
            report["verdict"]["summary"])  # fmt: skip
    foreign(oracle, tmp_path / "oracle", other)
    report = report_of(pair.model.path, tmp_path / "oracle")
    assert "row 6 of its embedding is that of token 10" in report["verdict"]["summary"]
    theirs = oracle_dump(pair, oracle, tmp_path / "declared", other)
    with pytest.raises(SettingsError, match=r"declared/oracle holds no run on the tokens \[3, "):
        report_of(tmp_path / "ours", theirs)


def test_an_oracle_whose_shapes_nobody_knows(pair, oracle, tmp_path):
    foreign(oracle, tmp_path / "oracle")
    foreign(builtin(pair), tmp_path / "model")
    with pytest.raises(
        SourceError, match="the shapes of its stages are not known, since it has no"
    ):
        report_of(tmp_path / "model", tmp_path / "oracle")


def test_an_oracle_of_other_sizes(pair, tmp_path):
    config = {**pair.oracle.config, "intermediate_size": 128}
    theirs = dump(builtin(pair), tmp_path, side="oracle", fields={"oracle": {"config": config}})
    with pytest.raises(
        ArchitectureError, match="differ in intermediate_size: 512 in the model's weights, 128"
    ):
        report_of(pair.model.path, theirs)


def test_a_text_needs_a_tokenizer(pair, oracle, tmp_path):
    theirs = oracle_dump(pair, oracle, tmp_path)
    ours = dump(builtin(pair), tmp_path)
    with pytest.raises(SourceError, match="the oracle is a dump, which has no tokenizer: give the"):
        report_of(ours, theirs, tokens=None, aprt_prompt=["a text"])


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_dump_keeps_the_oracles_configuration(family, tmp_path):
    other = fixture_pair(family)
    run = TransformersRunner(other.config, other.oracle_weights)
    folder = oracle_dump(other, run, tmp_path)
    assert DumpFolder.open(folder).manifest["config"] == other.oracle.config
    asked = {"aprt_model": str(dump(builtin(other), tmp_path)), "aprt_oracle": str(folder)}
    sides = open_sides(read_settings(asked.get, command=""))
    assert sides.oracle_facts == Facts.from_config(other.config) == other.oracle_facts


def test_both_sides_can_be_dumped_again(pair, oracle, tmp_path):
    theirs = oracle_dump(pair, oracle, tmp_path)
    ours = dump(with_oracle_weights(pair), tmp_path)
    first = report_of(ours, theirs, tokens=None, aprt_dump=str(tmp_path / "again"))
    again = report_of(tmp_path / "again/model", tmp_path / "again/oracle", tokens=None)
    assert [p["total"] for p in again["points"]] == [p["total"] for p in first["points"]]
