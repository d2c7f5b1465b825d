"""YAML 1.2 from parser events: plain values that know their lines, and nothing dangerous.

Scalars follow the core schema (``1e-6`` is a number, ``no`` and ``2026-02-08`` are text), as the
field's own tools read them. Refused with file and line: duplicate keys, aliases that multiply,
deep nesting, tags of objects, a second document, text that is no UTF-8, and files beyond 4 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_aprt.errors import ContractError
from pytest_aprt.sources._files import file_size, one_line, reason

MAX_BYTES = 4 << 20  # the largest known contract has 99 kB
MAX_DEPTH = 64
MAX_VALUES = 200_000  # counted after aliases are expanded

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-")
       for word in (".inf", ".Inf", ".INF")},
}  # fmt: skip
_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq"))


class Map(dict[str, Any]):
    """A mapping; ``lines`` has the line of every key, ``line`` that of the first."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}

    def line_of(self, key: str) -> int:
        """Return the line of a key, or of the mapping where the key is absent."""
        return self.lines.get(key, self.line)


class Seq(list[Any]):
    """A sequence; ``lines`` has the line of every item."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: Map, Seq, str, int, float, bool or None.

    Raises:
        ContractError: the file cannot be read, or is refused; the message has file and line.
    """
    size = file_size(path, "a YAML file")
    if size > MAX_BYTES:
        raise ContractError(
            f"{one_line(path)}: expected a contract of at most {MAX_BYTES >> 20} MiB, found "
            f"{size:,} bytes: is another file meant?"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ContractError(
            f"{one_line(path)}:{line}: expected UTF-8, found byte {data[error.start]:#04x}: save "
            "the file as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of the one document in ``text``; ``name`` is the file's, for messages.

    Raises:
        ContractError: no valid YAML, or refused; the message has name and line.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(name).build(yaml.parse(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ContractError(f"{one_line(name)}{line}: no valid YAML: {one_line(problem)}") from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", None)
        line = "" if position is None else f":{text.count(chr(10), 0, position) + 1}"
        raise ContractError(f"{one_line(name)}{line}: no valid YAML: {reason(error)}") from None


class _Builder:
    """Puts events together without recursion, so that no nesting can exhaust the stack."""

    def __init__(self, name: str) -> None:
        self._name = one_line(name)
        self._anchors: dict[str, tuple[Any, int]] = {}  # value, and how many values it expands to
        self._count = 0

    def build(self, events: Iterator[Any]) -> Any:
        """Return the value of the one document; None where there is none."""
        from yaml import events as kinds

        open_: list[_Open] = []
        found: list[Any] = []
        documents = 0
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, kinds.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(line, "expected one document, found a second: split the file")
            elif isinstance(event, kinds.CollectionStartEvent):
                self._check_tag(event.tag, line)
                if len(open_) >= MAX_DEPTH:
                    raise self._error(line, f"nested more than {MAX_DEPTH} deep: flatten the file")
                is_map = isinstance(event, kinds.MappingStartEvent)
                value: Any = Map(line) if is_map else Seq(line)
                open_.append(_Open(value, event.anchor, line, self._count))
            elif isinstance(event, kinds.CollectionEndEvent):
                done = open_.pop()
                if done.anchor:
                    self._anchors[done.anchor] = (done.value, self._count - done.before + 1)
                self._put(open_, found, done.value, done.line, 1)
            elif isinstance(event, kinds.ScalarEvent):
                value = self._scalar(event, line)
                if event.anchor:
                    self._anchors[event.anchor] = (value, 1)
                self._put(open_, found, value, line, 1, event.value)
            elif isinstance(event, kinds.AliasEvent):
                if event.anchor not in self._anchors:
                    raise self._error(line, f"alias *{event.anchor} has no anchor before it")
                value, size = self._anchors[event.anchor]
                self._put(open_, found, value, line, size)
        return found[0] if found else None

    def _put(
        self, open_: list[_Open], found: list[Any], value: Any, line: int, size: int,
        text: str | None = None,
    ) -> None:  # fmt: skip
        self._count += size
        if self._count > MAX_VALUES:
            raise self._error(line, f"more than {MAX_VALUES:,} values once aliases are expanded")
        if not open_:
            found.append(value)
            return
        holder = open_[-1]
        if isinstance(holder.value, Seq):
            holder.value.append(value)
            holder.value.lines.append(line)
        elif holder.key is None:
            holder.key = self._key(holder.value, value, line, text)
        else:
            holder.value[holder.key] = value
            holder.key = None

    def _key(self, holder: Map, value: Any, line: int, text: str | None) -> str:
        if isinstance(value, (Map, Seq)):
            raise self._error(line, "expected a plain key, found a list or mapping as a key")
        key = str(value) if text is None else text
        if key in holder.lines:
            raise self._error(
                line, f"duplicate key {key!r}, first in line {holder.lines[key]}: keep one",
                "SCHEMA-020",
            )  # fmt: skip
        holder.lines[key] = line
        return key

    def _scalar(self, event: Any, line: int) -> Any:
        self._check_tag(event.tag, line)
        if event.tag in (f"{_TAG}str", "!") or event.style:
            return event.value
        return scalar(event.value)

    def _check_tag(self, tag: str | None, line: int) -> None:
        if tag is not None and tag != "!" and tag not in _TAGS:
            raise self._error(line, f"tag {one_line(tag)} is not allowed: write plain values")

    def _error(self, line: int, text: str, rule: str | None = None) -> ContractError:
        return ContractError(f"{self._name}:{line}: {text}", rule)


class _Open:
    """A collection that is being read, and the key that waits for its value."""

    def __init__(self, value: Any, anchor: str | None, line: int, before: int) -> None:
        self.value, self.anchor, self.line, self.before = value, anchor, line, before
        self.key: str | None = None


def scalar(text: str) -> Any:
    """Return the value of a plain scalar by the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text) if len(text) < 400 else text
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def as_plain(value: Any) -> Any:
    """Return the value without lines, as dict and list."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    return value
