"""Arithmetic profiles: how an engine rounds, and so what local error is normal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """One profile.

    ``tolerance`` bounds ``|model - replay| / scale`` of every slice, where the scale of a slice
    is its norm or its response to one-ulp changes of the inputs, in ulps (see ``compare.judge``).
    """

    name: str
    tolerance: float
    source: str


_ROWS = (
    Arithmetic(
        name="float32",
        tolerance=1e-5,  # 168 ulps
        source="healthy float32 engines stay below half of it (three orders of summation, 1 to "
        "64 tokens) and every planted fault exceeds it: tests/test_faults.py",
    ),
)

ARITHMETICS: dict[str, Arithmetic] = {row.name: row for row in _ROWS}
