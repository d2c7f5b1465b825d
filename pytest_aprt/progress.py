"""The line that is shown while the models run: layer, rate, time left, memory."""

from __future__ import annotations

import time
from types import TracebackType

import pytest

_PLAIN_EVERY_S = 30.0


_BAR = 12  # characters


def line(what: str, done: int, total: int, seconds: float, memory: int) -> str:
    """Return one line of plain ASCII, below 80 columns.

    Args:
        what: the layer that ran last.
        done: layers that have run.
        total: layers in all.
        seconds: since the start.
        memory: bytes.
    """
    filled = _BAR * done // total
    rate = done / seconds if seconds > 0 else 0.0
    text = f"aprt: [{'#' * filled}{'.' * (_BAR - filled)}] {what} ({done}/{total}), "
    if done < total and rate > 0:
        text += f"{rate:.2g}/s, {_duration((total - done) / rate)} left, "
    else:
        text += f"{_duration(seconds)}, "
    return text + f"{memory / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressLine:
    """Called after every layer; rewrites one line on a terminal, else prints one every 30 s.

    Args:
        config: pytest's; without a terminal reporter nothing is shown.
        started: ``time.monotonic()`` at the start.
    """

    def __init__(self, config: pytest.Config, started: float) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        quiet = config.getoption("verbose", 0) < 0  # -p no:terminal takes the option away
        self._reporter: pytest.TerminalReporter | None = None if quiet else reporter
        self._started = self._last = started
        self._text = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` layers have run, the last being ``what``."""
        from pytest_aprt.run import peak_rss

        if self._reporter is None:
            return
        now = time.monotonic()
        self._text = line(what, done, total, now - self._started, peak_rss())
        if self._reporter.isatty:
            # what is wider would wrap, and could not be written over
            width = self._reporter._tw.fullwidth
            self._reporter.rewrite(self._text[: width - 1], erase=True)
        elif now - self._last >= _PLAIN_EVERY_S:
            self._last = now
            self._reporter.write_line(self._text)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the line, so that what follows starts on its own."""
        if self._reporter is None or not self._text:
            return
        if self._reporter.isatty:
            self._reporter.write_line("")
        else:
            self._reporter.write_line(self._text)
