"""A run that stops at its first divergence names the one that the whole run names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from faults.corpus import FAULTS
from faults.engines import ARITHMETICS, SUBSETS, Hiding
from harness import TOKENS, builtin, checked, faulty, fixture_pair, origins_of, verdict_of

from pytest_aprt import measure
from pytest_aprt.arithmetic import EXACT, PROFILES
from pytest_aprt.consensus import Tally
from pytest_aprt.measure import Stop
from pytest_aprt.readings import Reading
from pytest_aprt.rungs.config import fact_rows

OTHER = (9, 640, 12, 77)


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


def both(pair, engine, *prompts, stop=None, profile="auto"):
    """The verdicts of the whole run and of the one that stops."""
    whole = verdict_of(pair, engine, *prompts, profile=profile)
    return whole, verdict_of(pair, engine, *prompts, profile=profile, stop=stop or Stop())


def judged(verdict):
    return [p for p in verdict.points if p.errors is not None]


def agree(whole, stopped):
    """One first divergence; what was judged up to it is judged alike, the rest left open."""
    assert stopped.status == whole.status == "DIVERGED"
    assert stopped.rung == whole.rung
    first = whole.first_divergence
    assert stopped.first_divergence.point == first.point
    assert stopped.first_divergence.errors.worst == first.errors.worst
    assert set(origins_of(stopped)) <= set(origins_of(whole))
    for a, b in zip(stopped.points, whole.points, strict=True):
        if a.errors is None:
            assert a.status == "inconclusive"
            assert a.reason.startswith(f"not run: stopped at {first.point}, ")
        else:
            assert (a.point, a.status) == (b.point, b.status)
    return len(judged(whole)) - len(judged(stopped))


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        *((name, "float32") for name in ("scale-missing", "bad-quant-block", "norm-eps-1e-3",
                                         "matrix-3-percent", "two-at-once")),
        *((name, "q8_k") for name in ("rope-theta-10k", "qkv-bias-missing", "two-at-once")),
        *((name, "bfloat16") for name in ("rope-theta-10k", "heads-swapped", "matrix-3-percent")),
    ],
)  # fmt: skip
def test_the_first_divergence_is_that_of_the_whole_run(pair, name, arithmetic):
    fault = next(f for f in FAULTS if f.name == name)
    engine = faulty(pair, fault, **ARITHMETICS[arithmetic])
    whole, stopped = both(pair, engine)
    if not origins_of(whole):  # bfloat16 hides it, or it is another's
        assert (stopped.status, judged(stopped)) == (whole.status, judged(whole))
        return
    spared = agree(whole, stopped)
    if arithmetic == "float32":
        at = whole.first_divergence.point.layer
        assert {p.point.layer for p in judged(stopped)} == set(range(at + 1))
        assert spared > 0


@pytest.mark.parametrize("arithmetic", ["float32", "q8_k", "bfloat16"])
def test_a_clean_run_is_unchanged(pair, arithmetic):
    whole, stopped = both(pair, faulty(pair, **ARITHMETICS[arithmetic]))
    assert (stopped.status, stopped.summary) == (whole.status, whole.summary)
    assert judged(stopped) == judged(whole)


@pytest.mark.parametrize("arithmetic", ["float32", "q8_k"])
@pytest.mark.parametrize("shown", ["no-scores", "residuals", "layer-outputs", "odd-layers"])
def test_brackets(pair, shown, arithmetic):
    fault = next(f for f in FAULTS if f.name == "rope-theta-10k")
    plain = faulty(pair, fault, **ARITHMETICS[arithmetic]).raw
    whole, stopped = both(pair, checked(pair, Hiding(plain, SUBSETS[shown])))
    if origins_of(whole):
        agree(whole, stopped)
        first = stopped.first_divergence.errors
        assert first.bracket == whole.first_divergence.errors.bracket
    else:
        assert stopped.summary == whole.summary


def test_rounding_in_one_layer_alone_waits_for_the_vote(pair):
    """Inputs rounded to 8 bits in layer 0 alone may be the engine's way, until layers say no."""
    fault = next(f for f in FAULTS if f.name == "int8-inputs")
    for engine in (faulty(pair, fault), rounding_first(pair, 1)):
        whole, stopped = both(pair, engine)
        if origins_of(whole):
            agree(whole, stopped)


