"""Oracles that are engines themselves: which side errs, and what different weights cost."""

from __future__ import annotations

import json
import shutil

import families
import pytest
from harness import FIXTURES
from live import report_of

from pytest_aprt.errors import ArchitectureError, SettingsError, SourceError
from pytest_aprt.settings import read_settings
from pytest_aprt.sides import open_sides
from pytest_aprt.testing import NumpyEngine, write_random_pair
from pytest_aprt.weights import weights_of

FAMILIES = ("qwen2", "llama", "qwen3")


def gguf_of(family):
    return str(FIXTURES / f"tiny-{family}" / "q4_k_m.gguf")


def numpy_engine(faults=None, **ways):
    def make(sides):
        weights = weights_of(sides.model)
        return NumpyEngine(weights, sides.model.facts, sides.architecture, faults or {}, **ways)

    return make


FAULT = {(2, "ffn_up"): lambda value, workings: value * 1.05}


def origins(report):
    return [origin["point"] for origin in report["verdict"]["origins"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_engines_on_one_file_agree(family):
    report = report_of(gguf_of(family), gguf_of(family), ours=numpy_engine())
    assert report["verdict"]["status"] == "PARITY"
    tests = {test["name"]: test["passed"] for test in report["self_test"]}
    assert tests == dict.fromkeys(("tokens", "capture", "layers", "replay", "canary"), True)
    point = report["points"][-1]
    assert point["engine"]["rel_l2"] == point["total"]["rel_l2"] < 1e-5
    assert (point["weights"], point["local"]["rel_l2"] < 1e-6) == (None, True)
    assert "Both sides run the same weights, so `engine` is `total`" in report["notes"][0]
    assert {fact["status"] for fact in report["ladder"]["config"]} == {"agree"}
    assert report["oracle"]["kind"] == "gguf"


def test_a_fault_of_the_model_is_an_origin():
    report = report_of(gguf_of("qwen2"), gguf_of("qwen2"), ours=numpy_engine(FAULT))
    assert report["verdict"]["status"] == "DIVERGED"
    assert origins(report) == ["L02-ffn_up"]


def test_a_fault_of_the_oracle_is_laid_to_the_oracle():
    report = report_of(gguf_of("qwen2"), "python:old:engine", theirs=numpy_engine(FAULT))
    assert report["verdict"]["status"] == "INCONCLUSIVE"
    assert (
        "'replay' failed: L02-ffn_up of the oracle's engine is 5.0e-02 from its replay"
        in (report["verdict"]["summary"])
    )
    assert origins(report) == []


def test_engines_that_round_differ_by_rounding():
    from pytest_aprt.rounding import ROUNDINGS

    def bfloat16(x):
        import torch

        return ROUNDINGS["bfloat16"](torch.from_numpy(x), None).value.numpy()

    report = report_of(gguf_of("llama"), "python:old:engine", theirs=numpy_engine(kept=bfloat16))
    verdict = report["verdict"]
    assert verdict["status"] in ("PARITY", "QUANTISATION_NOISE"), verdict["summary"]
    assert "the weights explain" not in verdict["summary"]
    assert report["points"][-1]["total"]["rel_l2"] > 1e-4


def test_different_weights_have_a_shadow(tmp_path):
    """The oracle's engine runs the model's weights, too."""
    folder = str(FIXTURES / "tiny-qwen2" / "hf")
    report = report_of(gguf_of("qwen2"), folder, oracle_engine="builtin")
    assert report["verdict"]["status"] == "QUANTISATION_NOISE"
    (deep,) = (point for point in report["points"] if point["point"] == "L03-ffn_out")
    assert deep["weights"]["rel_l2"] == deep["total"]["rel_l2"] > 0.05
    assert deep["engine"]["rel_l2"] == 0
    assert "The sides run different weights" in report["notes"][0]


def test_files_that_state_another_configuration(tmp_path):
    (tmp_path / "a").mkdir()
    gguf, hf = write_random_pair(tmp_path / "a", families.qwen2())
    other = shutil.copytree(hf, tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e4
    (other / "config.json").write_text(json.dumps(config))
    given = {"oracle_engine": "builtin", "tokens": ["1,2,3,4,5"]}
    assert report_of(str(gguf), str(hf), **given)["verdict"]["status"] == "PARITY"
    report = report_of(str(gguf), str(other), **given)
    assert (report["verdict"]["status"], report["verdict"]["rung"]) == ("DIVERGED", "config")
    assert (
        "rope_theta is 1000000.0 in the model, 10000.0 in the oracle"
        in (report["verdict"]["summary"])
    )


def test_transformers_on_both_sides():
    folder = str(FIXTURES / "tiny-qwen3" / "hf")
    report = report_of(
        folder, folder, engine_option=["dtype=float16"], oracle_engine="transformers",
        oracle_engine_option=["dtype=float32", "device=cpu", "attn_implementation=sdpa"],
    )  # fmt: skip
    assert report["verdict"]["status"] == "PARITY", report["verdict"]["summary"]
    scores = [p for p in report["points"] if p["stage"] == "attn_scores"]
    assert {(p["status"], p["total"]) for p in scores} == {("pass", None)}
    assert "transformers (device cpu, dtype float32, traced attention sdpa" in report["notes"][0]
    (row,) = report["ladder"]["path"]
    assert row["status"] == "pass" and row["changes"]


# What cannot be run


def test_no_side_has_a_tokenizer():
    gguf = gguf_of("qwen2")
    asked = {"aprt_model": gguf, "aprt_oracle": gguf}
    sides = open_sides(read_settings(asked.get, command=""))
    with pytest.raises(SourceError, match="there is no tokenizer: give token ids with --aprt-tok"):
        sides.tokenizer  # noqa: B018


def refusal(**given):
    asked = {"aprt_model": gguf_of("qwen2"), "aprt_oracle": gguf_of("qwen2"), **given}
    with pytest.raises(SettingsError) as error:
        read_settings(asked.get, command="")
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aprt_oracle_engine": "ollama"}, "--aprt-oracle-engine=ollama is not valid: expected on"),
        ({"aprt_oracle_engine": "command"}, "--aprt-oracle-engine=command needs --aprt-oracle-eng"),
        ({"aprt_oracle_engine_command": "true {out}"}, "--aprt-oracle-engine-command needs --aprt"),
        ({"aprt_oracle_engine_option": ["x"]}, "--aprt-oracle-engine-option=x is not valid: expec"),
        ({"aprt_oracle": "python:x"}, "--aprt-oracle=python:x is not valid: expected python:modu"),
        (
            {"aprt_oracle": "a/b", "aprt_oracle_engine": "command",
             "aprt_oracle_engine_command": "true {x}"},
            "--aprt-oracle-engine-command=true {x} is not valid: {x} is unknown, expected one of",
        ),
    ],
)  # fmt: skip
def test_what_is_not_valid(given, said):
    assert refusal(**given).startswith(said)


def test_another_family(tmp_path):
    asked = {"aprt_model": gguf_of("qwen2"), "aprt_oracle": gguf_of("qwen3")}
    with pytest.raises(ArchitectureError, match="of different families: qwen2 and qwen3"):
        open_sides(read_settings(asked.get, command=""))
