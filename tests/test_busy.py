"""Busy neighbours take their share of the cores from a run, and do not make it work more.

Threads that wait for each other inside a product spin while the other one's core is taken.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import pytest
from harness import fixture_pair

from pytest_aprt import matrices, weights
from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.cores import available_cores
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.measure import measure_pair
from pytest_aprt.readings import Prompt

PROMPT = Prompt(text="", tokens=tuple(range(5, 69)))
SPIN = "print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def busy_cores():
    processes = [
        subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE)
        for _ in range(available_cores())
    ]
    try:
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def cpu_seconds(pair):
    engine = BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture)
    started = time.process_time()
    measure_pair(pair, engine, [PROMPT], pair.graph.points, PROFILES["float32"])
    return time.process_time() - started


@pytest.mark.parametrize("whole", [1 << 22, 0], ids=["held", "streamed"])
def test_busy_neighbours(whole, monkeypatch):
    """Measured on 2 cores: 1.0 and 1.1 times the CPU time, and 1.5 times the wall time.

    With two threads in each product it is 2.0 and 2.2 times, and 4 times the wall time.
    """
    monkeypatch.setattr(weights, "WHOLE", whole)
    monkeypatch.setattr(matrices, "PIECE", 1 << 14)
    pair = fixture_pair()
    cpu_seconds(pair)
    alone = min(cpu_seconds(pair) for _ in range(3))
    with busy_cores():
        beside = min(cpu_seconds(pair) for _ in range(3))
    print(f"{alone:.2f} s of CPU alone, {beside:.2f} s beside busy neighbours")
    assert beside < 1.6 * alone
