"""The ladder as a whole: the verdict names the lowest rung that breaks, not what follows."""

from __future__ import annotations

import pytest
from families import qwen2
from faults.decoding import CACHE_FAULTS, Decoder
from faults.files import rewritten
from faults.ladder import CONFIG_FAULTS, TOKEN_FAULTS, WEIGHT_FAULTS
from harness import FIXTURES, builtin, fixture_pair, verdict_of

from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.run import run
from pytest_aprt.rungs import (
    LADDER,
    LOGITS,
    PATH,
    ROW_STATUSES,
    TOKENS,
    Row,
    decode_names,
    following,
)
from pytest_aprt.rungs.config import fact_rows
from pytest_aprt.settings import read_settings
from pytest_aprt.testing import write_random_pair

BY_NAME = {fault.name: fault for fault in (*TOKEN_FAULTS, *CONFIG_FAULTS, *WEIGHT_FAULTS)}


def planted(fault, folder):
    pair = fixture_pair(fault.family)
    file, path = pair.model.file, folder / "faulty.gguf"
    return rewritten(file.path, path, fault.metadata(file.metadata), fault.tensors(file))


def report_of(family, gguf=None, engine=None):
    folder = FIXTURES / f"tiny-{family}"
    gguf, oracle = str(gguf or folder / "q4_k_m.gguf"), str(folder / "hf")
    settings = read_settings({"aprt_model": gguf, "aprt_oracle": oracle}.get, command="pytest")
    headers = open_headers(gguf, oracle)
    return run(headers, settings, engine, lambda what, done, total: None)


def points_by_status(report, status):
    return [p["point"] for p in report["points"] if p["status"] == status]


@pytest.mark.parametrize("fault", CONFIG_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_the_metadata_is_named_at_its_key(fault, tmp_path):
    rows = {r.name: r for r in fact_rows(fixture_pair(fault.family, planted(fault, tmp_path)), 9)}
    assert {name for name, row in rows.items() if row.broken} == fault.found
    (name,) = fault.found
    assert fault.says in rows[name].reason


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_facts_that_agree_say_nothing_and_know_who_states_them(family):
    rows = {row.name: row for row in fact_rows(fixture_pair(family), 9)}
    assert {row.reason for row in rows.values()} == {""}
    assert rows["norm_eps"].model_states and rows["norm_eps"].oracle_states
    assert not rows["sliding_window"].model_states
    assert rows["rope_theta"].oracle_states


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_clean_pairs_are_silent_on_every_rung(family):
    report = report_of(family)
    assert report["verdict"]["rung"] is None
    ladder = report["ladder"]
    assert list(ladder) == [rung for rung in LADDER if rung != "stages"]
    names = {"tokens": TOKENS, "logits": LOGITS, "decode": decode_names(3), "path": PATH}
    for rung, expected in names.items():
        assert [row["name"] for row in ladder[rung]] == list(expected)
    assert not any(row["status"] == "broken" for rows in ladder.values() for row in rows)


@pytest.mark.parametrize(
    ("name", "rung", "says"),
    [
        ("merges-swapped", "tokens", "DIVERGED: tokens merges differ at number 4"),
        ("rope-base", "config", "DIVERGED: config rope_theta is 10000.0 in the model"),
        ("rope-permuted", "weights", "DIVERGED: weights blk.1.attn_q.weight has its rows permuted"),
        ("bad-block", "weights", "DIVERGED: weights blk.1.ffn_gate.weight has a bad block: row 9"),
    ],
)
def test_a_fault_of_the_file_is_not_blamed_on_a_stage(name, rung, says, tmp_path):
    fault = BY_NAME[name]
    report = report_of(fault.family, planted(fault, tmp_path))
    assert report["verdict"]["rung"] == rung
    assert report["verdict"]["summary"].startswith(says)
    assert points_by_status(report, "diverged") == []
    follows = {p["follows"] for p in report["points"] if p["status"] == "inherited"}
    assert follows <= {f"{rung}-{where}" for where in fault.found}
    assert follows or name not in ("rope-base", "rope-permuted")


def test_a_fault_of_the_cache_is_named_by_step_and_layer():
    fault = next(f for f in CACHE_FAULTS if f.name == "stale-layer")
    report = report_of("qwen2", engine=Decoder(fixture_pair(), fault))
    assert report["verdict"]["rung"] == "decode"
    assert report["verdict"]["summary"].startswith(
        "DIVERGED: decode step2 first at L02-attention: the step with the cache is"
    )
    assert points_by_status(report, "diverged") == []


def test_a_production_path_of_its_own_is_named_last():
    engine = Decoder(fixture_pair())
    engine.logits = lambda tokens: -[*engine.layers(tokens)][-1].stages["lm_head"]
    report = report_of("qwen2", engine=engine)
    assert report["verdict"]["rung"] == "path"
    assert "the traced path is not the path that users run" in report["verdict"]["summary"]


def test_the_lowest_rung_is_named_where_several_break(tmp_path):
    both = {**BY_NAME["merges-swapped"].metadata(fixture_pair().model.file.metadata),
            **BY_NAME["rope-base"].metadata({"general.architecture": "qwen2"})}  # fmt: skip
    pair = fixture_pair()
    path = rewritten(pair.model.file.path, tmp_path / "x.gguf", both,
                     BY_NAME["transposed"].tensors(pair.model.file))  # fmt: skip
    report = report_of("qwen2", path)
    assert report["verdict"]["rung"] == "tokens"
    broken = {rung for rung, rows in report["ladder"].items()
              if any(row["status"] == "broken" for row in rows)}  # fmt: skip
    assert broken == {"tokens", "config", "weights"}


def test_there_are_faults_for_every_rung():
    assert len(TOKEN_FAULTS) + len(CONFIG_FAULTS) + len(WEIGHT_FAULTS) + len(CACHE_FAULTS) >= 55
    assert len(BY_NAME) == len(TOKEN_FAULTS) + len(CONFIG_FAULTS) + len(WEIGHT_FAULTS)


def test_logits_that_follow_from_a_stage_are_no_failure_of_their_own():
    rows = [
        Row(name="last", status="broken", reason="flip"),
        Row(
            name="step2", status="broken", reason="cache", figures={"first_point": "L01-attention"}
        ),
        Row(name="all", status="pass"),
    ]
    found = following(rows, "L00-q_post_rope")
    assert [row.status for row in found] == ["inherited", "broken", "pass"]
    assert found[0].reason == "follows from L00-q_post_rope: flip"
    assert ROW_STATUSES["inherited"] == "xfailed"


@pytest.mark.parametrize("seed", [0, 1])
def test_an_oracle_of_another_model_is_said_to_be_one(seed, tmp_path):
    places = [tmp_path / name for name in ("model", "oracle")]
    for number, place in zip((0, seed), places, strict=True):
        place.mkdir()
        write_random_pair(place, qwen2(), seed=number)
    pair = open_pair(open_headers(str(places[0] / "f32.gguf"), str(places[1] / "hf")))
    said = verdict_of(pair, builtin(pair), (3, 77, 12, 5)).summary
    assert ("the oracle may not be the model that this one was made from" in said) == bool(seed)
