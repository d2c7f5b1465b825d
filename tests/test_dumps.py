"""Dumps in and out: what a live run wrote gives the verdict of the live run again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from faults.corpus import FAULTS
from faults.engines import ARITHMETICS
from harness import TOKENS, builtin, checked, faulty, fixture_pair, origins_of, verdict_of

from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.capture import LayerStages
from pytest_aprt.dump import DumpRunner, kept_in
from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.measure import Prompt, measure_pair
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
