"""Stages of long prompts, read by strips, give what whole tensors give."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from faults.corpus import FAULTS
from faults.engines import ARITHMETICS, Hiding
from harness import builtin, checked, faulty, fixture_pair, origins_of, verdict_of
from test_compare import FACTS, of, random, view
from test_dumps import dump

from pytest_aprt import strips
from pytest_aprt.arithmetic import EXACT, PROFILES
from pytest_aprt.capture import LayerStages
from pytest_aprt.captures import CaptureWriter
from pytest_aprt.compare import TOP_DIFFS, judge, measure, non_finite
from pytest_aprt.dump import DumpRunner
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.replay import Context, Reference, captured_input, replay, replayed_input
from pytest_aprt.sources import aprt
from pytest_aprt.stages import STAGES
from pytest_aprt.strips import Strips, of_array

HEADS, LONG = 2, 30
PROMPT = tuple((i * 37 + 11) % 700 for i in range(24))


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


def shrink(monkeypatch, elements):
    """Let stages of more elements be read by strips of as many."""
    monkeypatch.setattr(strips, "LARGE", elements)
    monkeypatch.setattr(strips, "STRIP", elements)


@pytest.fixture
def small(monkeypatch):
    """Strips of a few queries, also of short prompts."""
    shrink(monkeypatch, 200)
    monkeypatch.setattr(aprt, "MAPPED", 100)


def stage(seed):
    x = random(HEADS, LONG, LONG, seed=seed) * torch.arange(1, LONG + 1)[:, None]
    return x * torch.arange(1, LONG + 1)[:, None]


def same(a, b):
    """Whether two results are equal but for the order of float64 sums."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-12, nan_ok=True)
    return a == b


SPOILT = {
    "finite": lambda x, y: None,
    "NaN": lambda x, y: x[1, 17].fill_(math.nan),
    "infinite on both sides": lambda x, y: (x[0, 3, 2].fill_(math.inf), y[1, 9, 9].fill_(math.inf)),
    "NaN where it does not count": lambda x, y: x[0, 3, 20].fill_(math.nan),
    "nothing finite": lambda x, y: x.fill_(math.nan),
    "equal": lambda x, y: x.copy_(y),
    "zero": lambda x, y: y.zero_(),
    "the first queries are zero": lambda x, y: (x[:, :5].zero_(), y[:, :5].zero_()),
}


UNSEEN = {
    "a number where nothing is seen": lambda x, y: (x.tril_(), y.tril_(), x[1, 4, 25].fill_(0.5)),
    "zero where nothing is seen": lambda x, y: (x.tril_(), y.tril_()),
}


@pytest.mark.parametrize("name", ["attn_scores", "attn_softmax"])
@pytest.mark.parametrize("spoil", [*SPOILT.values(), *UNSEEN.values()], ids=[*SPOILT, *UNSEEN])
def test_metrics_are_those_of_the_whole_tensors(monkeypatch, name, spoil):
    x, y, response = stage(0), stage(0) + 1e-3 * stage(1), stage(2).abs().double() * 1e-9
    doubt = 1e-4 * stage(3).abs().double()
    spoil(x, y)
    seen = view(name, LONG)
    whole = measured(x, y, response, doubt, seen)
    shrink(monkeypatch, 200)
    parts = measured(*map(of_array, (x, y, response, doubt)), seen)
    assert same(parts, whole)
    image = whole[0]["image"]
    assert image is None or len(image["levels"]) == LONG * LONG
    assert (whole[-1] is None) == (spoil is SPOILT["nothing finite"])


