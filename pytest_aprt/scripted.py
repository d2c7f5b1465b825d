"""Functions of tensors that run without the interpreter's lock, so that threads do not wait for it.

Each call of torch from Python lets the lock go and waits for it again, and a piece of a Q4_K matrix
takes 75. In pieces of 256 K weights two threads dequantise no faster than one (1.7 G weights a
second), and at 2.9 G once TorchScript runs the calls of a function as a whole
(tests/benchmarks/dequant.py with APRT_KERNELS=torch, and without it where PYTORCH_JIT=0). torch
deprecates TorchScript for what needs a C++ compiler, and says that it may break from Python 3.14
on; where it refuses a function, that function runs as it is, with the same result.
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
