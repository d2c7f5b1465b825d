"""Garbage collection, put off while a run makes what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 50_000
"""Objects made between two collections, where Python's default is 700 to 2,000: importing torch and
transformers makes a million that stay, and each round looked at them took 0.6 of 2.4 s."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage less often; what is in no circle is freed at once all the same."""
    young, *older = gc.get_threshold()
    gc.set_threshold(young and max(young, _YOUNG), *older)  # 0: never, which someone chose
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
