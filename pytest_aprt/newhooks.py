"""Hooks that conftest.py files and plugins can implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_aprt.capture import Engine


@pytest.hookspec(firstresult=True)
def pytest_aprt_model(config: pytest.Config) -> Engine | Any | None:
    """Return the engine under test, or None for the one that the options name.

    An engine is any object with ``layers(tokens)``: it yields ``(layer, {stage: array})`` for
    every layer in order, and at last ``(None, {"final_norm": ..., "lm_head": ...})``. Weights for
    shadow and replay are those of ``--aprt-weights``, or of ``--aprt-model`` where that is a GGUF.
    """
