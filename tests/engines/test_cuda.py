"""transformers on a GPU as the engine under test; each test is skipped where there is none.

python -m pytest tests/engines/test_cuda.py -rs
"""

from __future__ import annotations

import pytest
import torch
from harness import TOKENS, origins_of
from live import (
    FAMILIES,
    PROMPTS,
    UNSEEN,
    Live,
    folder_of,
    fused,
    missing_in,
    quantised,
    report_of,
    worst_of,
)

from pytest_aprt.errors import SettingsError
from pytest_aprt.modules import from_module
from pytest_aprt.rungs.decode import decode_rows
from pytest_aprt.rungs.path import path_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("attention", UNSEEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_raises_no_alarm(family, dtype, attention):
    live = Live(folder_of(family), device="cuda", dtype=dtype, attn_implementation=attention)
    assert live.raw.model.device.type == "cuda"
    assert (live.engine.arithmetic, live.raw.details["device"]) == (dtype, "cuda:0")
    result = live.measured()
    assert [t for t in result.self_tests if not t.passed] == []
    assert missing_in(result) == UNSEEN[attention] | fused(family)
    print(f"{family} {dtype} {attention}: {worst_of(result).point} {worst_of(result).worst}")
    assert worst_of(result).worst.excess < 1, worst_of(result).point
    assert live.verdict(result).status == "PARITY"


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before


def test_tf32_is_declared(tf32):
    live = Live(folder_of("qwen2"), device="cuda", dtype="float32")
    assert live.engine.arithmetic == "tf32"
    # cuBLAS multiplies Q and K in tf32 only where the prompt's length is a multiple of 4.
    verdict = live.verdict(live.measured(PROMPTS[-1][:68]))
    assert verdict.status == "PARITY", verdict.summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_and_generation(family, dtype):
    live = Live(folder_of(family), device="cuda", dtype=dtype)
    finals = live.measured(TOKENS).finals
    rows = decode_rows(live.pair, live.engine, finals, 4)
    rows += path_rows(live.pair, live.engine, finals, 0.999)
    assert [(row.name, row.reason) for row in rows if row.broken] == []


def test_being_observed_changes_no_bit():
    live = Live(folder_of("qwen2"), device="cuda", dtype="bfloat16", attn_implementation="eager")
    *_, last = live.raw.layers(PROMPTS[1])
    with torch.no_grad():
        plain = live.raw.model(torch.tensor([PROMPTS[1]], device="cuda")).logits[0, -1]
    assert torch.equal(last.stages["lm_head"], plain.float().cpu())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_is_found_there(dtype):
    live = Live(folder_of("llama"), device="cuda", dtype=dtype)
    live.raw.model.model.layers[2].self_attn.scaling *= 1.1
    assert origins_of(live.verdict(live.measured(PROMPTS[1]))) == ["L02-attn_scores"]


def test_a_gpu_against_a_cpu():
    folder = str(folder_of("qwen3"))
    report = report_of(
        folder, folder, device="cuda", engine_option=["dtype=bfloat16"],
        oracle_engine="transformers", oracle_engine_option=["dtype=bfloat16"],
    )  # fmt: skip
    assert report["verdict"]["status"] == "PARITY", report["verdict"]["summary"]
    assert report["model"]["engine_details"]["device"] == "cuda:0"


def test_quantised_modules_there(monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate, which quantised models on a GPU need")
    live = quantised("llama", device="cuda")
    verdict = live.verdict(live.measured(*PROMPTS[1:]))
    assert verdict.status in ("PARITY", "QUANTISATION_NOISE"), verdict.summary


def test_a_module_of_ones_own_there():
    live = Live(folder_of("qwen2"), device="cuda", dtype="bfloat16")
    engine = from_module(live.raw.model, {"model.norm": "final_norm", "lm_head": "lm_head"})
    ((_, stages),) = engine.layers(TOKENS)
    assert {str(value.device) for value in stages.values()} == {"cpu"}


def test_a_device_that_is_not_there():
    with pytest.raises(
        SettingsError, match=r"--aprt-device=cuda:99: torch .*; here are cpu, cuda:"
    ):
        Live(folder_of("qwen2"), device="cuda:99")
