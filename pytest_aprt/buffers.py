"""Memory: what each thread keeps for what it computes again and again, and what is given back.

Fresh memory is dear: in a thread that is not the main one the C library gives every large block
back to the system, which hands it out again page by page, zeroed. The passes over a 7B pair took a
third less time once their temporaries were kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_own = threading.local()

_HELD = 64 << 20
"""Bytes of free memory that are kept for the next step. Without, the largest points of a 7B pair
lie in fresh pages in every layer, 400 to 6,500 of a point, and a run takes 0.6 s more; 16 MB spare
nothing."""

_LARGEST = 8 << 20
"""Bytes of the largest block that is kept; those of larger ones are mapped and unmapped."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def hold_on() -> None:
    """From now on, let the C library keep free memory for what comes next, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, _HELD)  # glibc's
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)


def give_back() -> None:
    """Give memory that is free back to the system, where the C library can.

    What is kept of every step lies between the large blocks that are free again, so that the next
    ones do not fit there.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of this thread to be written to.

    What it held before, and who asked last for the same ``name``, is overwritten.
    """
    memory, views = _own.__dict__.setdefault("kept", ({}, {}))
    key = name, *shape, dtype
    found: Tensor | None = views.get(key)  # a view costs three calls of torch
    if found is None:
        size = math.prod(shape) * dtype.itemsize
        if name not in memory or memory[name].numel() < size:
            memory[name] = torch.empty(size, dtype=torch.uint8)
            for old in [other for other in views if other[0] == name]:
                del views[old]
        found = views[key] = memory[name][:size].view(dtype).view(*shape)
    return found
