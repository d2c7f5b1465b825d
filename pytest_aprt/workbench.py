"""What one pytest session holds: the settings, the tests' names, the run's report.

The controller opens the files in ``pytest_configure`` and runs the models once, before the tests;
xdist workers are given the names and the path of the report and only read.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_aprt.errors import AprtError, SettingsError
from pytest_aprt.items import ParityCollector, ParityItem
from pytest_aprt.options import PYTHON_PREFIX
from pytest_aprt.outcomes import Outcome, outcome_of, test_names
from pytest_aprt.progress import ProgressLine
from pytest_aprt.settings import Settings, read_settings

if TYPE_CHECKING:
    from pytest_aprt.pair import Headers
    from pytest_aprt.report import Report


class Workbench:
    """Registered as a plugin of its own while a model is under test.

    Args:
        config: pytest's.
        names: of the suite's tests.
        results: where the report of the run lies once it has ended.
    """

    def __init__(self, config: pytest.Config, names: list[str], results: Path) -> None:
        self.config, self.names, self._results = config, names, results
        self._settings: Settings | None = None
        self._headers: Headers | None = None
        # Paths on the command line mean the user's own tests; without them this is the suite.
        self._suite = config.args_source is not pytest.Config.ArgsSource.ARGS
        if self._suite:
            config.args[:] = []

    @classmethod
    def of_controller(
        cls, config: pytest.Config, option: Callable[[pytest.Config, str], Any]
    ) -> Workbench:
        """Validate the settings and open the files; raises AprtError where they cannot be run."""
        from pytest_aprt.pair import open_headers

        command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
        settings = read_settings(lambda key: option(config, key), command=command)
        headers = open_headers(settings.weights, settings.oracle)
        names = test_names(headers, settings.points(headers.graph))
        workbench = cls(config, names, Path(tempfile.mkdtemp(prefix="aprt-")) / "report.json")
        workbench._settings, workbench._headers = settings, headers
        return workbench

    @classmethod
    def of_worker(cls, config: pytest.Config, given: dict[str, Any]) -> Workbench:
        """Take what the controller hands over."""
        return cls(config, given["names"], Path(given["results"]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand an xdist worker the names and where the report will lie."""
        node.workerinput["aprt"] = {"names": self.names, "results": str(self._results)}

    def pytest_report_header(self) -> list[str]:
        """Say what is compared."""
        s = self._settings
        if s is None:
            return []
        return [f"aprt: {s.model} against {s.oracle}, {len(self.names)} tests"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Add the suite, before others select from it."""
        if self._suite:
            items += session.genitems(ParityCollector.of_session(session, self))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the models before the tests, on the controller, if a test will ask."""
        if self._settings is not None and self._is_needed(session):
            try:
                self._run(self._settings)
            except AprtError as error:
                raise pytest.UsageError(str(error)) from error
        return (yield)

    def _is_needed(self, session: pytest.Session) -> bool:
        if not self._suite or self.config.getoption("collectonly") or session.testsfailed:
            return False
        on_xdist = self.config.pluginmanager.hasplugin("dsession")  # whose workers hold the items
        return on_xdist or any(isinstance(item, ParityItem) for item in session.items)

    def _run(self, settings: Settings) -> None:
        from pytest_aprt import report
        from pytest_aprt.render import markdown
        from pytest_aprt.run import run

        assert self._headers is not None
        with ProgressLine(self.config, time.monotonic()) as progress:
            result = run(self._headers, settings, self._engine(settings), progress)
        report.write(result, self._results)
        if settings.report is not None:
            report.write(result, settings.report / "report.json")
            report.write_text(settings.report / "report.md", markdown.render(result))

    def _engine(self, settings: Settings) -> Any | None:
        engine = self.config.hook.pytest_aprt_model(config=self.config)
        if engine is None and settings.model_kind == "python":
            return _from_factory(settings.model)
        return engine

    @cached_property
    def report(self) -> Report:
        """The finished run's report."""
        from pytest_aprt import report

        return report.read(self._results)

    def outcome(self, name: str) -> Outcome:
        """Return the outcome of one test of the suite."""
        return outcome_of(self.report, name)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what the run concludes."""
        if self._settings is None or not self._results.exists():
            return
        from pytest_aprt.render import terminal

        saved = self._settings.report
        colour = {"green": True} if self._passes() else {"red": True}
        terminalreporter.section("forward-pass parity", sep="=", bold=True)
        first, *rest = terminal.render(self.report, None if saved is None else str(saved))
        terminalreporter.write_line(first, bold=True, **colour)
        for line in rest:
            terminalreporter.write_line(line)

    def _passes(self) -> bool:
        return self.outcome("gate").outcome == "passed"

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind."""
        if self._settings is not None:
            shutil.rmtree(self._results.parent, ignore_errors=True)


def _from_factory(source: str) -> Any:
    """Return what ``python:module:factory`` makes."""
    module, colon, name = source[len(PYTHON_PREFIX) :].partition(":")
    wrong = f"--aprt-model={source} is not valid: expected python:module:factory"
    if not (module and colon and name):
        raise SettingsError(wrong)
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"{wrong}; {error}") from error
    return factory()
