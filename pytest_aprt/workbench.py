"""What one pytest session holds: the settings, the tests' names, the run's report.

The controller opens the files in ``pytest_configure`` and runs the models once, before the tests,
if a selected test asks for the run. xdist workers are given the names and a folder; each says in
it what its tests ask for, and reads from it what the controller has run.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_aprt.engines.devices import require_device
from pytest_aprt.engines.own import user_engine
from pytest_aprt.errors import AprtError, SettingsError
from pytest_aprt.garbage import seldom_collected
from pytest_aprt.items import ROOT, ParityCollector, junit_class
from pytest_aprt.options import DEFAULT_DEVICE
from pytest_aprt.outcomes import Outcome, outcome_of, test_names
from pytest_aprt.progress import ProgressLine
from pytest_aprt.scratch import Scratch
from pytest_aprt.settings import Settings, read_settings
from pytest_aprt.stages import Point

if TYPE_CHECKING:
    from pytest_aprt.beside import Beside
    from pytest_aprt.captures import Captures
    from pytest_aprt.pair import Headers
    from pytest_aprt.report import ContractJson, Report
    from pytest_aprt.sides import Sides

NAME = "aprt_workbench"
"""The workbench's name in the plugin manager."""

NEEDS = ("nothing", "report", "captures")
"""What a test may ask of the run; each includes those before it."""

_NEED_OF_FIXTURE = {"aprt_run": "report", "aprt_model": "captures", "aprt_oracle": "captures"}
_ID = f"{ROOT}::"
_OUTCOMES_RAISED = (pytest.skip.Exception, pytest.fail.Exception, pytest.xfail.Exception)


def workbench_of(config: pytest.Config) -> Workbench | None:
    """Return the session's workbench; None without ``--aprt-model``."""
    workbench: Workbench | None = config.pluginmanager.get_plugin(NAME)
    return workbench


