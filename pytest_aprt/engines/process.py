"""An engine in a process of its own: what it writes is read as it comes, its end is explained."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import cast

from pytest_aprt.errors import EngineError

_SHOWN = 4
"""Lines of what a failed process printed that its error shows."""


class Child:
    """A module of Python's run as a process; ended, if it has not, with the ``with`` block.

    Args:
        name: what to call it in messages.
        module: it is run as ``python -m`` runs it, with this process's import path.
        request: text for its standard input.
    """

    def __init__(self, name: str, module: str, request: str) -> None:
        self._name, self._module, self._request = name, module, request

    def __enter__(self) -> Child:
        """Start the process."""
        self._errors = tempfile.TemporaryFile()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # ggml would start a debugger to print where it was.
            env={**os.environ, "PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"},
        )
        assert self._process.stdin and self._process.stdout
        self._out = cast(io.BufferedReader, self._process.stdout)
        try:
            self._process.stdin.write(self._request.encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended already; whoever reads is told why
        return self

    def line(self) -> bytes:
        """Return the next line that it writes.

        Raises:
            EngineError: it ended instead.
        """
        found: bytes = self._out.readline()
        if not found.endswith(b"\n"):
            raise self._ended()
        return found

    def bytes(self, count: int) -> bytearray:
        """Return the next ``count`` bytes that it writes.

        Raises:
            EngineError: it ended before.
        """
        found = bytearray(count)
        if self._out.readinto(found) != count:
            raise self._ended()
        return found

    def _ended(self) -> EngineError:
        code = self._process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace")
        return EngineError(f"{self._name} {ending(code)}: {tail(printed)}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process, which has nothing to lose."""
        if self._process.poll() is None and kind is not None:
            self._process.kill()
        self._out.close()
        self._process.wait()
        self._errors.close()


def ending(code: int) -> str:
    """Return how a process ended, in words: by which signal, or with which exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def tail(text: str, lines: int = _SHOWN) -> str:
    """Return the last lines that a process printed, as one."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(found[-lines:]) or "it printed nothing"
