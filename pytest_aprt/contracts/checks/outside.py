"""What runs outside this process: a pytest node, and shell lines where they are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_aprt.contracts.references import root_of
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject
from pytest_aprt.process import finished

_TAIL = 400  # characters of output that a detail shows
NOT_RUN = {5: "no test was collected", 4: "the node cannot be run"}


def pytest(subject: Subject, *, node: str, timeout_s: float) -> Finding:
    """Run a node in a pytest of its own; skipped tests are not evidence."""
    root = root_of(subject.contract.path, node.partition("::")[0])
    if root is None:
        raise BlockedError(f"{node} is not there")
    # Nothing of the outer run's options may reach the inner one.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "APRT_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", node]
    code, output = run_limited(command, root, timeout_s, env)
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    if code in NOT_RUN:
        raise BlockedError(f"{node}: {NOT_RUN[code]} ({last[-_TAIL:]})")
    if code == 0 and " passed" not in f" {last}":
        raise BlockedError(f"{node}: nothing passed ({last[-_TAIL:]})")
    text = f"{node}: {last}" if code == 0 else f"{node}: {output.strip()[-_TAIL:]}"
    return Finding(held=code == 0, detail=text, values={"exit": code})


def shell(subject: Subject, *, line: str, timeout_s: float) -> Finding:
    """Run a contract's shell line with ``sh``, in the folder that pytest calls its root."""
    code, output = run_limited(["sh", "-c", line], subject.root, timeout_s, None)
    tail = " ".join(output.split())[-_TAIL:]
    if code in (126, 127):
        raise BlockedError(f"the command is not there: {tail}")
    return Finding(held=code == 0, detail=f"exit {code}: {tail}" if tail else f"exit {code}",
                   values={"exit": code})  # fmt: skip


def run_limited(
    command: Sequence[str], folder: Path, timeout_s: float, env: dict[str, str] | None
) -> tuple[int, str]:
    """Run a command with a limit on time; at the limit it ends with all its children.

    Raises:
        BlockedError: the limit was reached, or the command cannot be started.
    """
    try:
        return finished(command, timeout_s, folder, env)
    except OSError as error:
        raise BlockedError(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise BlockedError(f"stopped after {timeout_s:g} s") from None
