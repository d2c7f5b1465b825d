"""llama.cpp itself as the engine under test: healthy in every type, and with faults planted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache

import harness
import numpy as np
import pytest
from faults.live import IN_THE_ENGINE, IN_THE_FILE, plant
from harness import FIXTURES, TOKENS, fixture_pair, verdict_of

from pytest_aprt.arithmetic import profile_named
from pytest_aprt.engines.llamacpp import CHANGES, EXACT, LlamaCpp
from pytest_aprt.errors import EngineError, SettingsError
from pytest_aprt.measure import measure_pair
from pytest_aprt.readings import Prompt
from pytest_aprt.rungs.decode import decode_rows
from pytest_aprt.rungs.path import path_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: pip install 'pytest-aprt[llamacpp]'",
)

FAMILIES = ("qwen2", "llama", "qwen3")
TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32")
FURTHER = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K_M")


def tokens_of(length, vocab=1024):
    return tuple(int(t) for t in np.random.default_rng(length).integers(5, vocab, length))


PROMPTS = tuple(tokens_of(length) for length in (1, 7, 100))


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    """Makes the fixture of a family in a type."""
    folder = tmp_path_factory.mktemp("types")

    @cache
    def made(family):
        kinds = TYPES[1:] + (FURTHER if family == FAMILIES[0] else ())
        script = [sys.executable, FIXTURES / "make_fixtures.py", family, "--out", folder]
        subprocess.run([*script, "--types", *kinds], check=True, capture_output=True)

    def path(family, kind):
        if kind == TYPES[0]:
            return FIXTURES / f"tiny-{family}" / "q4_k_m.gguf"
        made(family)
        return folder / f"tiny-{family}" / f"{kind.lower()}.gguf"

    return path


def live(pair, **options):
    engine = LlamaCpp(pair.model.path, pair.model_facts, pair.architecture, options)
    return harness.checked(pair, engine)


def pair_of(family="qwen2", gguf=None):
    return fixture_pair(family, gguf)


def measured(pair, *prompts, **options):
    engine = live(pair, **options)
    asked = [Prompt(text="", tokens=tokens) for tokens in prompts or (TOKENS,)]
    result = measure_pair(pair, engine, asked, pair.graph.points, profile_named(engine.arithmetic))
    return engine, result


# Healthy


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((f, t) for f in FAMILIES for t in TYPES), *(("qwen2", t) for t in FURTHER)],
)
def test_a_healthy_engine_raises_no_alarm(gguf, family, kind):
    """At 1, 7 and 100 tokens; what rounding leaves is far from the tolerance."""
    pair = pair_of(family, gguf(family, kind))
    _, result = measured(pair, *PROMPTS)
    assert [t for t in result.self_tests if not t.passed] == []
    assert {e.point.stage for e in result.errors if e.missing} == {"ffn_silu"}
    seen = [e for e in result.errors if not e.missing]
    assert len(seen) == 3 * (len(pair.graph.points) - pair.graph.n_layers)
    worst = max((e for e in seen if e.worst), key=lambda e: e.worst.excess)
    assert worst.worst.excess < 0.75, worst.point


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F16"])
def test_two_threads_give_the_same_bits(gguf, kind):
    pair = pair_of("qwen2", gguf("qwen2", kind))
    one, two = live(pair), live(pair, n_threads=2, n_threads_batch=2)
    for (layer, a), (_, b) in zip(one.layers(PROMPTS[2]), two.layers(PROMPTS[2]), strict=True):
        for name in a:
            assert np.array_equal(a[name], b[name]), (layer, name)
    assert verdict_of(pair, two, *PROMPTS).status in ("PARITY", "QUANTISATION_NOISE")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float16_cache_is_told_from_a_fault(family):
    pair = pair_of(family)
    engine = live(pair, type_k="f16", type_v="f16")
    assert engine.arithmetic == "q8,cache=float16"
    for profile in ("auto", engine.arithmetic):
        verdict = verdict_of(pair, engine, *PROMPTS[1:], profile=profile)
        assert verdict.status == "QUANTISATION_NOISE", verdict.summary


@pytest.mark.parametrize(("family", "kind"), [*((f, "Q4_K_M") for f in FAMILIES), ("qwen2", "F16")])
def test_production_settings_may_be_traced(gguf, family, kind):
    """Flash attention sums in float16 on short prompts; repacking changes no rounding.

    One token's attention is a row of V in float16, so `attn_out` of an F16 file is exact there.
    """
    pair = pair_of(family, gguf(family, kind))
    engine = live(pair, flash_attn_type=-1, type_k="f16", type_v="f16", use_extra_bufts=True)
    assert engine.arithmetic == "q8,cache=flash"
    prompts = [tokens_of(length) for length in (1, 7, 20, 100)]
    verdict = verdict_of(pair, engine, *prompts, profile=engine.arithmetic)
    assert verdict.status in ("PARITY", "QUANTISATION_NOISE"), verdict.summary


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_agree_with_the_prefill(family):
    pair = pair_of(family)
    engine, result = measured(pair)
    rows = decode_rows(pair, engine, result.finals, 4)
    assert [row.name for row in rows if row.broken] == []
    assert len([row for row in rows if row.name.startswith("step")]) == 4
    steps = list(engine.raw.decode(TOKENS, [5, 6]))
    assert [[layer for layer, _ in step] for step in steps] == [[0, 1, 2, 3, None]] * 2
    assert steps[1][0][1]["attn_softmax"].shape == (4, 1, len(TOKENS) + 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_production_path_says_what_each_setting_changes(family):
    pair = pair_of(family)
    engine, result = measured(pair)
    (row,) = path_rows(pair, engine, result.finals, 0.999)
    assert row.status == "pass"
    assert row.figures["changes"].keys() == CHANGES.keys()
    assert 0 < row.figures["changes"]["float16 cache"] < 0.1
    assert "float16 cache" in row.reason


def test_the_parameters_are_told():
    pair = pair_of()
    engine, _ = measured(pair)
    details = engine.raw.details
    assert {name: details[name] for name in EXACT} == EXACT
    assert {"llama-cpp-python", "ggml", "system"} <= details.keys()


# Faults


@pytest.mark.parametrize(
    "fault", [*IN_THE_ENGINE, *IN_THE_FILE], ids=lambda f: f"{f.rung}-{f.name}"
)
def test_a_fault_is_named(fault, tmp_path):
    """At its stage, and no other; or by the rung that looks at the file."""
    found = plant(fault, tmp_path)
    assert found.right, found.verdict.summary


def test_the_stages_behind_a_wrong_eps_follow_from_the_file(tmp_path):
    (fault,) = (f for f in IN_THE_FILE if f.name == "eps")
    verdict = plant(fault, tmp_path).verdict
    (norm,) = (judged for judged in verdict.points if str(judged.point) == "L00-attn_norm")
    assert norm.status == "inherited"
    assert norm.errors.worst.excess > 1


# What cannot be run


def failure(pair, **options):
    with pytest.raises(EngineError) as error:
        list(live(pair, **options).layers(TOKENS))
    text = str(error.value)
    assert "\n" not in text
    return text


def test_an_abort_in_the_engine_is_an_error():
    text = failure(pair_of(), n_batch=0)
    assert text.startswith("llama.cpp was ended by SIGABRT: ")
    assert "GGML_ASSERT(" in text


def test_a_refusal_of_the_engine_is_an_error():
    assert failure(pair_of(), type_v="q8_0") == (
        "llama.cpp: it makes no context: llama_init_from_model: quantized V cache requires "
        "flash_attn to be enabled"
    )


def test_an_unknown_parameter_is_an_error():
    assert failure(pair_of(), n_thread=2).startswith(
        "llama.cpp: it has no parameter 'n_thread': expected attention_type, "
    )


def test_a_value_of_another_kind_is_an_error():
    assert failure(pair_of(), n_threads="1.5") == (
        "llama.cpp: its parameter n_threads cannot be 1.5: expected int"
    )
    with pytest.raises(SettingsError, match="type_k cannot be 'f17': expected a number, on or off"):
        live(pair_of(), type_k="f17")


def test_a_batch_that_splits_the_prompt_is_an_error():
    assert "n_ubatch must hold the whole prompt" in failure(pair_of(), n_ubatch=4)


def test_a_file_that_llamacpp_does_not_load(tmp_path):
    pair = pair_of()
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF")
    engine = LlamaCpp(path, pair.model_facts, pair.architecture)
    with pytest.raises(EngineError, match=r"llama\.cpp: it does not load .*empty\.gguf: "):
        list(engine.layers(TOKENS))


def test_a_run_that_is_left_early_leaves_no_process():
    layers = live(pair_of()).raw.layers(TOKENS)
    next(layers)
    layers.close()  # ends the process; one that is left behind would be a ResourceWarning
