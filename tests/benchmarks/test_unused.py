"""What the installed plugin costs those who do not use it: at most 30 ms of a run of pytest.

Two commands in turn, with and without the plugin; of each the least CPU time counts, which a busy
machine changes little.
"""

from __future__ import annotations

import os
import subprocess
import sys

BOUND_S = 0.030
LEAST, MOST = 5, 25  # pairs; more than the least only while the bound seems broken
OTHERS = [f"-pno:{name}" for name in ("html", "hypothesispytest", "metadata", "pytest_cov",
                                      "randomly", "timeout", "xdist")]  # fmt: skip


def cpu_seconds(folder, *args):
    """User and system time of a run of pytest that finds no test."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *OTHERS, *args]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 5
    return used.ru_utime + used.ru_stime


def test_the_unused_plugin_costs_at_most_30_ms(tmp_path):
    with_plugin, without = [], []
    extra = float("inf")
    while len(without) < LEAST or (extra >= BOUND_S and len(without) < MOST):
        with_plugin.append(cpu_seconds(tmp_path))
        without.append(cpu_seconds(tmp_path, "-p", "no:pytest_aprt.plugin"))
        extra = min(with_plugin) - min(without)
    print(f"{1e3 * extra:.1f} ms more than {1e3 * min(without):.0f} ms")
    assert extra < BOUND_S
