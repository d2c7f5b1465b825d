"""Finds a user's own engine: by the hook in conftest.py, or by the name of a factory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_aprt.errors import AprtError, SettingsError, blame
from pytest_aprt.options import PYTHON_PREFIX

if TYPE_CHECKING:
    from pytest_aprt.settings import Settings


def user_engine(config: pytest.Config, settings: Settings) -> Any | None:
    """Return the user's engine, or None where the model is a file that we run.

    Raises:
        SettingsError: the hook or the factory raises, or there is no such factory.
    """
    engine = _guarded("the hook pytest_aprt_model", config.hook.pytest_aprt_model, config=config)
    if engine is not None or settings.model_kind != "python":
        return engine
    return _from_factory(settings.model, str(config.invocation_params.dir))


def _from_factory(source: str, folder: str) -> Any:
    """Return what ``python:module:factory`` makes; modules of the current folder are found."""
    module, _, name = source.removeprefix(PYTHON_PREFIX).partition(":")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package of the dotted name
        found = None
    if found is None:
        raise SettingsError(
            f"--aprt-model={source}: there is no module {module}; expected one that is installed, "
            f"or lies in {folder}"
        )
    loaded = _guarded(f"--aprt-model={source}: importing {module}", importlib.import_module, module)
    factory = getattr(loaded, name, None)
    if not callable(factory):
        raise SettingsError(
            f"--aprt-model={source}: module {module} has no function {name}; expected "
            "python:module:factory, where factory() returns the engine"
        )
    engine = _guarded(f"--aprt-model={source}: {name}()", factory)
    if engine is None:
        raise SettingsError(
            f"--aprt-model={source}: {name}() returned None; expected an engine, an object with "
            "layers(tokens)"
        )
    return engine


def _guarded(what: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except (AprtError, pytest.UsageError, pytest.exit.Exception):
        raise
    except (Exception, SystemExit, pytest.skip.Exception, pytest.fail.Exception) as error:
        raise SettingsError(f"{what} raised {blame(error)}") from error
