"""``aprt diff``: every field against a computation by hand, and what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pytest_aprt.commands.main import main
from pytest_aprt.sources.aprt import WHOLE_MODEL, write_manifest, write_tensor

EXAMPLES = Path(__file__).parent / "examples"


def diff(capsys, *args):
    code = main(["diff", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


def example(name):
    return EXAMPLES / f"{name}-a.bin", EXAMPLES / f"{name}-b.bin"


BY_HAND = {
    # a = 1 2 -2 0, b = 1 0 -2 3: differences 0 2 0 3, a.b = 5, |a| = 3, |b| = sqrt(14)
    "plain": {
        "layer": 7,
        "dim_product": 4,
        "max_abs_diff": 3.0,
        "max_abs_diff_index": 3,
        "rms_diff": 1.8027756377319946,  # sqrt(13 / 4)
        "cosine_sim": 0.4454354031873739,  # 5 / (3 sqrt(14))
        "top_diffs": [
            {"index": 3, "a": 0.0, "b": 3.0, "abs_diff": 3.0},
            {"index": 1, "a": 2.0, "b": 0.0, "abs_diff": 2.0},
            {"index": 0, "a": 1.0, "b": 1.0, "abs_diff": 0.0},
        ],
        "identical": False,
        "zero_norm": [],
        "non_finite_a": 0,
        "non_finite_b": 0,
        "index_payload": False,
    },
    # a = 1 nan 3 inf, b = 1.5 2 3 4: only elements 0 and 2 are finite on both sides
    "nan": {
        "layer": "whole-model",
        "dim_product": 4,
        "max_abs_diff": 0.5,
        "max_abs_diff_index": 0,
        "rms_diff": None,
        "cosine_sim": None,
        "top_diffs": [
            {"index": 1, "a": "nan", "b": 2.0, "abs_diff": "nan"},
            {"index": 3, "a": "inf", "b": 4.0, "abs_diff": "inf"},
            {"index": 0, "a": 1.0, "b": 1.5, "abs_diff": 0.5},
        ],
        "identical": False,
        "zero_norm": [],
        "non_finite_a": 2,
        "non_finite_b": 0,
        "index_payload": False,
    },
    # a = 0 0 0, b = 3 0 -4: differences 3 0 4; a cosine with a zero has no value
    "zero": {
        "layer": 0,
        "dim_product": 3,
        "max_abs_diff": 4.0,
        "max_abs_diff_index": 2,
        "rms_diff": 2.886751345948129,  # sqrt(25 / 3)
        "cosine_sim": None,
        "top_diffs": [
            {"index": 2, "a": 0.0, "b": -4.0, "abs_diff": 4.0},
            {"index": 0, "a": 0.0, "b": 3.0, "abs_diff": 3.0},
            {"index": 1, "a": 0.0, "b": 0.0, "abs_diff": 0.0},
        ],
        "identical": False,
        "zero_norm": ["a"],
        "non_finite_a": 0,
        "non_finite_b": 0,
        "index_payload": False,
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_field_by_hand(capsys, name):
    a, b = example(name)
    code, out, _ = diff(capsys, a, b, "--values", "--limit", 3, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    expected = {"schema": "apr-stage-diff-v1", "path_a": str(a), "path_b": str(b), **BY_HAND[name]}
    assert code == 0 and list(found) == list(expected)
    for field in ("rms_diff", "cosine_sim"):
        if expected[field] is not None:
            assert math.isclose(found[field], expected[field], rel_tol=4e-16)
            expected[field] = found[field]
    assert found == expected


@pytest.mark.parametrize(("limit", "listed"), [(0, 1), (1, 1), (2, 2), (99, 4)])
def test_limit(capsys, limit, listed):
    _, out, _ = diff(capsys, *example("plain"), "--limit", limit, "--json")
    assert len(json.loads(out)["top_diffs"]) == listed


def test_text_says_what_json_says(capsys):
    _, out, _ = diff(capsys, *example("nan"))
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["max abs diff"].endswith("0.5 at 0") and lines["cosine"].endswith("none")
    assert lines["note"].endswith("2 NaN or Inf in a")
    _, out, _ = diff(capsys, *example("zero"))
    assert "all zero in a" in out
    _, out, _ = diff(capsys, example("nan")[0], example("nan")[0], "--threshold", 1)
    assert "bit for bit equal" in out and "met: cosine 1" in out


@pytest.mark.parametrize(
    ("name", "threshold", "code"),
    [("plain", "0.445", 0), ("plain", "0.446", 1), ("nan", "-1", 1), ("zero", "-1", 1)],
)
def test_threshold(capsys, name, threshold, code):
    for form in ([], ["--json"]):
        got, out, _ = diff(capsys, *example(name), "--threshold", threshold, *form)
        assert got == code
    assert json.loads(out)["missed"] == code


def test_without_a_threshold_any_distance_is_zero(capsys):
    assert diff(capsys, *example("zero"))[0] == 0


@pytest.fixture
def folders(tmp_path):
    for side, step in (("a", 0.0), ("b", 0.5)):
        for layer in (0, 1):
            values = np.arange(1, 5, dtype=np.float32) + np.float32(step * layer)
            write_tensor(tmp_path / side / f"layer-{layer}" / "attn_norm.bin", layer, values)
        write_tensor(tmp_path / side / "lm_head.bin", WHOLE_MODEL, np.ones(3, np.float32))
    write_tensor(tmp_path / "a/layer-0/embedding.bin", 0, np.ones(3, np.float32))
    write_tensor(tmp_path / "b/layer-1/ffn_out.bin", 1, np.ones(3, np.float32))
    return tmp_path / "a", tmp_path / "b"


def test_folders(capsys, folders):
    code, out, _ = diff(capsys, *folders, "--json", "--threshold", 0.9999)
    found = json.loads(out)
    assert code == 1 and found["missed"] == 1
    assert found["schema"] == "apr-stage-diff-v1"
    assert [(s["layer"], s["stage"]) for s in found["stages"]] == [
        (0, "attn_norm"),
        (1, "attn_norm"),
        ("whole-model", "lm_head"),
    ]
    assert found["stages"][1]["path_a"] == str(folders[0] / "layer-1/attn_norm.bin")
    assert [s["identical"] for s in found["stages"]] == [True, False, True]
    assert (found["only_in_a"], found["only_in_b"]) == (["L00-embedding"], ["L01-ffn_out"])
    code, out, _ = diff(capsys, *folders, "--threshold", 0.9999)
    assert code == 1 and "MISSED: cosine 0.9999, by L01-attn_norm" in out
    assert "only in a: L00-embedding" in out and "only in b: L01-ffn_out" in out
    assert [line for line in out.splitlines() if line.startswith("!")]


def test_indices_are_compared_by_equality(capsys, tmp_path):
    for side, values in (("a", [1, 2, 3]), ("b", [1, 2, 4])):
        path = tmp_path / side / "layer-0" / "moe_router_indices.bin"
        write_tensor(path, 0, np.array(values, np.float32))
    assert diff(capsys, tmp_path / "a", tmp_path / "a", "--threshold", 1)[0] == 0
    code, out, _ = diff(capsys, tmp_path / "a", tmp_path / "b", "--threshold", 0.9)
    assert code == 1 and "indices, compared by equality" in out


def other_size(a, b):
    write_tensor(b / "lm_head.bin", WHOLE_MODEL, np.ones(4, np.float32))


def other_layer(a, b):
    (b / "layer-1").rename(b / "layer-9")


def nothing_in_common(a, b):
    for path in b.rglob("*.bin"):
        path.unlink()
    write_tensor(b / "layer-1/ffn_out.bin", 1, np.ones(3, np.float32))


def other_tokens(a, b):
    write_manifest(a, tokens=[1, 2])
    write_manifest(b, tokens=[1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_size, "expected the same element count of lm_head, found 3 and 4"),
        (other_layer, "expected layer 9 in the header, found layer 1"),
        (nothing_in_common, "expected a stage that both hold, found none in common"),
        (other_tokens, "expected the same token ids, found [1, 2] and [1, 3]"),
    ],
)
def test_folders_that_cannot_be_compared(capsys, folders, change, message):
    change(*folders)
    if change is other_layer:  # in neither is it common: look at the folder itself
        folders = (folders[1], folders[1])
    code, out, err = diff(capsys, *folders)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ("zero-b.bin", "expected the same layer, found 7 and 0"),
        ("short.bin", "expected the same element count, found 4 and 1"),
        ("absent.bin", "expected an APRT tensor, found nothing"),
        (".", "expected two files or two folders, found one of each"),
    ],
)
def test_files_that_cannot_be_compared(capsys, tmp_path, b, message):
    write_tensor(tmp_path / "short.bin", 7, np.ones(1, np.float32))
    (tmp_path / "zero-b.bin").write_bytes((EXAMPLES / "zero-b.bin").read_bytes())
    code, out, err = diff(capsys, EXAMPLES / "plain-a.bin", tmp_path / b)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("bad", [["--threshold", "2"], ["--threshold", "x"], ["--limit", "-1"]])
def test_bad_options(capsys, bad):
    try:
        code = main(["diff", *map(str, example("plain")), *bad])
    except SystemExit as error:
        code = error.code
    assert code == 2 and bad[0] in capsys.readouterr().err
