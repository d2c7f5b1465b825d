"""The hot path in C, where a compiler was at hand as the package was built.

Where it was not, or where ``APRT_KERNELS=torch`` says so, its users do the same with torch, and a
7B pair takes half as long again (evidence/benchmarks). Memory is handed over by address, so every
tensor must lie in one piece; none is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, Array, c_char_p, c_double, c_int64, c_void_p
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TOKENS = 35
"""Tokens up to which ``product`` takes less time than oneDNN: half of it at 7, two thirds at 14, a
twentieth less at 35 (tests/benchmarks/compiled.py)."""

_FUNCTIONS = {
    # arguments, as kernels.h has them
    "product": (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64),
    "sieve": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    **dict.fromkeys(
        ("q4_0", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k"), (c_void_p, c_int64, c_void_p)
    ),
}

Product = Callable[[Tensor, Tensor, Tensor, int], bool]
Sieve = Callable[[Tensor, Tensor, int], tuple[float, float, float] | None]


def _loaded() -> CDLL | None:
    found = find_spec(f"{__name__}._kernels")
    if found is None or found.origin is None or os.environ.get("APRT_KERNELS") == "torch":
        return None
    with suppress(OSError):  # built for another machine
        return CDLL(found.origin)
    return None


def _processor() -> str:
    if _library is None:
        return ""
    _library.processor.restype = c_char_p
    name: bytes = _library.processor()
    return name.decode()


_library = _loaded()

PROCESSOR = _processor()
"""Whose versions of the functions run here: ``avx512`` or ``avx2``; empty where neither does."""


def _function(name: str, processor: str) -> Any | None:
    found = getattr(_library, f"{name}_{processor}", None)
    if found is not None:
        found.argtypes, found.restype = _FUNCTIONS[name], None
    return found


def unpack_of(kind: str, processor: str = PROCESSOR) -> Callable[[Tensor, Tensor], None] | None:
    """Return what decodes a tensor type, as ``sources.dequant.Unpack``; None where nothing does."""
    call = _function(kind.lower(), processor)
    if call is None:
        return None

    def unpack(blocks: Tensor, out: Tensor) -> None:
        if not (blocks.is_contiguous() and _is_plain(out)):
            raise ValueError("expected blocks, and float32 to fill, that lie in one piece each")
        call(blocks.data_ptr(), len(blocks), out.data_ptr())

    return unpack


def product_of(processor: str = PROCESSOR) -> Product:
    """Return what fills columns of ``out`` from ``start`` on with ``x @ weights.T``.

    It returns whether it did: it is for few tokens, for columns in sixteens, and for float32 in one
    piece.
    """
    call = _function("product", processor)

    def product(x: Tensor, weights: Tensor, out: Tensor, start: int) -> bool:
        rows, columns = weights.shape
        fits = len(x) <= TOKENS and columns % 16 == 0 and out.stride(1) == 1
        if call is None or not fits or not all(map(_is_plain, (x, weights))):
            return False
        place = out.data_ptr() + start * out.itemsize
        call(x.data_ptr(), len(x), weights.data_ptr(), rows, columns, place, out.stride(0))
        return True

    return product


def sieve_of(processor: str = PROCESSOR) -> Sieve:
    """Return what finds the squared error of rows, their squared norm, and how far a run may lie.

    The last is the largest squared error of a run of columns beside the squared norm of its row,
    NaN where one of them is. None for what it is not for: it takes float32, in one piece.
    """
    call = _function("sieve", processor)

    def sieve(model: Tensor, oracle: Tensor, run: int) -> tuple[float, float, float] | None:
        if call is None or not all(map(_is_plain, (model, oracle))):
            return None
        found: Array[c_double] = (c_double * 3)()
        rows, columns = oracle.shape
        call(model.data_ptr(), oracle.data_ptr(), rows, columns, run, found)
        error, norm, farthest = found
        return error, norm, farthest

    return sieve


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()
