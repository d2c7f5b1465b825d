"""report.json: what runs write, that it is strict JSON, and that files appear whole or not."""

from __future__ import annotations

import errno
import json
import os
import typing
from pathlib import Path

import pytest
from report_cases import point_of, report_of

from pytest_aprt import report as reports
from pytest_aprt.errors import SettingsError

RUNS = ("clean", "fault", "overflow", "prompts")


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_the_clean_run_is_noise():
    report = report_of("clean")
    assert report["verdict"]["status"] == "QUANTISATION_NOISE"
    assert {p["status"] for p in report["points"]} == {"noise", "pass"}
    assert report["verdict"]["first_divergence"] is None


@pytest.mark.parametrize("name", ["fault", "prompts"])
def test_the_faulty_run_names_both_faults(name):
    verdict = report_of(name)["verdict"]
    assert verdict["status"] == "DIVERGED"
    assert verdict["first_divergence"] == {
        "layer": 2, "stage": "k_post_rope", "point": "L02-k_post_rope",
        "previous_good": "L02-qkv_bias",
    }  # fmt: skip
    assert [o["point"] for o in verdict["origins"]] == ["L02-k_post_rope", "L02-attn_out"]


@pytest.mark.parametrize("name", ["fault", "prompts"])
def test_every_origin_names_the_good_point_before_it(name):
    """An ancestor, not what stands before it in the list: Q is K's sibling."""
    first, second = report_of(name)["verdict"]["origins"]
    assert first["previous_good"]["point"] == "L02-qkv_bias"
    assert first["previous_good"]["rel_l2"] < 1e-6
    assert second["previous_good"]["point"] == "L02-attention"


def test_nan_that_appears_is_counted_at_its_origin_and_nowhere_else():
    origins = {o["point"]: o for o in report_of("overflow")["verdict"]["origins"]}
    assert list(origins) == ["L01-ffn_gate", "L01-ffn_out"]
    channels = point_of(report_of("overflow"), "L01-ffn_gate")["shape"][1]
    assert origins["L01-ffn_gate"]["born_non_finite"] == channels
    assert origins["L01-ffn_out"]["born_non_finite"] == 0


@pytest.mark.parametrize("name", RUNS)
def test_the_report_is_strict_json_and_round_trips(tmp_path, name):
    report = report_of(name)
    path = tmp_path / "new" / "report.json"
    reports.write(report, path)
    assert strict(path.read_text()) == report
    assert reports.read(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_nan_is_written_as_a_string(tmp_path):
    report = report_of("overflow")
    reports.write(report, tmp_path / "r.json")
    assert '"nan"' in (tmp_path / "r.json").read_text()
    assert point_of(report, "L01-ffn_silu")["engine"]["non_finite"]["model"] > 0


def keys_differ(value, kind, path="report"):
    """Return where the keys of a report are not those of its TypedDict."""
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        must = kind.__required_keys__
        wrong = [f"{path}: {k}" for k in sorted((must - set(value)) | (set(value) - set(hints)))]
        return wrong + [
            w for k, v in value.items() if k in hints
            for w in keys_differ(v, hints[k], f"{path}.{k}")
        ]  # fmt: skip
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [w for i, v in enumerate(value) for w in keys_differ(v, inner[0], f"{path}[{i}]")]
    if type(None) in inner and value is not None:
        return keys_differ(value, next(k for k in inner if k is not type(None)), path)
    return []


@pytest.mark.parametrize("name", RUNS)
def test_the_report_has_exactly_the_keys_of_its_schema(name):
    report = report_of(name)
    assert report["schema"] == reports.SCHEMA == "aprt-report-v1"
    assert keys_differ(report, reports.Report) == []


def test_the_schema_check_finds_a_key_too_many_and_one_too_few():
    report = report_of("clean")
    report["points"][0]["total"]["cosin"] = report["points"][0]["total"].pop("cosine")
    assert keys_differ(report, reports.Report) == [
        "report.points[0].total: cosin", "report.points[0].total: cosine",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": "other-v1"}', r"r.json is no aprt-report-v1 report: its schema is 'other-v1'"),
        ("[1]", r"r.json is no aprt-report-v1 report: its schema is None; expected a report.json"),
        ("{", r"r.json is no JSON: .*; expected a report.json of --aprt-report"),
        (None, r"cannot read .*r.json: No such file or directory; expected a report.json"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, says):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=says):
        reports.read(path)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot write .*; choose another folder with --aprt"):
        reports.write_text(tmp_path / "file" / "report.md", "x")


def test_a_text_that_utf8_cannot_hold_is_written_as_escapes(tmp_path):
    """A path that is no UTF-8 reaches the report as surrogates."""
    reports.write_text(tmp_path / "report.md", "model \udcff.gguf")
    assert (tmp_path / "report.md").read_text() == "model \\udcff.gguf"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, broken):
    path = tmp_path / "report.md"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match=r"cannot write .*: No space left on device; "):
        reports.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert path.read_text() == "old"


def test_an_interrupted_write_leaves_nothing_either(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reports.write_text(tmp_path / "report.md", "new")
    assert list(tmp_path.iterdir()) == []
