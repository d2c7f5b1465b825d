"""Dumps in and out: what a live run wrote gives the verdict of the live run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from faults.corpus import FAULTS
from faults.engines import ARITHMETICS
from harness import (
    TOKENS,
    Changed,
    builtin,
    checked,
    faulty,
    fixture_pair,
    origins_of,
    verdict_of,
    written,
)

from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.capture import LayerStages
from pytest_aprt.dump import DumpRunner, kept_in
from pytest_aprt.dump_checks import CheckedDump
from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.measure import measure_pair
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers
from pytest_aprt.readings import Prompt
from pytest_aprt.run import run
from pytest_aprt.settings import read_settings
from pytest_aprt.sources.aprt import DumpFolder

FIELDS = {"model": {"arithmetic": "auto"}, "oracle": {"arithmetic": "float32"}}


def plain(side: str, prompt: int, layers: Iterator[LayerStages]) -> Iterator[LayerStages]:
    return layers


def dump(engine, folder, *prompts, side="model", fields=FIELDS):
    """Write an engine's run as ``--aprt-dump`` does, reading it as far as a run does."""
    asked = [Prompt(text="", tokens=tokens) for tokens in prompts or (TOKENS,)]
    keep = kept_in(folder, asked, fields, plain)
    for index, prompt in enumerate(asked):
        layers = keep(side, index, (LayerStages(*item) for item in engine.layers(prompt.tokens)))
        while next(layers).layer is not None:
            pass
    return folder / side


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


