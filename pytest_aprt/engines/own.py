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
    from pytest_aprt.settings import Side


def user_engine(config: pytest.Config, side: Side) -> Any | None:
    """Return the user's engine of a side, or None where it is something that we run.

    Raises:
        SettingsError: the hook or the factory raises, or there is no such factory.
    """
    if side.flag == "--aprt-model":
        hook = config.hook.pytest_aprt_model
        engine = _guarded("the hook pytest_aprt_model", hook, config=config)
        if engine is not None:
            return engine
    if side.kind != "python":
        return None
    return _from_factory(side.flag, side.source, str(config.invocation_params.dir))


def _from_factory(flag: str, source: str, folder: str) -> Any:
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
            f"{flag}={source}: there is no module {module}; expected one that is installed, "
            f"or lies in {folder}"
        )
    loaded = _guarded(f"{flag}={source}: importing {module}", importlib.import_module, module)
    factory = getattr(loaded, name, None)
    if not callable(factory):
        raise SettingsError(
            f"{flag}={source}: module {module} has no function {name}; expected "
            "python:module:factory, where factory() returns the engine"
        )
    engine = _guarded(f"{flag}={source}: {name}()", factory)
    if engine is None:
        raise SettingsError(
            f"{flag}={source}: {name}() returned None; expected an engine, an object with "
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
