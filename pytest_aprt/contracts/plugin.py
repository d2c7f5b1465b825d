"""The pytest face of contracts: which files are collected, and what is kept of their outcomes."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_aprt.contracts import bindings
from pytest_aprt.contracts.bindings import ShellSettings, bind
from pytest_aprt.contracts.contract import Contract, Falsifier, contracts_in, load
from pytest_aprt.contracts.evaluate import Evaluated
from pytest_aprt.contracts.items import EVALUATED, ContractFile
from pytest_aprt.contracts.subject import OUTCOMES, Bench, BlockedError, Bound, Opened
from pytest_aprt.errors import AprtError, ContractError, SettingsError
from pytest_aprt.sources._files import one_line

if TYPE_CHECKING:
    from pytest_aprt.ledger.record import Problem, Record
    from pytest_aprt.ledger.summary import Summary
    from pytest_aprt.report import ContractJson
    from pytest_aprt.workbench import Workbench

NAME = "aprt_contracts"
DEFAULT_FOLDER = "contracts"
DEFAULT_TIMEOUT_S = 60.0
ATTRIBUTE = "aprt_falsifier"
"""Attribute of a test report that carries the outcome from a worker to the controller."""

Option = Callable[[pytest.Config, str], Any]


def folders_of(config: pytest.Config, option: Option) -> list[Path]:
    """Return the opted-in folders: those named, else ``contracts/`` where a model is under test.

    Raises:
        SettingsError: a named folder is not there.
    """
    typed = config.getoption("aprt_contracts")
    base = config.invocation_params.dir if typed else config.rootpath
    named = [base / name for name in typed or option(config, "aprt_contracts") or ()]
    for folder in named:
        if not folder.exists():
            raise SettingsError(
                f"--aprt-contracts={one_line(folder)}: no such folder; expected one that holds "
                "contracts in YAML"
            )
    default = config.rootpath / DEFAULT_FOLDER
    if not named and option(config, "aprt_model") and default.is_dir():
        return [default]
    return named


def plugin_of(config: pytest.Config, option: Option) -> ContractPlugin | None:
    """Return the plugin for the opted-in folders, None where there are none.

    Raises:
        AprtError: a setting or a contract is not valid.
    """
    folders = folders_of(config, option)
    return ContractPlugin(config, folders, option) if folders else None


class ContractPlugin:
    """Registered while folders of contracts are opted in.

    Args:
        config: pytest's.
        folders: that hold contracts; a file stands for itself.
        option: looks an option up.
    """

    def __init__(self, config: pytest.Config, folders: list[Path], option: Option) -> None:
        self.config, self._option = config, option
        self.shell = ShellSettings(bool(option(config, "aprt_run_shell")), _timeout(config, option))
        self._bench: Bench | None = None
        self.outcomes: dict[str, Evaluated] = {}
        self.ledger = _ledger(config, option)
        self.summary: Summary | None = None
        self._late_error: str | None = None
        self._run: tuple[str, str | None] | None = None  # its id, and git's revision
        self.contracts: dict[Path, Contract] = {}
        named = bool(option(config, "aprt_contracts"))
        self._typed = bool(config.getoption("aprt_contracts"))
        for folder in folders:
            before = len(self.contracts)
            for path in contracts_in(folder) if folder.is_dir() else [folder]:
                self._add(path)
            if named and len(self.contracts) == before:
                raise SettingsError(
                    f"--aprt-contracts={one_line(folder)}: no contract there; expected YAML files "
                    "with metadata and falsification_tests"
                )
        bindings.load_entry_points()
        from_args = config.args_source is pytest.Config.ArgsSource.ARGS
        wanted = option(config, "aprt_model") or config.getoption("aprt_contracts")
        if wanted and not from_args and self.contracts:
            config.args[:] = [str(folder) for folder in folders]

    def _add(self, path: Path) -> None:
        contract = load(path)
        if isinstance(contract, str):
            return
        if contract.problems:
            line, problem = contract.problems[0]
            raise ContractError(f"{one_line(path)}:{line}: {problem}")
        from pytest_aprt.contracts.checks import problem_with

        seen: dict[str, int] = {}
        for falsifier in contract.falsifiers:
            if falsifier.id in seen:
                raise ContractError(
                    f"{one_line(path)}:{falsifier.line}: falsifier id {falsifier.id!r} stands in "
                    f"line {seen[falsifier.id]} already: give it another"
                )
            seen[falsifier.id] = falsifier.line
            wrong = falsifier.check is not None and problem_with(falsifier.check)
            if wrong:
                line = falsifier.data.line_of("check")
                raise ContractError(f"{one_line(path)}:{line}: {falsifier.id}: {wrong}")
        self.contracts[path.resolve()] = contract

    # -- collection --------------------------------------------------------------------------------

    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        """Collect the contracts of the opted-in folders, no other file."""
        path = file_path.resolve()
        if path not in self.contracts:
            return None
        return ContractFile.from_parent(parent, path=path, plugin=self)

    def bound(self, falsifier: Falsifier) -> Bound | str:
        """Return how a falsifier is bound, or why it is not."""
        bound = bind(falsifier, self.shell)
        if isinstance(bound, Bound) and bound.by == "pytest" and not self._typed:
            return "its test is a pytest node, which only --aprt-contracts on the command line runs"
        return bound

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """Lend an empty folder."""
        prefix = f"aprt-{re.sub(r'[^A-Za-z0-9-]', '_', name)[:40]}-"
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
            yield Path(folder).resolve()

    def bench(self) -> Bench | None:
        """Return the model under test, None without one."""
        workbench: Workbench | None = self.config.pluginmanager.get_plugin("aprt_workbench")
        if workbench is None:
            return None
        if self._bench is None:
            self._bench = Bench(lambda: workbench.report, workbench.captures, self._open)
        return self._bench

    def _open(self) -> Opened:
        from pytest_aprt.engines.own import user_engine
        from pytest_aprt.pair import open_headers
        from pytest_aprt.run import set_up
        from pytest_aprt.settings import read_settings

        settings = read_settings(lambda key: self._option(self.config, key), command="")
        if settings.weights is None or not settings.has_shadow:
            raise BlockedError("the model cannot be run again: give --aprt-weights and an oracle "
                               "that is no dump")  # fmt: skip
        headers = open_headers(settings.weights, settings.oracle)
        engine = user_engine(self.config, settings.model_side)
        pair, prompts, chosen = set_up(headers, settings, engine)
        return Opened(pair, chosen.engine, prompts)

    # -- outcomes ----------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Let the report carry the outcome, from a worker too."""
        report = yield
        found = item.stash.get(EVALUATED, None)
        if report.when == "call" and found is not None:
            setattr(report, ATTRIBUTE, dataclasses.asdict(found))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather the outcomes, on the controller; each is recorded at once, lest a kill lose it."""
        found = getattr(report, ATTRIBUTE, None)
        if found is None:
            return
        outcome = self.outcomes[report.nodeid] = Evaluated(**found)
        if self.ledger is None or self._late_error or hasattr(self.config, "workerinput"):
            return
        from pytest_aprt.ledger.record import append

        try:
            append(self.ledger, self._records([outcome]))
        except AprtError as error:
            self._late_error = str(error)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Keep the outcomes: in the ledger, and in the report; on the controller."""
        if hasattr(self.config, "workerinput") or not self.outcomes:
            return
        try:
            if self._late_error is None:
                self._keep()
        except AprtError as error:
            self._late_error = str(error)
        if self._late_error is not None:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def _keep(self) -> None:
        from pytest_aprt.ledger.record import read
        from pytest_aprt.ledger.summary import summarise

        problems: list[Problem] = []
        if self.ledger is None:
            records = self._records(list(self.outcomes.values()))
        else:
            records, problems = read(self.ledger)
        contracts = {found.contract: self._contract(found) for found in self.outcomes.values()}
        if self.ledger is not None:  # what this run did not select has evidence there, too
            root = self.config.rootpath.resolve()
            inside = {p.relative_to(root).as_posix(): c for p, c in self.contracts.items()
                      if p.is_relative_to(root)}  # fmt: skip
            contracts = {**inside, **contracts}
            records = [record for record in records if record.contract in contracts]
        summary = summarise(contracts, records, problems)
        if self.ledger is None:  # and nothing is known of what was not selected
            ran = {(found.contract, found.id) for found in self.outcomes.values()}
            rows = [row for row in summary.rows if (row.contract, row.id) in ran]
            summary = dataclasses.replace(summary, rows=rows)
        self.summary = summary
        workbench: Workbench | None = self.config.pluginmanager.get_plugin("aprt_workbench")
        if workbench is not None and workbench.finished is not None:
            workbench.keep_contracts(self._rows())

    def _contract(self, found: Evaluated) -> Contract:
        return self.contracts[(self.config.rootpath / found.contract).resolve()]

    def _records(self, outcomes: list[Evaluated]) -> list[Record]:
        from pytest_aprt.ledger.record import git_revision, records_of
        from pytest_aprt.ledger.summary import claim_hash

        claims = {
            (found.contract, found.id): claim_hash(self._contract(found).named(found.id))
            for found in outcomes
        }
        workbench: Workbench | None = self.config.pluginmanager.get_plugin("aprt_workbench")
        report = None if workbench is None else workbench.finished
        if self._run is None:
            run = uuid.uuid4().hex if report is None else report["run"]["id"]
            self._run = run, git_revision(self.config.rootpath)
        return records_of(outcomes, claims, report, *self._run)

    def _rows(self) -> list[ContractJson]:
        """Return the outcomes as report.json holds them, in the order in which they came."""
        assert self.summary is not None
        status = {(r.contract, r.id): r.supported.status for r in self.summary.rows}
        return [
            {
                "contract": found.contract,
                "id": found.id,
                "rule": found.rule,
                "declared": found.declared,
                "outcome": found.outcome,
                "supported": status[found.contract, found.id],
                "detail": found.detail,
            }
            for found in self.outcomes.values()
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how many claims held, and what that supports."""
        if self._late_error is not None:
            terminalreporter.write_line(f"ERROR: {self._late_error}", red=True)
        if self.summary is None or self.config.getoption("verbose") < 0:
            return
        from pytest_aprt.ledger.render import headline

        counts = Counter(found.outcome for found in self.outcomes.values())
        terminalreporter.section("contracts")
        said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
        terminalreporter.write_line(said)
        for line in headline(self.summary):
            terminalreporter.write_line(line)
        if self.ledger is not None:
            terminalreporter.write_line(f"ledger: {self.ledger}")

    def pytest_unconfigure(self) -> None:
        """Forget the bindings of this session."""
        bindings.forget()


def _ledger(config: pytest.Config, option: Option) -> Path | None:
    typed = config.getoption("aprt_ledger")
    name = typed or option(config, "aprt_ledger")
    if not name:
        return None
    base = config.invocation_params.dir if typed else config.rootpath
    path: Path = base / name
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise SettingsError(f"--aprt-ledger={one_line(path)}: expected a file that can be written")
    return path


def _timeout(config: pytest.Config, option: Option) -> float:
    text = option(config, "aprt_shell_timeout")
    try:
        value = DEFAULT_TIMEOUT_S if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise SettingsError(
            f"--aprt-shell-timeout={text} is not valid: expected seconds, such as 60"
        )
    return value