class Workbench:
    """Registered as a plugin of its own while a model is under test.

    Args:
        config: pytest's.
        names: of the suite's tests.
        points: those that the settings select.
    """

    def __init__(self, config: pytest.Config, names: list[str], points: list[Point]) -> None:
        self.config, self.points = config, points
        self._settings: Settings | None = None
        self._headers: Headers | Sides | None = None
        self._scratch = Scratch()
        self._to_end = ExitStack()  # with the tests
        self._folder: Path | None = None  # of a worker: where the controller's files lie
        self._kept = NEEDS[0]
        self.names = self._asked(names)

    def _asked(self, names: list[str]) -> list[str]:
        """Return the suite's tests that this session runs, and take their ids off the arguments.

        Paths on the command line mean the user's own tests; without them this is the suite.
        """
        config = self.config
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args[:] = []
            return names
        ids = [arg for arg in config.args if arg.startswith(_ID)]
        config.args[:] = [arg for arg in config.args if arg not in ids]
        asked = {text.removeprefix(_ID) for text in ids}
        if unknown := asked.difference(names):
            raise SettingsError(
                f"{_ID}{min(unknown)}: there is no such test; --collect-only lists those of this "
                "model, and --aprt-stages and --aprt-layers select among them"
            )
        return [name for name in names if name in asked]

    @classmethod
    def of_controller(
        cls, config: pytest.Config, option: Callable[[pytest.Config, str], Any]
    ) -> Workbench:
        """Validate the settings and open the files; raises AprtError where they cannot be run."""
        from pytest_aprt.pair import Headers, open_headers
        from pytest_aprt.sides import open_sides

        command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
        settings = read_settings(lambda key: option(config, key), command=command)
        headers: Headers | Sides
        if settings.model_side.device != DEFAULT_DEVICE:
            require_device(settings.model_side.device)
        if settings.weights is None or not settings.has_shadow:
            headers = open_sides(settings)
        else:
            headers = open_headers(settings.weights, settings.oracle)
        if settings.dumps:
            from pytest_aprt.dump import DumpRunner

            for source in settings.dumps:
                DumpRunner.open(source)
        points = settings.points(headers.graph)
        whole = headers if isinstance(headers, Headers) else None
        workbench = cls(config, test_names(whole, points, settings.decode_steps), points)
        workbench._settings, workbench._headers = settings, headers
        return workbench

    @classmethod
    def of_worker(cls, config: pytest.Config, given: dict[str, Any]) -> Workbench:
        """Take what the controller hands over."""
        points = [Point(layer, stage) for layer, stage in given["points"]]
        workbench = cls(config, given["names"], points)
        workbench._folder = Path(given["folder"])
        return workbench

    # -- what the tests ask for --------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Add the suite, before others select from it."""
        if self.names:
            items += session.genitems(ParityCollector.of_session(session, self))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """On a worker: say what its tests ask for, before xdist tells the controller."""
        if self._folder is not None:
            place = self._folder / self.config.workerinput["workerid"]  # type: ignore[attr-defined]
            place.write_text(self._need(session), encoding="utf-8")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand an xdist worker the names, and where the report will lie."""
        node.workerinput["aprt"] = {
            "names": self.names,
            "points": [[point.layer, point.stage] for point in self.points],
            "folder": str(self._scratch.path),
        }

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """On the controller: run the models if a worker's tests ask; none has started yet."""
        self._run_once((self._scratch.path / node.gateway.id).read_text(encoding="utf-8"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the models before the tests, if one of them asks, and draw the report meanwhile."""
        with self._to_end:
            if self._folder is None:
                self._run_once(self._need(session))  # the controller of workers holds no items
            return (yield)

    def _need(self, session: pytest.Session) -> str:
        option = session.config.option
        broken = session.testsfailed and not option.continue_on_collection_errors
        nothing = option.collectonly or option.setupplan or broken
        return NEEDS[0] if nothing else need_of(session.items)

    # -- the run -----------------------------------------------------------------------------------

    def _run_once(self, need: str) -> None:
        if need == NEEDS[0] or self._kept != NEEDS[0]:
            return
        assert self._settings is not None and self._headers is not None
        self._kept = need
        try:
            self._run(self._headers, self._settings)
        except AprtError as error:
            self._kept = NEEDS[0]
            raise pytest.UsageError(str(error)) from error
        except _OUTCOMES_RAISED as error:
            self._kept = NEEDS[0]
            raise pytest.UsageError(
                f"the engine under test called pytest.{type(error).__name__.lower()}: {error}"
            ) from error

    @seldom_collected()
    def _run(self, headers: Headers | Sides, settings: Settings) -> None:
        from pytest_aprt.beside import started

        with ExitStack() as stack:
            beside = stack.enter_context(started(headers, settings))  # before torch is imported
            self.report = self._result(headers, settings, beside)
            from pytest_aprt import report

            if self.config.pluginmanager.hasplugin("dsession"):
                report.write(self.report, self._scratch.path / "report.json")
            if settings.report is not None:
                report.write(self.report, settings.report / "report.json")
                folder = settings.report.absolute()  # a test may change the current one
                stack.enter_context(_drawn(beside, self.report, folder))
                self._to_end.enter_context(stack.pop_all())

    def _result(self, headers: Headers | Sides, settings: Settings, beside: Beside) -> Report:
        from pytest_aprt import report
        from pytest_aprt.baseline import compare
        from pytest_aprt.captures import CaptureWriter
        from pytest_aprt.render import files
        from pytest_aprt.run import run
        from pytest_aprt.sides import Sides
        from pytest_aprt.totals import run_totals

        if summary := _step_summary():
            files.add_step_summary(None, summary)
        keep = {}
        if self._kept == "captures":
            keep = {"keep": CaptureWriter(self._captures)}
        with ProgressLine(self.config, time.monotonic()) as progress:
            engine = user_engine(self.config, settings.model_side)
            earlier = None if settings.baseline is None else report.read(settings.baseline)
            if isinstance(headers, Sides):
                oracle = user_engine(self.config, settings.oracle_side)
                found = run_totals(headers, settings, engine, progress, user_oracle=oracle, **keep)
            else:
                found = run(headers, settings, engine, progress, beside=beside, **keep)
            if earlier is not None and settings.baseline is not None:
                found["baseline"] = compare(found, earlier, settings.baseline)
        return found

    @cached_property
    def report(self) -> Report:
        """The finished run's report.

        Raises:
            SettingsError: nothing that pytest knew of before the tests asked for the run.
        """
        from pytest_aprt import report

        path = None if self._folder is None else self._folder / "report.json"
        if path is None or not path.exists():
            raise SettingsError(
                "the models were not run, since no selected test names aprt_run, aprt_model or "
                "aprt_oracle among its arguments or fixtures; request.getfixturevalue is too late"
            )
        return report.read(path)

    @property
    def finished(self) -> Report | None:
        """The report if the models were run, else None."""
        return self.__dict__.get("report")

    def keep_contracts(self, rows: list[ContractJson]) -> None:
        """Add the outcomes of contracts to the report, and write it again where it is kept."""
        self.report["contracts"] = rows
        if self._settings is not None and self._settings.report is not None:
            from pytest_aprt.render import files

            files.write(self.report, self._settings.report)

    def captures(self, side: str) -> Captures:
        """Return the captured stages of ``model`` or ``oracle``.

        Raises:
            SettingsError: no selected test named the fixture, so nothing was kept.
        """
        from pytest_aprt.captures import Captures

        report, folder = self.report, self._captures / side
        if not self._captures.exists():
            raise SettingsError(
                "the captured stages were not kept, since no selected test names aprt_model or "
                "aprt_oracle among its arguments or fixtures; request.getfixturevalue is too late"
            )
        return Captures(folder, report)

    @property
    def _captures(self) -> Path:
        return (self._folder or self._scratch.path) / "captures"

    def outcome(self, name: str) -> Outcome:
        """Return the outcome of one test of the suite."""
        return outcome_of(self.report, name)

    # -- what is shown -----------------------------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """Say what is compared."""
        s = self._settings
        if s is None:
            return []
        return [f"aprt: {s.model} against {s.oracle}, {len(self.names)} tests"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Let the JUnit file group the suite's tests by layer; their ids do not say the class."""
        if report.when != "call" or not report.nodeid.startswith(_ID):
            return
        for plugin in self.config.pluginmanager.get_plugins():
            if hasattr(plugin, "node_reporter"):
                name = report.nodeid.removeprefix(_ID)
                plugin.node_reporter(report).add_attribute("classname", junit_class(name))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what the run concludes."""
        if self._settings is None or "report" not in self.__dict__:
            return
        from pytest_aprt.render import files, github, terminal

        saved, verbosity = self._settings.report, self.config.getoption("verbose")
        if verbosity >= 0:
            terminalreporter.section("forward-pass parity", sep="=", bold=True)
        width = terminalreporter._tw.fullwidth
        for text, markup in terminal.render(
            self.report, None if saved is None else str(saved), verbosity, width
        ):
            terminalreporter.write_line(text, **markup)
        if summary := _step_summary():  # now, when the contracts have been judged, too
            files.add_step_summary(self.report, summary)
        if os.environ.get("GITHUB_ACTIONS"):
            for command in github.commands(self.report):
                terminalreporter.write_line(command)

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind."""
        self._scratch.close()


@contextmanager
def _drawn(beside: Beside, report: Report, folder: Path) -> Iterator[None]:
    """Draw the report that was written to a folder, while something else goes on."""
    beside.draw(folder)
    try:
        yield
    finally:
        try:
            beside.drawn(report, folder)
        except AprtError as error:
            raise pytest.UsageError(str(error)) from error


def _step_summary() -> Path | None:
    """Return the file that a GitHub step shows as its summary, None elsewhere."""
    path = os.environ.get("GITHUB_ACTIONS") and os.environ.get("GITHUB_STEP_SUMMARY")
    return Path(path) if path else None


def need_of(items: Iterable[pytest.Item]) -> str:
    """Return what the tests ask of the run; an item says so by ``needs_run`` or ``aprt_needs``."""
    needs = [NEEDS[0]]
    for item in items:
        if getattr(item, "needs_run", False):
            needs.append("report")
        needs.append(getattr(item, "aprt_needs", NEEDS[0]))
        needs += [
            _NEED_OF_FIXTURE[name]
            for name in getattr(item, "fixturenames", ())
            if name in _NEED_OF_FIXTURE
        ]
    return max(needs, key=NEEDS.index)
