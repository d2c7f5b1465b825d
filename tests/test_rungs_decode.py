"""The rungs behind the stages: logits, decode and path, on healthy engines and planted faults."""

from __future__ import annotations

import dataclasses
import math

import families
import numpy as np
import pytest
import torch
from faults.decoding import CACHE_FAULTS, Decoder
from faults.engines import ARITHMETICS
from harness import checked, faulty, fixture_pair

from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.readings import Finals, Prompt
from pytest_aprt.rungs import LOGITS, PATH, decode_names
from pytest_aprt.rungs.decode import decode_rows
from pytest_aprt.rungs.logits import NEAR_TIE, SIDES, logit_rows, summarised
from pytest_aprt.rungs.path import path_rows
from pytest_aprt.testing import write_random_pair

TOKENS = (3, 77, 500, 12, 12, 640, 9)


def finals_of(pair, engine, tokens=TOKENS):
    with torch.no_grad():
        oracle = TransformersRunner(pair.config, pair.oracle_weights)
        shadow = TransformersRunner(pair.config, pair.model_weights)
        last = [[*side.layers(tokens)][-1][1] for side in (engine, shadow, oracle)]
    prompt = Prompt(text="", tokens=tokens)
    return Finals(prompt=prompt, model=last[0], shadow=last[1], oracle=last[2])


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


@pytest.fixture(scope="module")
def finals(pair):
    return finals_of(pair, Decoder(pair))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    config = families.mistral(sliding_window=5)
    gguf, hf = write_random_pair(tmp_path_factory.mktemp("window"), config)
    return open_pair(open_headers(str(gguf), str(hf)))


# Decode


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_engines_that_decode_well_are_silent(family):
    pair = fixture_pair(family)
    builtin = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
    for engine in (builtin, checked(pair, Decoder(pair))):
        rows = decode_rows(pair, engine, [finals_of(pair, engine)], 4)
        assert [row.name for row in rows] == list(decode_names(4))
        assert not any(row.broken for row in rows), rows
        for row in rows[:4]:
            assert row.figures["worst_rel_l2"] < 1e-5
            assert row.figures["engine_rel_l2"] < 1e-5


def test_the_builtin_engine_decodes_as_it_prefills_within_a_window(windowed):
    tokens = (5, 6, 7, 8, 9, 10, 11, 12)
    builtin = BuiltinRunner(windowed.model_weights, windowed.model_facts, windowed.architecture)
    rows = decode_rows(windowed, builtin, [finals_of(windowed, builtin, tokens)], 3)
    assert not any(row.broken for row in rows), rows


@pytest.mark.parametrize("fault", CACHE_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_the_cache_is_named_at_its_step_and_point(pair, finals, windowed, fault):
    if fault.needs_window:
        pair, finals = windowed, finals_of(windowed, Decoder(windowed), (5, 6, 7, 8, 9, 10, 11, 12))
    rows = decode_rows(pair, checked(pair, Decoder(pair, fault)), [finals], 3)
    first = next(row for row in rows if row.broken)
    assert first.name == f"step{fault.step}"
    assert first.figures["first_point"] == fault.point
    assert f"first at {fault.point}: the step with the cache is" in first.reason


def test_an_engine_that_shows_logits_alone_is_named_by_its_step(pair, finals):
    fault = next(f for f in CACHE_FAULTS if f.name == "stale-layer")
    engine = Decoder(pair, fault)

    class Bare:
        layers = staticmethod(engine.layers)

        def decode(self, tokens, forced):
            for *_, (layer, stages) in engine.decode(tokens, forced):
                yield [(layer, {"lm_head": stages["lm_head"].numpy()})]

    rows = decode_rows(pair, checked(pair, Bare()), [finals], 3)
    assert next(row.name for row in rows if row.broken) == "step2"
    assert rows[1].figures["first_point"] == "lm_head"


def test_an_error_that_accumulates_shows_in_the_growth(pair, finals):
    """A cache that loses a thousandth at every step, in an engine whose prefill drifts likewise."""
    fault = dataclasses.replace(
        CACHE_FAULTS[0],
        write=lambda s, layer, old, new: (new[0] * 1.5, new[1] * 0.5),
    )
    rows = decode_rows(pair, checked(pair, Decoder(pair, fault)), [finals], 4)
    growth = next(row for row in rows if row.name == "growth")
    assert growth.broken
    assert "error accumulates in the cache" in growth.reason


def test_both_texts_are_shown_and_a_difference_breaks_nothing(pair, finals):
    fault = next(f for f in CACHE_FAULTS if f.name == "cache-empty")
    text = decode_rows(pair, checked(pair, Decoder(pair, fault)), [finals], 3)[-1]
    assert text.status == "differs"
    own, theirs = text.figures["model"], text.figures["oracle"]
    assert len(theirs) == 4
    assert own[:-1] == theirs[: len(own) - 1]
    assert own[-1] != theirs[len(own) - 1]
    assert repr(text.figures["model_text"]) in text.reason


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (lambda tokens, forced: iter(()), "decode yielded 0 steps, expected 3"),
        (lambda tokens, forced: ([(0, {})] for _ in forced), "yielded no lm_head in step 1"),
        (lambda tokens, forced: ([(None, {"lm_head": [0.0]})] for _ in forced), "with 1 values"),
        (lambda tokens, forced: 1 / 0, "decode raised ZeroDivisionError"),
        (lambda tokens, forced: [3], "decode raised TypeError"),
    ],
)
def test_what_is_no_decoding_is_one_clear_line(pair, finals, steps, reason):
    engine = Decoder(pair)
    engine.decode = steps
    rows = decode_rows(pair, checked(pair, engine), [finals], 3)
    assert rows[0].broken and reason in rows[0].reason
    assert {row.status for row in rows[1:]} == {"unavailable"}


