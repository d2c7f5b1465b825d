"""Garbage collection, put off while a run makes what stays, and spared what has stayed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 1_000_000
"""Objects made between two collections, where Python's default is 700 to 2,000: what torch and
transformers make as they are imported, 0.6 million, stays. A run of a 0.5B pair, which makes 0.75
million in all, took 9.7 s with the default, 8.7 with 50,000; of a 7B pair 0.2 to 0.4 s less so."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage less often; what is in no circle is freed at once all the same.

    Afterwards what is there, modules above all, is looked at no more: pytest collects at its end
    to hear what objects complain of, and two looks at the modules of transformers take 0.45 s.
    What lay about before is collected first, so that pytest hears of it.
    """
    gc.collect()
    young, *older = gc.get_threshold()
    gc.set_threshold(young and max(young, _YOUNG), *older)  # 0: never, which someone chose
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
        if not gc.get_freeze_count():  # once a process: what later runs leave is to be collected
            gc.freeze()