def rounding_first(pair, layers):
    plain = faulty(pair).raw
    rounding = faulty(pair, **ARITHMETICS["q8_k"]).raw

    class Engine:
        def layers(self, tokens):
            for (layer, a), (_, b) in zip(
                rounding.layers(tokens), plain.layers(tokens), strict=True
            ):
                yield layer, a if layer in range(layers) else b

    return checked(pair, Engine())


def test_several_prompts_run_up_to_the_earliest(pair):
    """A fault that the first prompt shows late, the second early."""
    late, early = (next(f for f in FAULTS if f.name == n) for n in ("scale-missing", "rope-absent"))
    engines = {TOKENS: faulty(pair, late).raw, OTHER: faulty(pair, early_in(early)).raw}

    class Engine:
        def layers(self, tokens):
            return engines[tuple(tokens)].layers(tokens)

    for prompts in ((TOKENS, OTHER), (OTHER, TOKENS)):
        whole, stopped = both(pair, checked(pair, Engine()), *prompts)
        assert whole.first_divergence.point.layer == 1
        agree(whole, stopped)


def early_in(fault):
    return replace(fault, layer=1)


def test_what_a_later_prompt_leaves_open_is_run_whole(pair, monkeypatch):
    """The second prompt has a point before the first one's fault that only all votes settle."""
    again, run = [], measure.measure_pair

    def counted(*args, **kwargs):
        again.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(measure, "measure_pair", counted)  # the harness holds the function itself
    fault = next(f for f in FAULTS if f.name == "scale-missing")
    engines = {TOKENS: faulty(pair, early_in(fault)).raw, OTHER: rounding_first(pair, 2).raw}

    class Engine:
        def layers(self, tokens):
            return engines[tuple(tokens)].layers(tokens)

    whole, stopped = both(pair, checked(pair, Engine()), TOKENS, OTHER)
    assert len(again) == 1
    assert (stopped.status, stopped.summary) == (whole.status, whole.summary)
    assert judged(stopped) == judged(whole)
    assert origins_of(whole)


def test_what_a_broken_fact_feeds_is_no_origin(pair):
    fault = next(f for f in FAULTS if f.name == "rope-theta-10k")
    stop = Stop(fed=frozenset({"q_post_rope", "k_post_rope"}))
    whole, stopped = both(pair, faulty(pair, fault), stop=stop)
    assert origins_of(whole)  # here the fact is sound, so all was run to no end
    assert judged(stopped) == judged(whole)
    assert not [row for row in fact_rows(pair, 7) if row.broken]


def test_a_declared_arithmetic(pair):
    fault = next(f for f in FAULTS if f.name == "heads-swapped")
    engine = faulty(pair, fault, **ARITHMETICS["q8_k"])
    agree(*both(pair, engine, profile="q8_k"))
    assert both(pair, builtin(pair), profile="float32")[1].status == "QUANTISATION_NOISE"


# How the vote may still go

Q8, BF16 = (next(a for a in PROFILES["auto"].arithmetics(["matmul"]) if a.name == n)
            for n in ("q8_k", "bfloat16"))  # fmt: skip


def tally(*votes):
    found = Tally()
    for arithmetics in votes:
        found.add(("s",), [Reading(arithmetic=a, local=None, worst=None) for a in arithmetics])
    return found


@pytest.mark.parametrize(
    ("votes", "left", "expected"),
    [
        ([[Q8]], 9, None),
        ([[Q8], [Q8], [Q8]], 3, None),
        ([[Q8], [Q8], [Q8]], 2, True),
        ([[Q8, BF16], [Q8, BF16], [Q8, BF16]], 2, None),
        ([[EXACT], [EXACT], [EXACT], [Q8]], 1, False),
        ([[EXACT], [EXACT], [EXACT], [Q8]], 2, None),
        ([[BF16], [Q8]], 0, None),  # one alone is no support; later groups may lend it some
    ],
)
def test_when_the_choice_is_certain(votes, left, expected):
    assert tally(*votes).will_be_among(("s",), {"q8_k"}, left) is expected