def test_without_decode_or_steps_or_room_the_rung_says_so(pair, finals):
    rows = decode_rows(pair, faulty(pair), [finals], 2)
    assert {(r.status, r.reason) for r in rows} == {
        ("unavailable", "the engine has no decode(tokens, forced)")
    }
    assert decode_rows(pair, checked(pair, Decoder(pair)), [finals], 0) == []
    rows = decode_rows(pair, checked(pair, Decoder(pair)), [finals], pair.oracle_facts.context)
    assert "exceed the context" in rows[0].reason
    assert decode_rows(pair, checked(pair, Decoder(pair)), [], 1)[0].status == "unavailable"


# Logits


def changed(finals, **stages):
    return dataclasses.replace(finals, model={**finals.model, **stages})


def test_healthy_logits_pass_and_what_the_weights_flip_is_noise(pair, finals):
    last, whole = logit_rows(pair, [finals])
    assert (last.status, whole.status) in {("pass", "pass"), ("pass", "noise"), ("noise", "noise")}
    for row in (last, whole):
        assert row.figures["engine"]["kl"] < 1e-9
        assert row.figures["engine"]["top5_in_order"] == 1
        assert row.figures["total"]["kl"] == pytest.approx(row.figures["weights"]["kl"], rel=1e-3)


def exchange(logits, places):
    logits = logits.clone()
    logits[list(places)] = logits[list(reversed(places))]
    return logits


