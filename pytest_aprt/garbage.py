"""Garbage collection, put off while a run makes what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 50_000
"""Objects made between two collections, where Python's default is 700 to 2,000: what torch and
transformers make as they are imported stays. A run on a 0.5B pair took 8.7 s with it, else 9.7."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage less often; what is in no circle is freed at once all the same."""
    young, *older = gc.get_threshold()
    gc.set_threshold(young and max(young, _YOUNG), *older)  # 0: never, which someone chose
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
