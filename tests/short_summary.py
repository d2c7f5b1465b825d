"""What pytest's short summary says of a failed test, by pytest's version."""

from __future__ import annotations

import pytest


def summary(test: str, text: str) -> str:
    """A line of the summary; before 9.0 it names the test alone."""
    return f"FAILED {test} - {text}" if pytest.version_tuple >= (9,) else f"FAILED {test}"


def one_line(result):
    """The message of a usage error, having made sure that it is alone."""
    assert result.ret == 4
    text = [*result.outlines, *result.errlines]
    assert not any("Traceback" in line or "INTERNALERROR" in line for line in text)
    messages = [line for line in result.errlines if line.startswith("ERROR: ")]
    assert len(messages) == 1
    assert [line for line in result.errlines if line.strip()] == messages
    return messages[0]
