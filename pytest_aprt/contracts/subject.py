"""What a falsifier is held against: the finished run, its captures, and the pair to run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pytest_aprt.capture import Engine
    from pytest_aprt.captures import Captures
    from pytest_aprt.contracts.contract import Contract, Falsifier
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Prompt
    from pytest_aprt.report import Report

OUTCOMES = ("passed", "failed", "error", "blocked", "unbound")
"""Of a falsifier in one run; only ``passed`` counts as evaluated and held."""


class BlockedError(Exception):
    """What the check needs is not there; the text says what that is."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    ``detail`` says in one line what was measured, ``values`` the numbers as plain JSON types,
    ``byte_equal`` that bytes were equal to an oracle's.
    """

    held: bool
    detail: str
    values: Mapping[str, Any] = field(default_factory=dict)
    byte_equal: bool = False


class Bound(NamedTuple):
    """How a falsifier is bound: by what, and what its check needs of the run.

    ``source`` is what a change of the check changes; the ledger hashes it.
    """

    by: str  # python, check, pytest, shell
    needs: str  # nothing, report, captures, model
    evaluate: Callable[[Subject], Finding]
    source: str


class Opened(NamedTuple):
    """The pair, an engine that runs the model under test, and the prompts of the run."""

    pair: Pair
    engine: Engine
    prompts: Sequence[Prompt]


class Bench:
    """A model under test that has run: the report, the captures, and the pair if asked for.

    Args:
        report: returns the finished run's report.
        captures: returns the captured stages of ``model`` or ``oracle``.
        open_again: opens the pair once more, for checks that run a model themselves.
    """

    def __init__(
        self,
        report: Callable[[], Report],
        captures: Callable[[str], Captures],
        open_again: Callable[[], Opened],
    ) -> None:
        self._report, self.captures, self._open = report, captures, open_again

    @cached_property
    def report(self) -> Report:
        """The finished run."""
        return self._report()

    @cached_property
    def opened(self) -> Opened:
        """The pair, opened again."""
        return self._open()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One falsifier and what it is held against.

    ``folder`` is empty and the check's own; ``root`` is where pytest nodes and shell lines run;
    ``bench`` is None where no model is under test.
    """

    contract: Contract
    falsifier: Falsifier
    folder: Path
    root: Path
    bench: Bench | None = None

    @property
    def model(self) -> Bench:
        """The model under test.

        Raises:
            BlockedError: there is none.
        """
        if self.bench is None:
            raise BlockedError("no model under test: give --aprt-model and --aprt-oracle")
        return self.bench

    @property
    def report(self) -> Report:
        """The finished run's report."""
        return self.model.report

    def captures(self, side: str, prompt: int = 0) -> Captures:
        """Return the captured stages of ``model`` or ``oracle`` on one prompt."""
        return self.model.captures(side).prompt(prompt)

    def run_model(self, prompt: int = 0) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Run the model under test again; yields layer and its stages as float32 arrays."""
        opened = self.model.opened
        from pytest_aprt.matrices import compute_threads

        with compute_threads():
            for layer, stages in opened.engine.layers(opened.prompts[prompt].tokens):
                yield layer, {name: tensor.numpy() for name, tensor in stages.items()}
