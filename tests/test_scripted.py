"""Functions that TorchScript compiles: which they are, and that they do without."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from pytest_aprt import matrices
from pytest_aprt.rungs import distances
from pytest_aprt.scripted import scripted
from pytest_aprt.sources.dequant import KERNELS

HOT = {
    **KERNELS,
    "multiply": inspect.unwrap(matrices._multiply_by_torch),
    "sieved": inspect.unwrap(distances._sieve_by_torch),
}


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x + x


def compiles() -> bool:
    """Whether TorchScript compiles anything: not with PYTORCH_JIT=0, or on too new a Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return isinstance(torch.jit.script(doubled), torch.jit.ScriptFunction)
        except Exception:
            return False


COMPILED = pytest.mark.skipif(not compiles(), reason="TorchScript compiles nothing here")


@COMPILED
@pytest.mark.parametrize("name", HOT)
def test_hot_functions_are_compiled(name):
    """Else all would work, and be slow."""
    assert isinstance(scripted(HOT[name]), torch.jit.ScriptFunction)


def test_what_torch_refuses_runs_as_it_is():
    def refused(*x):
        yield from x

    assert scripted(refused) is refused


def test_torch_may_be_told_to_compile_nothing():
    code = "from pytest_aprt.scripted import scripted as s; f = lambda x: x; assert s(f) is f; "
    code += "assert not hasattr(f, '__wrapped__')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTORCH_JIT": "0"}, check=True)


def test_nothing_is_said_of_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scripted(KERNELS["Q8_0"])


def test_the_sieve_is_the_same_either_way():
    generator = torch.Generator().manual_seed(0)
    model, oracle = (torch.randn(20, 512, generator=generator) for _ in range(2))
    found = [f(model, oracle, 256, torch.empty(20, 512))
             for f in (distances._sieve_by_torch, HOT["sieved"])]  # fmt: skip
    assert found[0] == found[1]


@COMPILED
def test_the_lock_is_free_meanwhile():
    """Python goes on in one thread while a compiled function runs for long in another."""

    def long(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200_000):
            x.add_(1)
        return x

    run, steps = scripted(long), 0
    thread = threading.Thread(target=run, args=(torch.zeros(1),))
    thread.start()
    while thread.is_alive() and steps < 100:
        thread.join(1e-4)
        steps += 1
    assert steps == 100
    thread.join()
