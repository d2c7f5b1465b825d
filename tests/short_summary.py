"""What pytest's short summary says of a failed test, by pytest's version."""

from __future__ import annotations

import pytest


def summary(test: str, text: str) -> str:
    """A line of the summary; before 9.0 it names the test alone."""
    return f"FAILED {test} - {text}" if pytest.version_tuple >= (9,) else f"FAILED {test}"
