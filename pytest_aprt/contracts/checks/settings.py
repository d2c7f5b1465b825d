"""The settings of a ``check:`` mapping: what may be written, read into what the check uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pytest_aprt.errors import AprtError
from pytest_aprt.stages import stage_named, stages_named

Layers = Callable[[int], list[int]]
"""Given the number of layers, returns the chosen ones."""

REQUIRED = object()


class Setting(NamedTuple):
    """One setting: how its value is read, and what it is where absent."""

    read: Callable[[Any], Any]
    default: Any = None


def number(value: Any) -> float:
    """Read a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a number")
    return float(value)


def share(value: Any) -> float:
    """Read a number from 0 to 1."""
    if not 0 <= number(value) <= 1:
        raise ValueError("expected a number from 0 to 1")
    return float(value)


def count(value: Any) -> int:
    """Read a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected a whole number above 0")
    return value


def flag(value: Any) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """Read a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected some text")
    return value.strip()


def texts(value: Any) -> list[str]:
    """Read a list of texts, or one."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("expected at least one text")
    return [text(item) for item in items]


def one_of(*valid: str) -> Callable[[Any], str]:
    """Return a reader of one of the words."""

    def read(value: Any) -> str:
        if value not in valid:
            raise ValueError(f"expected one of {', '.join(valid)}")
        return str(value)

    return read


def some_of(*valid: str) -> Callable[[Any], list[str]]:
    """Return a reader of a list of some of the words."""
    return lambda value: [one_of(*valid)(item) for item in texts(value)]


def stages(value: Any) -> list[str]:
    """Read ``all``, a list of stages, or stages with commas between; in computation order."""
    return [stage.name for stage in stages_named(",".join(texts(value)))]


def sequence(value: Any) -> list[str]:
    """Read a list of at least two stages, in the order written."""
    names = [stage_named(item).name for item in texts(value)]
    if len(names) < 2:
        raise ValueError("expected at least two stages")
    return names


def layers(value: Any) -> Layers:
    """Read ``all``, ``A..B`` (end exclusive), a number, or a list of numbers."""
    if value == "all":
        return lambda n: list(range(n))
    span = re.fullmatch(r"(\d+)\.\.(\d+)", value) if isinstance(value, str) else None
    chosen = value if isinstance(value, list) else [value]
    if span and int(span[1]) < int(span[2]):
        chosen = list(range(int(span[1]), int(span[2])))
    elif not all(type(item) is int and item >= 0 for item in chosen) or not chosen:
        raise ValueError("expected all, A..B with A < B, or numbers such as [0, 13]")
    return lambda n: [item for item in chosen if item < n]


def span(value: Any) -> tuple[float, float]:
    """Read two numbers, the lower first."""
    if not (isinstance(value, list) and len(value) == 2):
        raise ValueError("expected two numbers, such as [0.5, 2]")
    low, high = map(number, value)
    if low > high:
        raise ValueError("expected the lower number first")
    return low, high


def read_settings(given: Mapping[str, Any], known: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the settings of a check.

    Raises:
        ValueError: an unknown or missing setting, or a value that is not valid.
    """
    unknown = set(given) - set(known) - {"kind"}
    if unknown:
        valid = ", ".join(known) or "none"
        raise ValueError(f"setting {min(unknown)!r} is unknown: expected some of: {valid}")
    result = {}
    for name, setting in known.items():
        if name not in given:
            if setting.default is REQUIRED:
                raise ValueError(f"setting {name} is missing")
            result[name] = setting.default
            continue
        try:
            result[name] = setting.read(given[name])
        except (ValueError, AprtError) as error:
            raise ValueError(f"{name}: {error}, found {given[name]!r:.80}") from None
    return result
