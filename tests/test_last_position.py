"""Engines that show the last position alone: what can be judged is, and nothing else is blamed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from faults.corpus import FAULTS, Fault
from faults.engines import ARITHMETICS
from faults.score import tokens_of
from harness import (
    TOKENS,
    builtin,
    checked,
    faulty,
    fixture_pair,
    origins_of,
    quiet,
    settings_on,
    verdict_of,
    written,
)

from pytest_aprt.dump import DumpRunner, kept_in
from pytest_aprt.dump_checks import CheckedDump
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers
from pytest_aprt.positions import READS_ALL, token_axis
from pytest_aprt.readings import Prompt
from pytest_aprt.run import run
from pytest_aprt.sides import open_sides
from pytest_aprt.totals import run_totals

LAST = TOKENS[-1:]
HISTORY = ("k_post_rope", "qkv_matmul", "qkv_bias")


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


class Last:
    """An engine's last position; ``whole`` stages keep all of theirs, ``hidden`` ones are not."""

    def __init__(self, engine, whole=(), hidden=()):
        self.engine, self.whole, self.hidden = engine, whole, hidden

    def layers(self, tokens):
        for layer, stages in self.engine.layers(tokens):
            yield (
                layer,
                {
                    name: value if name in self.whole else cut(name, np.asarray(value))
                    for name, value in stages.items()
                    if name not in self.hidden
                },
            )


def cut(name, value):
    axis = token_axis(name)
    return value if axis is None else value.take([-1], axis=axis)


def fault_named(name):
    return next(fault for fault in FAULTS if fault.name == name)


def judged_last(pair, engine, tokens=TOKENS, **shown):
    return verdict_of(pair, checked(pair, Last(engine, **shown)), tokens)


def excess(verdict, *stages):
    return max(j.errors.worst.excess for j in verdict.points if j.point.stage in stages)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_healthy_engine(family):
    pair = fixture_pair(family)
    for tokens in (TOKENS[:2], TOKENS, tokens_of(64)):
        verdict = judged_last(pair, faulty(pair), tokens)
        assert verdict.status == "QUANTISATION_NOISE"
        assert {judged.status for judged in verdict.points} <= {"pass", "noise"}
        assert max(judged.errors.worst.excess for judged in verdict.points) < 0.5
        stood_in = {j.point.stage for j in verdict.points if j.errors.stood_in}
        assert stood_in == set(READS_ALL)


