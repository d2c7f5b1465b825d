"""From a falsifier to what evaluates it: Python, a built-in check, a pytest node, a shell line.

The first that applies binds; a falsifier that nothing binds is unbound and never counts as held.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pytest_aprt.errors import ContractError

if TYPE_CHECKING:
    from pytest_aprt.contracts.contract import Falsifier
    from pytest_aprt.contracts.subject import Bound, Finding, Subject

Function = TypeVar("Function", bound=Callable[..., Any])

ENTRY_POINTS = "pytest_aprt.falsifiers"
"""Entry point group: each names a module that holds bindings."""

ARGUMENTS: Mapping[str, tuple[str, Callable[[Subject], Any]]] = {
    # argument of a binding: what it needs of the run, and what it is given
    "aprt_run": ("report", lambda subject: subject.report),
    "aprt_model": ("captures", lambda subject: subject.captures("model")),
    "aprt_oracle": ("captures", lambda subject: subject.captures("oracle")),
    "contract": ("nothing", lambda subject: subject.contract),
    "falsifier": ("nothing", lambda subject: subject.falsifier),
    "tmp_path": ("nothing", lambda subject: subject.folder),
}
_NEEDS = ("nothing", "report", "captures")


class ShellSettings(NamedTuple):
    """Whether shell lines may run, and for how long."""

    allowed: bool
    timeout_s: float


_bound: dict[str, Callable[..., Any]] = {}


def falsifier(*ids: str) -> Callable[[Function], Function]:
    """Bind a function to falsifiers by their ids.

    The function takes any of ``aprt_run`` (the report), ``aprt_model`` and ``aprt_oracle`` (their
    captured stages), ``contract``, ``falsifier`` and ``tmp_path``. The claim holds if it returns;
    what it returns, a dict of plain numbers and texts or None, is recorded. An AssertionError
    falsifies, ``pytest.skip`` says that something is not there, any other exception is an error.

    Raises:
        ContractError: no id, an argument of another name, or an id that is bound already.
    """
    if not ids or not all(isinstance(item, str) for item in ids):
        raise ContractError('@pytest_aprt.falsifier needs ids: write ("FALSIFY-X-001")')

    def bind_to(function: Function) -> Function:
        for name in inspect.signature(function).parameters:
            if name not in ARGUMENTS:
                raise ContractError(
                    f"the binding {function.__qualname__} takes {name!r}: expected some of "
                    f"{', '.join(ARGUMENTS)}"
                )
        for item in ids:
            other = _bound.setdefault(item, function)
            if _place(other) != _place(function):
                raise ContractError(
                    f"{item} is bound to {_place(other)} and to {_place(function)}: keep one"
                )
            _bound[item] = function
        return function

    return bind_to


def forget() -> None:
    """Forget all bindings, at the end of a session."""
    _bound.clear()


def load_entry_points() -> None:
    """Import the modules that installed packages name.

    Raises:
        ContractError: a module cannot be imported.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise ContractError(
                f"entry point {entry.name} of {ENTRY_POINTS} cannot be loaded: {error}"
            ) from error


def bind(item: Falsifier, shell: ShellSettings) -> Bound | str:
    """Return how a falsifier is bound, or why it is not."""
    from pytest_aprt.contracts.checks import bound_check, problem_with
    from pytest_aprt.contracts.references import pytest_node

    if item.id in _bound:
        return _python(_bound[item.id])
    if item.check is not None:
        problem = problem_with(item.check)
        return bound_check(item.check) if problem is None else problem
    node = pytest_node(item.test)
    if node is not None:
        return bound_check({"kind": "pytest", "node": node})._replace(by="pytest")
    if not item.test:
        return "no check, no test and no binding in Python"
    if not shell.allowed:
        return "its test is a shell line or prose, which only --aprt-run-shell runs"
    return _shell(item.test, shell.timeout_s)


def _python(function: Callable[..., Any]) -> Bound:
    from pytest_aprt.contracts.subject import BlockedError, Bound, Finding

    names = list(inspect.signature(function).parameters)
    needs = max((ARGUMENTS[name][0] for name in names), key=_NEEDS.index, default="nothing")

    def evaluate(subject: Subject) -> Finding:
        import pytest

        given = {name: ARGUMENTS[name][1](subject) for name in names}
        try:
            returned = function(**given)
        except pytest.skip.Exception as error:
            raise BlockedError(str(error)) from error
        except AssertionError as error:
            text = str(error).strip().splitlines()
            return Finding(held=False, detail=text[0] if text else f"{_place(function)} asserts")
        if returned is not None and not isinstance(returned, Mapping):
            kind = type(returned).__name__
            raise TypeError(f"{_place(function)} returned {kind}: expected a dict or None")
        values = dict(returned or {})
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        return Finding(held=True, detail=shown or f"{_place(function)} held", values=values)

    return Bound("python", needs, evaluate, _source(function))


def _shell(line: str, timeout_s: float) -> Bound:
    from pytest_aprt.contracts.subject import Bound

    def evaluate(subject: Subject) -> Finding:
        from pytest_aprt.contracts.checks import outside

        return outside.shell(subject, line=line, timeout_s=timeout_s)

    return Bound("shell", "nothing", evaluate, line)


def _place(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _source(function: Callable[..., Any]) -> str:
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return _place(function)
