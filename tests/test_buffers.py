"""Memory that is kept, and given back: by the C library, or by none."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

from pytest_aprt import buffers

RUN = """
import resource, sys, torch
from pytest_aprt.buffers import hold_on
if sys.argv[1] == "held":
    hold_on()
def step():
    return [torch.ones(1 << 19) for _ in range(16)]  # 2 MB each
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# What glibc begins with. Left alone it learns, by chance in the first step or never.
BEFORE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def faults(how):
    """Pages that ten steps of 32 MB fault in, which are 82,000 if each is given back."""
    command, env = [sys.executable, "-c", RUN, how], {**os.environ, **BEFORE}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(re.search(r"faults (\d+)", done.stdout)[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_free_memory_is_kept_for_the_next_step():
    free, held = faults("free"), faults("held")
    assert held * 4 < free


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library_is_let_be(error, monkeypatch):
    def absent(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", absent)
    buffers.hold_on()
    buffers.give_back()