@pytest.mark.parametrize("arithmetic", ["q8_k", "q8_0", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_a_healthy_engine_in_another_arithmetic(pair, arithmetic, length):
    engine = faulty(pair, **ARITHMETICS[arithmetic])
    verdict = judged_last(pair, engine, tokens_of(length))
    assert origins_of(verdict) == []
    assert verdict.status == "QUANTISATION_NOISE"
    if arithmetic.startswith("q8"):
        assert 0.05 < excess(verdict, *READS_ALL) < 0.8


EARLIER = ("causal-mask-missing", "one-token-stale")
SHOWN = [f.name for f in FAULTS[::7] if f.name not in EARLIER]


@pytest.mark.parametrize("name", SHOWN)
def test_faults_are_found_where_the_whole_capture_shows_them(name):
    fault = fault_named(name)
    pair = next(p for p in map(fixture_pair, ("qwen2", "llama", "qwen3")) if fault.needs(p))
    live = origins_of(verdict_of(pair, faulty(pair, fault)))
    assert live
    assert origins_of(judged_last(pair, faulty(pair, fault))) == live


def test_a_fault_at_earlier_positions_shows_where_attention_reads_them(pair):
    """The stages in which it was born were captured at the last position alone, and are right."""

    def longer(value, work):
        value[3] *= 1.02
        return value

    fault = Fault(name="key-3-longer", like="", changes={"k_post_rope": longer}, layer=0)
    assert origins_of(verdict_of(pair, faulty(pair, fault))) == ["L00-k_post_rope"]
    verdict = judged_last(pair, faulty(pair, fault))
    assert origins_of(verdict) == ["L00-attn_scores"]
    assert verdict.origins[0].errors.stood_in
    later = next(j for j in verdict.points if str(j.point) == "L01-attn_scores")
    assert later.errors.worst.excess > 1  # what it reads of earlier positions is wrong by then
    assert (later.status, later.follows) == ("inherited", "L00-attn_scores")


@pytest.mark.parametrize("name", EARLIER)
def test_faults_of_earlier_positions_alone_show_in_the_next_layer(pair, name):
    """The stage itself is right at the last position: it may see all keys, or is not stale."""
    fault = fault_named(name)
    assert origins_of(judged_last(pair, faulty(pair, fault))) == ["L03-attn_scores"]


def test_all_positions_of_k_and_v_lift_the_limit(pair):
    def half_a_percent(value, work):
        return value * 1.005

    fault = Fault(name="half-a-percent", like="", changes={"attention": half_a_percent}, layer=1)
    engine = faulty(pair, fault, **ARITHMETICS["q8_k"])
    assert origins_of(judged_last(pair, engine)) == []
    verdict = judged_last(pair, engine, whole=HISTORY)
    assert origins_of(verdict) == ["L01-attention"]
    assert not any(judged.errors.stood_in for judged in verdict.points)


def test_non_finite_keys_of_earlier_positions_are_no_fault_of_attention(pair):
    def inf(value, work):
        value[0] = np.inf
        return value

    fault = Fault(name="inf", like="", changes={"k_post_rope": inf}, layer=1)
    verdict = judged_last(pair, faulty(pair, fault), whole=HISTORY)
    assert [o for o in origins_of(verdict) if o.startswith("L01")] == []


def test_missing_stages_are_bridged(pair):
    hidden = ("q_post_rope", "k_post_rope", "attn_scores", "attn_softmax")
    assert judged_last(pair, faulty(pair), hidden=hidden).status == "QUANTISATION_NOISE"
    fault = fault_named("rope-theta-10k")
    verdict = judged_last(pair, faulty(pair, fault), hidden=hidden)
    assert origins_of(verdict) == ["L02-attention"]
    assert [str(p) for p in verdict.origins[0].errors.bracket] == [f"L02-{name}" for name in hidden]
    names = {s.name for s in pair.graph.stages} - {"post_ffn_residual", "lm_head"}
    assert judged_last(pair, faulty(pair), hidden=names).status == "QUANTISATION_NOISE"
    fault = fault_named("gelu-for-silu")
    verdict = judged_last(pair, faulty(pair, fault), hidden=names)
    assert origins_of(verdict) == ["L02-post_ffn_residual"]


def test_the_last_layers_alone_are_cut(pair):
    """llama.cpp drops all but the last position behind the last layer's attention."""
    n_layers = pair.graph.n_layers
    behind = ("attn_out", "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu",
              "ffn_swigl", "ffn_out", "post_ffn_residual", "final_norm")  # fmt: skip

    class Cut:
        def __init__(self, engine):
            self.engine = engine

        def layers(self, tokens):
            for layer, stages in self.engine.layers(tokens):
                late = layer in (n_layers - 1, None)
                yield layer, {n: cut(n, np.asarray(v)) if late and n in behind else v
                              for n, v in stages.items()}  # fmt: skip

    verdict = verdict_of(pair, checked(pair, Cut(faulty(pair))))
    assert verdict.status == "QUANTISATION_NOISE"
    assert not any(judged.errors.stood_in for judged in verdict.points)
    fault = replace(fault_named("values-by-modulo"), layer=n_layers - 1)
    verdict = verdict_of(pair, checked(pair, Cut(faulty(pair, fault))))
    assert origins_of(verdict) == [f"L{n_layers - 1:02d}-attention"]


def test_places_are_counted_from_the_start_of_the_prompt(pair):
    (origin, *_) = judged_last(pair, faulty(pair, fault_named("rope-theta-10k"))).origins
    local = origin.errors.local
    assert local.max_abs_at["token"] == local.worst_token[0] == len(TOKENS) - 1


# Dumps


def test_a_dump_of_the_last_position(pair, tmp_path):
    fault = fault_named("gelu-for-silu")
    for planted, origins in ((None, []), (fault, ["L02-ffn_silu"])):
        folder = written(Last(faulty(pair, planted)), tmp_path / str(planted is None))
        settings = settings_on(pair, folder)
        report = run(open_headers(settings.weights, settings.oracle), settings, None, quiet)
        assert [origin["point"] for origin in report["verdict"]["origins"]] == origins
        (note,) = report["notes"]
        assert note.startswith("the last position alone was captured and judged at 70 points, first"
                               " at L00-embedding: the other side is cut to match")  # fmt: skip
        assert "earlier positions are the shadow's" in note
        points = {point["point"]: point for point in report["points"]}
        assert points["L01-attn_norm"]["shape"] == [1, 256]
        assert "the shadow's K and V" in points["L01-attention"]["tolerance"]["source"]
        assert "the shadow's K and V" not in points["L01-attn_out"]["tolerance"]["source"]
        rows = {row["name"]: row for row in report["ladder"]["logits"]}
        assert rows["all"]["reason"] == "the model's side shows the last position alone"


def test_a_dump_of_another_prompts_last_position(pair, tmp_path):
    class Other:
        def layers(self, tokens):
            yield from Last(builtin(pair)).layers((*TOKENS[:-1], 10))

    folder = written(Other(), tmp_path)
    verdict = verdict_of(pair, CheckedDump(DumpRunner.open(str(folder)), pair, "dump"))
    assert (verdict.status, verdict.rung) == ("INCONCLUSIVE", "self-test")
    assert "row 6 of its embedding is that of token 10, the prompt has 9" in verdict.summary


def test_a_dump_with_a_manifest_can_hold_the_last_position(pair, tmp_path):
    prompts = [Prompt(text="", tokens=TOKENS)]
    fields = {"model": {"engine": "cut", "arithmetic": "auto"}}
    keep = kept_in(tmp_path, prompts, fields, lambda side, prompt, layers: layers)
    for _ in keep("model", 0, checked(pair, Last(builtin(pair))).layers(TOKENS)):
        pass
    settings = settings_on(pair, tmp_path / "model")
    report = run(open_headers(settings.weights, settings.oracle), settings, None, quiet)
    assert report["verdict"]["status"] == "QUANTISATION_NOISE"


def test_without_weights_the_other_side_is_cut(pair, tmp_path):
    oracle = TransformersRunner(pair.config, pair.oracle_weights)
    engines = {"ours": builtin(pair), "theirs": oracle}
    places = {
        f"{name}{cut}": written(Last(engine) if cut else engine, tmp_path / f"{name}{cut}")
        for name, engine in engines.items()
        for cut in ("", "-cut")
    }
    totals = {}
    for model, against in (("ours-cut", None), ("ours-cut", "theirs"), ("ours-cut", "theirs-cut"),
                           ("ours", "theirs-cut")):  # fmt: skip
        settings = settings_on(pair, places[model], places.get(against), weights=bool(against))
        report = run_totals(open_sides(settings), settings, None, quiet)
        assert any("the last position alone was captured" in note for note in report["notes"])
        totals[model, against] = [point["total"] for point in report["points"]]
    first, *others = totals.values()
    assert all(found == first for found in others)


# Folders as ``apr trace --save-tensor`` writes them


@pytest.mark.parametrize("layers", [1, 4])
def test_a_folder_of_apr_trace(pair, tmp_path, layers):
    """Scores of unseen keys are 0, layers 0..1 are the default, and other files lie beside."""
    fault = replace(fault_named("gelu-for-silu"), layer=0)
    for planted in (None, fault):
        folder = tmp_path / str(planted is None)
        engine = faulty(pair, planted)

        class Traced:
            def layers(self, tokens, engine=engine):
                for layer, stages in engine.layers(tokens):
                    if layer is None:
                        yield layer, stages
                    elif layer < layers:
                        yield layer, {**stages, "attn_scores": np.tril(stages["attn_scores"])}

        written(Traced(), folder)
        (folder / "_PROVENANCE.txt").write_text("model: q4k.gguf\n")
        verdict = verdict_of(pair, CheckedDump(DumpRunner.open(str(folder)), pair, "dump"))
        assert origins_of(verdict) == ([] if planted is None else ["L00-ffn_silu"])
        assert [j.status for j in verdict.points].count("missing") == (4 - layers) * 17
