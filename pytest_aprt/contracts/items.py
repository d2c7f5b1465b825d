"""Contract files as pytest collects them: every falsifier is an item."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

import pytest

from pytest_aprt.contracts import failure
from pytest_aprt.contracts.contract import Falsifier
from pytest_aprt.contracts.evaluate import BLOCKED, UNBOUND, Evaluated, evaluate
from pytest_aprt.contracts.subject import Subject

if TYPE_CHECKING:
    from pytest_aprt.contracts.plugin import ContractPlugin

EVALUATED = pytest.StashKey[Evaluated]()
_SKIPPED = {"blocked": BLOCKED, "unbound": UNBOUND}
_NEEDED = {"nothing": "nothing", "report": "report", "captures": "captures", "model": "report"}


class FalsifierFailure(Exception):
    """A falsifier failed; the text's first line stands alone."""


class ContractFile(pytest.File):
    """One contract of an opted-in folder."""

    def __init__(self, *, plugin: ContractPlugin, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plugin = plugin

    def collect(self) -> Iterable[pytest.Item]:
        """Yield the falsifiers in the order of the file."""
        for falsifier in self.plugin.contracts[self.path].falsifiers:
            yield FalsifierItem.from_parent(
                self, name=falsifier.id, falsifier=falsifier, plugin=self.plugin
            )


class FalsifierItem(pytest.Item):
    """One falsifier."""

    def __init__(self, *, falsifier: Falsifier, plugin: ContractPlugin, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.falsifier, self.plugin = falsifier, plugin
        self.obj = _described(falsifier.rule)  # what --collect-only -v shows

    @property
    def aprt_needs(self) -> str:
        """What the check asks of the run."""
        bound = self.plugin.bound(self.falsifier)
        return "nothing" if isinstance(bound, str) else _NEEDED[bound.needs]

    def runtest(self) -> None:
        """Evaluate the falsifier and say what became of it."""
        bench = self.plugin.bench()
        with self.plugin.folder(self.name) as folder:
            subject = Subject(
                contract=self.plugin.contracts[self.path],
                falsifier=self.falsifier,
                folder=folder,
                root=self.config.rootpath,
                bench=bench,
            )
            name = self.nodeid.partition("::")[0]
            found = evaluate(subject, self.plugin.bound(self.falsifier), name)
        self.stash[EVALUATED] = found
        self.user_properties += [
            ("outcome", found.outcome), ("declared", found.declared or ""),
            ("measured", found.detail),
        ]  # fmt: skip
        if found.outcome in _SKIPPED:
            pytest.skip(f"{_SKIPPED[found.outcome]}: {found.detail}")
        if found.outcome != "passed":
            looked = bench is not None and found.needs in failure.STAGE_BOUND
            report = bench.report if bench is not None and looked else None
            raise FalsifierFailure(failure.render(self.falsifier, found, report))

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any, **kwargs: Any
    ) -> Any:
        """Return the text alone."""
        if isinstance(excinfo.value, FalsifierFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args, **kwargs)

    def reportinfo(self) -> tuple[PathLike[str] | str, int | None, str]:
        """Return where the falsifier stands, and its rule."""
        return self.path, self.falsifier.line - 1, f"{self.name}: {self.falsifier.rule}"


def _described(text: str) -> Callable[[], None]:
    def described() -> None: ...

    described.__doc__ = text
    return described
