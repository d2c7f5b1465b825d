"""Functions of tensors that run without the interpreter's lock, so that threads do not wait for it.

Each call of torch from Python takes the lock twice, and a piece of a matrix needs some fifty: two
threads that dequantise Q4_K were no faster than one, and are 1.6 times as fast once TorchScript
runs the calls of a function as a whole (tests/benchmarks/dequant.py). torch deprecates TorchScript
in favour of what needs a C++ compiler, and gives it up from Python 3.14 on; where it refuses a
function, that function runs as it is, with the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., object])


def scripted(function: _F) -> _F:
    """Return the function compiled by TorchScript, and itself as ``__wrapped__``; else itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation, said above
        try:
            compiled: _F = torch.jit.script(function)
        except Exception:  # whatever a later torch raises, or a package without its source
            return function
    if compiled is not function:  # as it is where PYTORCH_JIT=0
        compiled.__wrapped__ = function  # type: ignore[attr-defined]
    return compiled
