"""The line that is shown while the models run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_aprt.progress import ProgressLine, line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("layer 12", 13, 29, 26.0, 447_000_000),
         "aprt: [#####.......] layer 12 (13/29), 0.5/s, 32.0 s left, 447 MB"),
        (("layer 0", 1, 29, 300.0, 31_500_000_000),
         "aprt: [............] layer 0 (1/29), 0.0033/s, 2 h 20 min left, 31,500 MB"),
        (("layer 0", 1, 3, 100.0, 1_000_000),
         "aprt: [####........] layer 0 (1/3), 0.01/s, 3 min left, 1 MB"),
        (("final norm and head", 29, 29, 61.0, 447_000_000),
         "aprt: [############] final norm and head (29/29), 1 min, 447 MB"),
        (("layer 0", 1, 2, 0.0, 0), "aprt: [######......] layer 0 (1/2), 0.0 s, 0 MB"),
    ],
)  # fmt: skip
def test_the_line_has_layer_rate_time_left_and_memory(given, expected):
    assert line(*given) == expected
    assert len(expected) <= 80


def test_the_line_is_no_wider_than_the_terminal():
    """A line that wraps cannot be written over."""
    shown = []
    reporter = SimpleNamespace(
        isatty=True,
        _tw=SimpleNamespace(fullwidth=40),
        rewrite=lambda text, erase: shown.append(text),
        write_line=shown.append,
    )
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    config = SimpleNamespace(pluginmanager=plugins, getoption=lambda name, default: 0)
    with ProgressLine(config, 0.0) as progress:
        progress("layer 0", 1, 29)
    assert shown[0].startswith("aprt: [") and len(shown[0]) == 39
