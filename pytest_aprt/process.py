"""Programs in processes of their own: what they write is read, their end is explained."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from pytest_aprt.errors import EngineError

_SHOWN, _WIDTH = 4, 300
"""Lines of what a failed process printed that its error shows, and characters of each."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f]")

_READ = 1 << 16
"""Bytes of what a process printed last that are read: some print without end."""


class Child:
    """A module of Python's run as a process; ended, if it has not, with the ``with`` block.

    Args:
        name: what to call it in messages.
        module: it is run as ``python -m`` runs it, with this process's import path.
        request: the first line of its standard input.
        env: what its environment has besides this process's.
    """

    def __init__(
        self, name: str, module: str, request: str, env: Mapping[str, str] | None = None
    ) -> None:
        self._name, self._module, self._request, self._env = name, module, request, env or {}

    def __enter__(self) -> Child:
        """Start the process."""
        self._errors = tempfile.TemporaryFile()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": paths, **self._env},
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, cast(io.BufferedReader, self._process.stdout)
        with contextlib.suppress(EngineError):  # whoever reads is told why
            self.send(self._request)
        return self

    def send(self, line: str) -> None:
        """Write a line to its standard input.

        Raises:
            EngineError: it ended before.
        """
        try:
            self._in.write(line.encode() + b"\n")
            self._in.flush()
        except BrokenPipeError:
            raise self._ended() from None

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
        return EngineError(f"{self._name} {ending(code)}: {tail(_text(self._errors))}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process, which has nothing to lose."""
        if self._process.poll() is None and kind is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        self._out.close()
        self._process.wait()
        self._errors.close()


def finished(
    command: Sequence[str],
    timeout_s: float,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run a program to its end, and return its exit code and what it printed last.

    At the limit, and where this process is interrupted, it ends with all its children.

    Args:
        command: the program and its arguments; no shell sees them.
        timeout_s: the limit.
        folder: the current folder, if another one.
        env: the environment, if another one.

    Raises:
        subprocess.TimeoutExpired: the limit was reached; it holds what was printed.
        OSError: the program cannot be started.
    """
    # A file and not a pipe: a child that lives on cannot keep it from being read.
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the session that was started above
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                error.output = _text(printed)
            raise
        return code, _text(printed)


def _text(printed: IO[bytes]) -> str:
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - _READ))
    return printed.read().decode(errors="replace")


def ending(code: int) -> str:
    """Return how a process ended, in words: by which signal, or with which exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def tail(text: str, lines: int = _SHOWN) -> str:
    """Return the last lines that a process printed, as one, without what would move a cursor."""
    plain = (_CONTROL.sub(" ", line).strip() for line in text.splitlines())
    found = [line for line in plain if line][-lines:]
    short = (line if len(line) <= _WIDTH else f"{line[:_WIDTH]} ..." for line in found)
    return " | ".join(short) or "it printed nothing"