@pytest.mark.parametrize("arithmetic", ["float32", "q8_k", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["clean", "rope-theta-10k", "scale-missing", "matrix-3-percent", "two-at-once"]
)
def test_a_dump_is_judged_as_the_live_run_was(pair, tmp_path, name, arithmetic):
    fault = next((f for f in FAULTS if f.name == name), None)
    engine = faulty(pair, fault, **ARITHMETICS[arithmetic])
    live = verdict_of(pair, engine)
    runner = DumpRunner.open(str(dump(engine, tmp_path)))
    assert runner.prompts == [("", TOKENS)]
    again = verdict_of(pair, checked(pair, runner))
    assert (again.status, origins_of(again)) == (live.status, origins_of(live))
    small = name == "matrix-3-percent" and arithmetic == "bfloat16"
    assert bool(origins_of(live)) == (name != "clean") or small
    assert again.summary == live.summary
    for a, b in zip(again.points, live.points, strict=True):
        assert (a.point, a.status, a.errors.worst) == (b.point, b.status, b.errors.worst)


def test_both_sides_are_written(pair, tmp_path):
    prompt = Prompt(text="a text", tokens=TOKENS)
    keep = kept_in(tmp_path, [prompt], FIELDS, plain)
    measure_pair(pair, builtin(pair), [prompt], pair.graph.points, PROFILES["auto"], keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "oracle"]
    for side in ("model", "oracle"):
        folder = DumpFolder.open(tmp_path / side)
        assert folder.layers == [0, 1, 2, 3]
        for layer in (*folder.layers, None):
            assert folder.stages(layer) == [s.name for s in pair.graph.of_layer(layer)]
        assert folder.manifest["prompt"] == "a text"
    model, oracle = (DumpFolder.open(tmp_path / side) for side in ("model", "oracle"))
    assert not np.array_equal(model.read(3, "ffn_out"), oracle.read(3, "ffn_out"))


def test_several_prompts(pair, tmp_path):
    prompts = ((3, 4, 5), (9, 8, 7, 6))
    engine = builtin(pair)
    runner = DumpRunner.open(str(dump(engine, tmp_path, *prompts)))
    assert [tokens for _, tokens in runner.prompts] == list(prompts)
    live, again = (verdict_of(pair, e, *prompts) for e in (engine, checked(pair, runner)))
    assert again.summary == live.summary and again.status == "QUANTISATION_NOISE"
    (tmp_path / "model/prompt-1/manifest.json").unlink()
    with pytest.raises(SourceError, match=r"prompt-1: expected a manifest\.json"):
        DumpRunner.open(str(tmp_path / "model"))


def test_a_run_that_stops_leaves_nothing(pair, tmp_path):
    keep = kept_in(tmp_path, [Prompt(text="", tokens=TOKENS)], FIELDS, plain)
    layers = keep("model", 0, builtin(pair).layers(TOKENS))
    for _ in range(3):
        next(layers)
    (draft,) = tmp_path.iterdir()
    with pytest.raises(SourceError, match="expected a complete dump"):
        DumpFolder.open(draft)
    layers.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_others_is_replaced(tmp_path):
    (tmp_path / "oracle").mkdir()
    (tmp_path / "oracle" / "thesis.tex").touch()
    with pytest.raises(SourceError, match=r"found thesis\.tex"):
        kept_in(tmp_path, [Prompt(text="", tokens=TOKENS)], FIELDS, plain)


def test_a_manifest_of_other_tokens(pair, tmp_path):
    runner = DumpRunner.open(str(dump(builtin(pair), tmp_path)))
    with pytest.raises(SettingsError, match=r"holds no run on the tokens \[1, 2\]: expected \[3, "):
        verdict_of(pair, checked(pair, runner), (1, 2))


def test_the_manifest_declares_the_arithmetic(pair, tmp_path):
    for declared, found in (("bfloat16", "bfloat16"), ("auto", None)):
        fields = {"model": {"arithmetic": declared}}
        folder = dump(builtin(pair), tmp_path / declared, fields=fields)
        assert DumpRunner.open(str(folder)).arithmetic == found


# Dumps of other tools: they do not say what they hold


def foreign(engine, folder, tokens=TOKENS, change=None, family="qwen2"):
    """An engine's run as other tools write it, without a manifest."""
    engine = engine if change is None else Changed(engine, change)
    dump = DumpRunner.open(str(written(engine, folder, tokens)))
    return CheckedDump(dump, fixture_pair(family), "dump")


def verdict_on(pair, engine, tokens=TOKENS):
    """The verdict of a run, with the check for swapped sides."""
    settings = read_settings(
        {
            "aprt_model": engine,
            "aprt_weights": str(pair.model.file.path),
            "aprt_oracle": str(pair.oracle.path),
            "aprt_tokens": [",".join(map(str, tokens))],
        }.get,
        command="",
    )
    headers = open_headers(settings.weights, settings.oracle)
    return run(headers, settings, None, lambda what, done, total: None)["verdict"]


@pytest.mark.parametrize("arithmetic", ["float32", "q8_k", "bfloat16"])
def test_a_foreign_dump_is_judged_as_the_live_run_was(pair, tmp_path, arithmetic):
    fault = next(f for f in FAULTS if f.name == "rope-theta-10k")
    for planted in (None, fault):
        engine = faulty(pair, planted, **ARITHMETICS[arithmetic])
        live, again = (
            verdict_of(pair, e) for e in (engine, foreign(engine, tmp_path / str(planted is None)))
        )
        assert (again.summary, origins_of(again)) == (live.summary, origins_of(live))
        assert bool(origins_of(again)) == (planted is not None)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", [0, 6])
def test_another_prompts_dump_is_recognised(pair, tmp_path, arithmetic, place):
    other = list(TOKENS)
    other[place] += 1
    engine = foreign(faulty(pair, **ARITHMETICS[arithmetic]), tmp_path, tuple(other))
    verdict = verdict_of(pair, engine)
    assert (verdict.status, verdict.rung) == ("INCONCLUSIVE", "self-test")
    assert f"row {place} of its embedding is that of token {other[place]}" in verdict.summary
    assert "the self-test 'tokens' failed" in verdict.summary


@pytest.mark.parametrize("name", ["embedding-scaled", "embedding-row"])
def test_a_fault_in_the_embedding_is_no_other_prompt(pair, tmp_path, name):
    fault = next(f for f in FAULTS if f.name == name)
    live = verdict_of(pair, faulty(pair, fault))
    again = verdict_of(pair, foreign(faulty(pair, fault), tmp_path))
    assert origins_of(again) == origins_of(live) == ["L00-embedding"]


def test_prompts_of_other_lengths(pair, tmp_path):
    for tokens, says in (((*TOKENS, 5, 6), "holds 9 rows"), (TOKENS[:4], "holds 4 rows")):
        engine = foreign(builtin(pair), tmp_path / str(len(tokens)), tokens)
        verdict = verdict_of(pair, engine)
        assert verdict.status == "INCONCLUSIVE" and says in verdict.summary


def padded(layer, stages):
    if layer == 1:
        stages["attn_out"] = np.pad(stages["attn_out"], ((0, 25), (0, 0)))
    return stages


def after_bias(layer, stages):
    return stages | ({"qkv_matmul": stages["qkv_bias"]} if layer is not None else {})


def before_bias(layer, stages):
    return stages | ({"qkv_bias": stages["qkv_matmul"]} if layer is not None else {})


def one_layer(layer, stages):
    same.update({n: v for n, v in stages.items() if layer == 0 and n != "embedding"})
    return {n: same.get(n, v) for n, v in stages.items()}


same: dict = {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (padded, "L01-attn_out holds 32 rows, the prompt has 7 tokens: it is padded"),
        (after_bias, "L00-qkv_matmul holds the values after the bias"),
        (before_bias, "L00-qkv_bias holds the values before the bias"),
        (one_layer, "hold the same bytes in every stage"),
    ],
)
def test_broken_captures_are_recognised(pair, tmp_path, change, says):
    for arithmetic in ("float32", "q8_k"):
        engine = faulty(pair, **ARITHMETICS[arithmetic])
        verdict = verdict_of(pair, foreign(engine, tmp_path / arithmetic, change=change))
        assert verdict.status == "INCONCLUSIVE" and says in verdict.summary


@pytest.mark.parametrize("name", ["qkv-bias-missing", "qkv-bias-twice"])
def test_a_fault_in_the_bias_is_no_broken_capture(pair, tmp_path, name):
    fault = replace(next(f for f in FAULTS if f.name == name), layer=0)
    verdict = verdict_of(pair, foreign(faulty(pair, fault), tmp_path))
    assert origins_of(verdict) == ["L00-qkv_bias"]


def test_swapped_sides_are_recognised(pair, tmp_path):
    oracle = TransformersRunner(pair.config, pair.oracle_weights)
    foreign(oracle, tmp_path / "foreign")
    for folder in (tmp_path / "foreign", dump(oracle, tmp_path, side="model")):
        verdict = verdict_on(pair, str(folder))
        assert verdict["status"] == "INCONCLUSIVE"
        assert "equals the oracle at all 71 points" in verdict["summary"]
    healthy = verdict_on(pair, str(dump(builtin(pair), tmp_path / "healthy")))
    assert healthy["status"] == "QUANTISATION_NOISE"
