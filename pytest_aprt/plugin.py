"""The pytest hooks. Unused, the plugin costs no import of numpy or torch."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from pytest_aprt.options import OPTIONS

_INI_TYPES: dict[str, Literal["bool", "linelist", "string"]] = {
    "flag": "bool",
    "list": "linelist",
    "value": "string",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add every option and its ini twin."""
    group = parser.getgroup("aprt", "forward-pass parity (pytest-aprt)")
    for option in OPTIONS:
        shown = {"help": option.help, "dest": option.key}
        if option.kind == "flag":
            group.addoption(option.flag, action="store_true", default=None, **shown)
        else:
            action = "append" if option.kind == "list" else "store"
            group.addoption(option.flag, action=action, metavar=option.metavar, **shown)
        parser.addini(
            option.key,
            f"{option.help} (as {option.flag})",
            type=_INI_TYPES[option.kind],
            default=None,
        )


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hook by which an engine of one's own enters."""
    from pytest_aprt import newhooks

    pluginmanager.add_hookspecs(newhooks)


def pytest_configure(config: pytest.Config) -> None:
    """Validate the settings and open the files, once, on the controller."""
    from pytest_aprt import fixtures

    config.pluginmanager.register(fixtures, "aprt_fixtures")
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        if "aprt" in workerinput:
            from pytest_aprt.workbench import NAME, Workbench

            workbench = Workbench.of_worker(config, workerinput["aprt"])
            config.pluginmanager.register(workbench, NAME)
        _configure_contracts(config)
        return
    if _option(config, "aprt_model"):
        from pytest_aprt.errors import AprtError
        from pytest_aprt.workbench import NAME, Workbench

        try:
            config.pluginmanager.register(Workbench.of_controller(config, _option), NAME)
        except AprtError as error:
            raise pytest.UsageError(str(error)) from error
    _configure_contracts(config)


def _configure_contracts(config: pytest.Config) -> None:
    """Read the contracts of the opted-in folders, if there are any."""
    if not (_option(config, "aprt_model") or _option(config, "aprt_contracts")):
        return
    from pytest_aprt.contracts.plugin import NAME, plugin_of
    from pytest_aprt.errors import AprtError

    try:
        plugin = plugin_of(config, _option)
    except AprtError as error:
        raise pytest.UsageError(str(error)) from error
    if plugin is not None:
        config.pluginmanager.register(plugin, NAME)


def _option(config: pytest.Config, key: str) -> Any:
    """Return an option: command line, else ini, else None. Paths of an ini lie beside it."""
    value = config.getoption(key)
    if value is not None:
        return value
    option = next(option for option in OPTIONS if option.key == key)
    value = config.getini(key)
    if value and option.is_path and (config.rootpath / value).exists():
        return str(config.rootpath / value)
    return value or None
