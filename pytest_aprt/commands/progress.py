"""The line on standard error that says how far a command is."""

from __future__ import annotations

import sys
import time

_PLAIN_EVERY_S = 30.0


class Progress:
    """Called after every step; rewrites one line on a terminal, else prints one every 30 s."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._started = self._last = time.monotonic()
        self._tty = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps are done, the last being ``what``."""
        now = time.monotonic()
        text = f"aprt {self._command}: {what} ({done}/{total}), {now - self._started:.1f} s"
        if self._tty:
            end = "\n" if done == total else ""
            print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
        elif done == total or now - self._last >= _PLAIN_EVERY_S:
            self._last = now
            print(text, file=sys.stderr, flush=True)
