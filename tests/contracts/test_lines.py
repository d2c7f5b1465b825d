"""YAML as the field writes it, and what is refused with file and line."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_aprt.contracts.lines import MAX_BYTES, as_plain, parse_yaml, read_yaml
from pytest_aprt.errors import ContractError


@pytest.mark.parametrize(("text", "value"), [
    ("1e-6", 1e-6), ("1.0e-4", 1e-4), (".5", 0.5), ("5.", 5.0), ("-1E+3", -1000.0), ("12", 12),
    ("-3", -3), ("0x1F", 31), ("0o17", 15), ("017", 17), ("1_000", "1_000"),
    ("2026-02-08", "2026-02-08"), ("12:30:45", "12:30:45"),
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("true", True), ("False", False),
    ("~", None), ("null", None), ("", None), ("'1'", "1"), ('"true"', "true"), ("!!str 1", "1"),
    ("1.0.0", "1.0.0"), ("=", "="), ("-.inf", float("-inf")), ("|\n  a\n  b\n", "a\nb\n"),
    ("1" * 500, "1" * 500),
])  # fmt: skip
def test_scalars_follow_the_core_schema(text, value):
    found = parse_yaml(f"key: {text}\n", "a.yaml")["key"]
    assert found == value and type(found) is type(value)


def test_nan_is_a_number():
    assert str(parse_yaml("a: .nan", "a.yaml")["a"]) == "nan"


def test_lines_are_known():
    text = "# comment\n---\na: 1\nb:\n  - x\n  # between\n"
    text += "  - y: 2\n    z: |\n      1\n      2\nc: {d: 3}\n"
    data = parse_yaml(text, "a.yaml")
    assert data.lines == {"a": 3, "b": 4, "c": 11}
    assert data["b"].lines == [5, 7]
    assert data["b"][1].lines == {"y": 7, "z": 8}
    assert data.line_of("absent") == 3


def test_anchors_are_expanded():
    data = parse_yaml("a: &x {k: [1, 2]}\nb: *x\nc: [*x, *x]\n", "a.yaml")
    assert as_plain(data) == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": [{"k": [1, 2]}] * 2}


def bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(("text", "line", "says"), [
    ("a: 1\nb: 2\na: 3\n", 3, "duplicate key 'a', first in line 1"),
    ("x:\n  - {k: 1, k: 2}\n", 2, "duplicate key 'k'"),
    ("1: a\n'1': b\n", 2, "duplicate key '1'"),
    (bomb(), 6, "more than 200,000 values"),
    ("a: &x [*x]\n", 1, "alias *x has no anchor before it"),
    ("a: *nowhere\n", 1, "alias *nowhere has no anchor"),
    ("a: 1\nb: " + "[" * 100_000 + "]" * 100_000, 2, "nested more than 64 deep"),
    ("a: !!python/object/apply:os.system [ls]\n", 1, "tag tag:yaml.org,2002:python"),
    ("a: !secret x\n", 1, "tag !secret is not allowed"),
    ("a: 1\n---\nb: 2\n", 2, "expected one document, found a second"),
    ("a: 1\n  b: 2\n", 2, "no valid YAML"),
    ("a: 'open\n\n\n", 4, "no valid YAML"),
    ("a: 1\n\tb: 2\n", 2, "no valid YAML"),
    ("? [a, b]\n: 1\n", 1, "expected a plain key"),
    ("a: \x01\n", 1, "no valid YAML"),
])  # fmt: skip
def test_what_is_refused_is_told_with_its_line(text, line, says):
    started = time.monotonic()
    with pytest.raises(ContractError) as caught:
        parse_yaml(text, "a.yaml")
    assert str(caught.value).startswith(f"a.yaml:{line}: "), caught.value
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("data", [b"a: \xff\n", b"ok: 1\nb: \xe9t\xe9\n", "a: 1".encode("utf-16")])
def test_what_is_no_utf8_is_told_with_its_line(data, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    line = 2 if data.startswith(b"ok") else 1
    with pytest.raises(ContractError, match=rf"a.yaml:{line}: expected UTF-8, found byte 0x"):
        read_yaml(path)


def test_a_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: \xc3\xa9\r\n")
    assert read_yaml(path) == {"a": 1, "b": "é"}


def test_a_file_of_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    started = time.monotonic()
    with pytest.raises(ContractError, match=r"at most 4 MiB, found 100,000,000 bytes"):
        read_yaml(path)
    assert time.monotonic() - started < 1


def test_a_file_of_the_largest_size_is_read_in_bounded_time(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: |\n" + "  text\n" * (MAX_BYTES // 7 - 2))
    started = time.monotonic()
    assert len(read_yaml(path)["a"]) > MAX_BYTES // 2
    assert time.monotonic() - started < 20


@given(st.text(max_size=200))
def test_no_text_crashes_the_reader(text):
    try:
        parse_yaml(text, "a.yaml")
    except ContractError as error:
        assert str(error).startswith("a.yaml") and "\n" not in str(error)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF, exclude_categories=["Cc"])),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("abcdef", min_size=1), inner, max_size=3),
    max_leaves=20,
))  # fmt: skip
def test_json_is_read_as_it_is(value):
    import json

    assert (
        as_plain(parse_yaml(json.dumps({"v": value}, ensure_ascii=False), "a.yaml"))["v"] == value
    )