LOGIT_FAULTS = {
    # name: how the model's side is changed, which test breaks, what is said
    "favourites-exchanged": (
        lambda f: {"lm_head": exchange(f.model["lm_head"],
                                       f.model["lm_head"].topk(40).indices[[0, -1]].tolist())},
        "last", "flip at position 0"),
    "not-finite": (
        lambda f: {"lm_head": f.model["lm_head"].index_fill(0, torch.tensor([7]), math.nan)},
        "last", "are not finite"),
    "sign": (lambda f: {"lm_head": -f.model["lm_head"]}, "last", "flip at position 0"),
    "one-position-behind": (
        lambda f: {"final_norm": f.model["final_norm"].roll(1, 0)}, "all", "positions flip"),
    "one-position-wrong": (
        lambda f: {"final_norm": torch.cat([f.model["final_norm"][:3],
                                            -f.model["final_norm"][3:4],
                                            f.model["final_norm"][4:]])},
        "all", "flip at position 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGIT_FAULTS)
def test_a_real_flip_breaks_the_rung(pair, finals, name):
    change, where, says = LOGIT_FAULTS[name]
    rows = {row.name: row for row in logit_rows(pair, [finals, changed(finals, **change(finals))])}
    assert {name for name, row in rows.items() if row.broken} == {where}
    assert says in rows[where].reason
    assert rows[where].figures["prompt"] == 1


def test_a_flip_between_near_tied_tokens_is_no_fault(pair, finals):
    favourite, second = finals.shadow["lm_head"].topk(2).indices.tolist()
    shadow, model = finals.shadow["lm_head"].clone(), finals.model["lm_head"].clone()
    for share, status in ((0.5, "near-tie"), (1.5, "broken")):
        shadow[second] = shadow[favourite] * (1 - share * NEAR_TIE)
        model[favourite], model[second] = shadow[second], shadow[favourite]
        tied = dataclasses.replace(
            finals,
            shadow={**finals.shadow, "lm_head": shadow},
            model={**finals.model, "lm_head": model},
        )
        row = logit_rows(pair, [tied])[0]
        assert row.status == status
        assert f"token {second} in the model, {favourite} in the shadow" in row.reason


@pytest.mark.parametrize("name", ["q8_k", "q8_0", "bfloat16", "bfloat16-q8_0"])
def test_engines_that_round_are_silent(pair, name):
    engine = faulty(pair, **ARITHMETICS[name])
    tokens = tuple(np.random.default_rng(1).integers(0, 1000, 200).tolist())
    rows = logit_rows(pair, [finals_of(pair, engine, tokens)])
    assert not any(row.broken for row in rows), rows


def test_streamed_logits_are_those_of_one_piece():
    generator = torch.Generator().manual_seed(0)
    sides = {side: torch.randn(6, 5000, generator=generator) * 4 for side in SIDES}
    sides["shadow"] = sides["model"] + 0.01 * sides["shadow"]
    whole = summarised([sides])
    cut = summarised({s: t[:, i : i + 700] for s, t in sides.items()} for i in range(0, 5000, 700))
    logs = {side: t.double().log_softmax(-1) for side, t in sides.items()}
    for name, (side, reference) in {
        "total": ("model", "oracle"),
        "engine": ("model", "shadow"),
    }.items():
        kl = (logs[reference].exp() * (logs[reference] - logs[side])).sum(-1)
        favourite = logs[reference].argmax(-1, keepdim=True)
        for found in (whole.errors[name], cut.errors[name]):
            torch.testing.assert_close(found.kl, kl, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(
                found.probability, logs[side].gather(1, favourite)[:, 0].exp()
            )
            top = [logs[s].topk(5).indices for s in (side, reference)]
            both = [len({*a.tolist()} & {*b.tolist()}) / 5 for a, b in zip(*top, strict=True)]
            assert found.overlap.tolist() == pytest.approx(both)
            assert found.in_order.tolist() == [
                bool((a == b).all()) for a, b in zip(*top, strict=True)
            ]
            assert found.same.tolist() == (top[0][:, 0] == top[1][:, 0]).tolist()


def test_stages_that_are_not_exposed_leave_their_test_unavailable(pair, finals):
    bare = dataclasses.replace(finals, model={"lm_head": finals.model["lm_head"]})
    last, whole = logit_rows(pair, [bare])
    assert last.status != "unavailable"
    assert whole.reason == "the model's side does not expose final_norm"
    assert [row.status for row in logit_rows(pair, [])] == ["unavailable"] * len(LOGITS)


# Path


class Production(Decoder):
    """The traced engine beside a production path that ``other`` makes of the pair."""

    def __init__(self, pair, users, bit_exact=False):
        super().__init__(pair)
        self.logits, self.bit_exact = users, bit_exact


def last_logits(pair, **facts):
    changed = dataclasses.replace(pair.model_facts, **facts)
    runner = BuiltinRunner(pair.model_weights, changed, pair.architecture)
    return lambda tokens: [*runner.layers(tokens)][-1].stages["lm_head"]


def test_one_path_passes_and_its_bits_are_the_same(pair, finals):
    engine = checked(pair, Production(pair, last_logits(pair), bit_exact=True))
    (row,) = path_rows(pair, engine, [finals], 0.999)
    assert (row.status, row.figures["same_bits"]) == ("pass", True)
    every = np.tile(last_logits(pair)(TOKENS).numpy(), (len(TOKENS), 1))
    engine = checked(pair, Production(pair, lambda tokens: every))
    assert path_rows(pair, engine, [finals], 0.999)[0].status == "pass"


PATH_FAULTS = {
    # name: the production path, whether it promises the same bits, what is said
    "another-rope-base": (lambda p: last_logits(p, rope_theta=100.0), False,
                          "the traced path is not the path that users run"),
    "last-token-dropped": (lambda p: lambda tokens: last_logits(p)(tokens[:-1]), False,
                           "the traced path is not the path that users run"),
    "bits-promised": (lambda p: lambda tokens: last_logits(p)(tokens) * (1 + 1e-6), True,
                      "the engine promises the same bits"),
    "not-finite": (lambda p: lambda tokens: last_logits(p)(tokens) * math.nan, False,
                   "the traced path is not the path that users run"),
    "same-token-other-logits": (
        lambda p: lambda tokens: last_logits(p)(tokens).clamp(min=5.0), False, "cosine"),
    "shape": (lambda p: lambda tokens: last_logits(p)(tokens)[:-1], False, "of shape (1023,)"),
    "raises": (lambda p: lambda tokens: 1 / 0, False, "it raised ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATH_FAULTS)
def test_another_production_path_is_its_own_verdict(pair, finals, name):
    users, exact, says = PATH_FAULTS[name]
    engine = checked(pair, Production(pair, users(pair), exact))
    (row,) = path_rows(pair, engine, [finals], 0.999)
    assert row.broken
    assert says in row.reason


def test_without_a_production_path_the_rung_says_so(pair, finals):
    (row,) = path_rows(pair, checked(pair, Decoder(pair)), [finals], 0.999)
    assert row.name == PATH[0]
    assert row.status == "unavailable"
    assert "logits(tokens)" in row.reason
