"""What runs the model under test: llama.cpp, another program, transformers, or a user's own."""

from __future__ import annotations

import importlib.util

from pytest_aprt.errors import SettingsError

_NEEDS = {
    # engine: the module it needs, its distribution, and our extra that installs it
    "llama.cpp": ("llama_cpp", "llama-cpp-python", "llamacpp"),
}


def require(engine: str) -> None:
    """Make sure that what an engine needs is installed.

    Raises:
        SettingsError: it is not; the message says how to install it.
    """
    if engine not in _NEEDS:
        return
    module, distribution, extra = _NEEDS[engine]
    if importlib.util.find_spec(module) is None:
        raise SettingsError(
            f"--aprt-engine={engine} needs {distribution}, which is not installed: "
            f"pip install 'pytest-aprt[{extra}]'"
        )