@pytest.mark.parametrize("name", ["attn_norm", "q_post_rope", "qkv_matmul"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("first", [0, 10])
def test_large_stages_are_measured_by_strips_of_tokens(monkeypatch, name, spoil, first):
    facts = replace(FACTS, hidden=24, heads=6, kv_heads=3, head_dim=4)
    channels = math.prod(facts.sizes(1)[symbol] for symbol in STAGES[name].shape[1:])
    x, y, response, doubt = (random(2 * LONG, channels, seed=seed) for seed in range(4))
    x, y = y + 1e-3 * x, y.clone()
    spoil(x.view(2, LONG, channels), y.view(2, LONG, channels))
    seen = replace(view(name), facts=facts, first=first)
    inputs = x, y, 1e-9 * response.abs().double(), 1e-4 * doubt.abs().double(), seen
    whole = measured(*inputs)
    counted = []
    monkeypatch.setattr("pytest_aprt.views.each", lambda *a: counted.append(a) or strips.each(*a))
    shrink(monkeypatch, 200)
    assert same(measured(*inputs), whole)
    assert counted
    assert whole[0]["max_abs_at"].get("token", first) >= first


def measured(x, y, response, doubt, seen):
    """All that is measured and judged of a stage, as plain numbers."""
    metrics = measure(x, y, seen, TOP_DIFFS, pictured=True)
    if metrics.max_abs == 0:  # of equal differences any may come first
        metrics = replace(metrics, top_diffs=(), max_abs_at={})
    value = strips.mapped(torch.Tensor.double, y)
    judged = [judge(x, Reference(value, lambda: response, d), seen, of(1e-5))
              for d in (None, doubt)]  # fmt: skip
    return [
        asdict(metrics), non_finite(x, seen), *(j if j is None else asdict(j) for j in judged)
    ]  # fmt: skip


def test_of_the_last_queries(monkeypatch):
    x, y = stage(0), stage(0) + 1e-3 * stage(1)
    seen = replace(view("attn_scores", LONG), first=10)
    whole = measure(x[:, 10:], y[:, 10:], seen)
    shrink(monkeypatch, 200)
    cut = of_array(x).narrow(1, 10, LONG - 10)
    assert same(asdict(measure(cut, y[:, 10:], seen)), asdict(whole))
    assert whole.max_abs_at["token"] >= 10
    assert not isinstance(of_array(x).narrow(1, LONG - 1, 1), Strips)


def test_elements_cannot_be_had_otherwise(small):
    with pytest.raises(RuntimeError, match="by strips alone"):
        of_array(stage(0)) + 1
    with pytest.raises(RuntimeError, match="by strips alone"):
        torch.equal(of_array(stage(0)), stage(0))


def test_strips_are_written_as_the_whole(small, tmp_path):
    x = stage(0)
    file = io.BytesIO(b"before")
    file.seek(6)
    strips.write(file, of_array(x))
    assert file.getvalue() == b"before" + x.numpy().tobytes()
    layers = iter([LayerStages(3, {"attn_scores": of_array(x)})])
    list(CaptureWriter(tmp_path)("model", 0, layers))
    assert np.array_equal(np.load(tmp_path / "model/0/L03-attn_scores.npy"), x.numpy())


CASES = ("float32", "bfloat16", "float16 attention", "q8_0 attention", "q8_0 cache",
         "bfloat16 attention, stored as bfloat16")  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", [0, 7])
def test_the_replay_by_strips_is_the_whole_one(monkeypatch, name, first):
    arithmetic = next(a for a in PROFILES["auto"].arithmetics(["mix"]) if a.name == name)
    facts = replace(FACTS, head_dim=32, heads=4, kv_heads=2, hidden=128)
    keys, queries = 64, 64 - first
    context = Context(
        facts=facts, architecture=None, weights={}, call={"attention_mask": None}, source=None,
        tokens=tuple(range(keys)), types={}, arithmetic=arithmetic, first=first,
    )  # fmt: skip
    q, k = random(queries, 128, seed=1), random(keys, 64, seed=2)
    qkv = random(keys, 256, seed=3)

    def chained():
        scores = replay("attn_scores", context, [captured_input(q), captured_input(k)])
        softmax = replay("attn_softmax", replace(context, arithmetic=EXACT),
                         [replayed_input(scores, 1e-5)])  # fmt: skip
        mixed = replay("attention", context, [replayed_input(softmax, 1e-5), captured_input(qkv)])
        return scores, softmax, mixed

    whole = chained()
    shrink(monkeypatch, 4 * keys * 8)
    scores, softmax, mixed = chained()
    for a, b in zip((scores, softmax, mixed), whole, strict=True):
        assert isinstance(a.value, Strips) == (a.value.ndim == 3)
        close(a.value, b.value, rtol=1e-9)
        assert (a.doubt is None) == (b.doubt is None)
        if a.value is scores.value and a.doubt is not None:
            close(a.doubt, b.doubt, rtol=1e-9)
        # Responses are those to other random signs: of one size.
        assert 0.7 < float(held(a.response).norm() / b.response.norm()) < 1.4


def held(x):
    return torch.cat(list(strips.parts(x)), dim=1) if isinstance(x, Strips) else x


def close(a, b, rtol):
    torch.testing.assert_close(held(a), b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        *(("clean", a) for a in ("float32", "q8_k", "bfloat16", "float16")),
        *(("scale-missing", a) for a in ("float32", "q8_k", "bfloat16")),
        ("causal-mask-missing", "float32"),
        ("softmax-over-queries", "float16"),
        ("rope-theta-10k", "float32"),
        ("heads-swapped", "q8_k"),
    ],
)
def test_a_run_by_strips_gives_the_verdict_of_the_whole_run(monkeypatch, pair, name, arithmetic):
    fault = next((f for f in FAULTS if f.name == name), None)
    assert fault is not None or name == "clean"
    engine = faulty(pair, fault, **ARITHMETICS[arithmetic])
    whole = verdict_of(pair, engine, PROMPT)
    shrink(monkeypatch, 200)
    parts = verdict_of(pair, engine, PROMPT)
    assert (parts.status, origins_of(parts)) == (whole.status, origins_of(whole))
    assert [p.status for p in parts.points] == [p.status for p in whole.points]
    assert bool(origins_of(parts)) == (name != "clean")


@pytest.mark.parametrize("hidden", [("attn_scores",), ("attn_softmax",), ("attn_scores",
                         "attn_softmax", "q_post_rope")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("name", ["clean", "scale-missing"])
def test_missing_stages_are_bridged_by_strips(monkeypatch, pair, name, hidden):
    fault = next((f for f in FAULTS if f.name == name), None)
    engine = checked(
        pair, Hiding(faulty(pair, fault).raw, lambda layer, stage: stage not in hidden)
    )
    whole = verdict_of(pair, engine, PROMPT)
    shrink(monkeypatch, 200)
    assert origins_of(verdict_of(pair, engine, PROMPT)) == origins_of(whole)
    assert bool(origins_of(whole)) == (name != "clean")


def test_our_own_engines_make_the_same_stages_by_strips(monkeypatch, pair):
    runners = [builtin(pair), TransformersRunner(pair.config, pair.oracle_weights)]
    for runner in runners:
        with monkeypatch.context() as patched, torch.no_grad():
            whole = [dict(layer.stages) for layer in runner.layers(PROMPT)]
            shrink(patched, 200)
            parts = [
                {name: held(value) for name, value in layer.stages.items()}
                for layer in runner.layers(PROMPT)
            ]
        for a, b in zip(parts, whole, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)


def test_a_clean_run_by_strips(small, pair):
    verdict = verdict_of(pair, builtin(pair), PROMPT)
    assert verdict.status == "QUANTISATION_NOISE"
    assert all(e.worst.excess < 0.25 for e in (p.errors for p in verdict.points) if e.worst)


def test_a_dump_by_strips(small, pair, tmp_path):
    folder = dump(builtin(pair), tmp_path / "parts", PROMPT)
    runner = DumpRunner.open(str(folder))
    assert isinstance(dict(next(iter(runner.layers(PROMPT)))[1])["attn_scores"], np.memmap)
    live = verdict_of(pair, builtin(pair), PROMPT)
    again = verdict_of(pair, checked(pair, runner), PROMPT)
    assert (again.status, origins_of(again)) == (live.status, origins_of(live))
    for a, b in zip(again.points, live.points, strict=True):
        assert same(asdict(a.errors.total), asdict(b.errors.total))
    scores = np.fromfile(folder / "layer-0/attn_scores.bin", "<f4", offset=12)
    scores = scores.reshape(-1, len(PROMPT), len(PROMPT))
    assert np.array_equal(scores, np.tril(scores))
    assert scores.any()
