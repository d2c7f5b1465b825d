"""The tests of the ``aprt::`` suite: each reads one outcome of the finished run."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_aprt.workbench import Workbench

ROOT = "aprt"


def junit_class(name: str) -> str:
    """Return the class under which JUnit files list a test: ``aprt.L02``, ``aprt.weights``."""
    kind, dash, _ = name.partition("-")
    return f"{ROOT}.{kind if dash else 'model'}"


class ParityFailure(Exception):
    """A test of the suite failed; the text's first line stands alone."""


class ParityCollector(pytest.Collector):
    """Holds the suite; it is no file, and its ids are ``aprt::<name>``."""

    def __init__(self, *, workbench: Workbench, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workbench = workbench

    @classmethod
    def of_session(cls, session: pytest.Session, workbench: Workbench) -> ParityCollector:
        """Make the suite's collector. The node id is set here and nowhere else."""
        return cls.from_parent(session, name=ROOT, nodeid=ROOT, workbench=workbench)

    def collect(self) -> Iterable[pytest.Item]:
        """Yield one item per test, in the order of the ladder."""
        for name in self.workbench.names:
            yield ParityItem.from_parent(self, name=name, workbench=self.workbench)


class ParityItem(pytest.Item):
    """One test: a point, a fact, a tensor, a self-test, or the gate."""

    needs_run = True

    def __init__(self, *, workbench: Workbench, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workbench = workbench

    def runtest(self) -> None:
        """Report what the run found."""
        found = self.workbench.outcome(self.name)
        self.user_properties += found.properties.items()
        if found.outcome == "skipped":
            pytest.skip(found.text)
        # With --runxfail pytest.xfail() does nothing, and an inherited error must not pass.
        if found.outcome == "xfailed" and not self.config.getoption("runxfail", False):
            pytest.xfail(found.reason)
        if found.outcome != "passed":
            raise ParityFailure(found.text)

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the text alone: a traceback through this plugin tells nobody anything.

        It would also cost 0.2 s for every inherited point.
        """
        if isinstance(excinfo.value, (ParityFailure, pytest.xfail.Exception)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args, **kwargs)

    def reportinfo(self) -> tuple[PathLike[str] | str, int | None, str]:
        """Return where the test is; pytest splits a heading at dots if it is a suffix of the id."""
        return self.config.rootpath / ROOT, None, f"aprt {self.name}"
