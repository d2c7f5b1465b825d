"""Which engine a run has, by what the options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_aprt.capture import CheckedEngine, Engine
from pytest_aprt.forward import BuiltinRunner

if TYPE_CHECKING:
    from pytest_aprt.measure import Prompt
    from pytest_aprt.pair import Pair
    from pytest_aprt.settings import Settings
    from pytest_aprt.sides import Sides


@dataclass(frozen=True)
class Chosen:
    """An engine, its name, and how it was set up (known in full once it has run)."""

    engine: Engine
    name: str
    details: Callable[[], Mapping[str, Any]] = dict


def engine_of(
    pair: Pair | Sides, settings: Settings, user_engine: Any | None, prompts: Sequence[Prompt]
) -> Chosen:
    """Return the engine of a run.

    Args:
        pair: the opened sides.
        settings: what was asked.
        user_engine: the engine of ``pytest_aprt_model`` or ``python:module:factory``, if any.
        prompts: of the run.

    Raises:
        AprtError: the engine is not installed, or cannot be set up as asked.
    """
    if user_engine is not None:
        name = f"{type(user_engine).__module__}.{type(user_engine).__qualname__}"
        return _checked(pair, user_engine, name)
    if settings.model_kind == "dump":
        from pytest_aprt.dump import DumpRunner
        from pytest_aprt.dump_checks import CheckedDump

        dump = DumpRunner.open(settings.model)
        if not dump.has_manifest:
            return Chosen(CheckedDump(dump, pair, settings.model), "dump")
        return _checked(pair, dump, settings.model, "dump")
    if settings.engine == "command":
        return _command(pair, settings, prompts)
    return _ENGINES[settings.engine](pair, settings)


def _command(pair: Pair | Sides, settings: Settings, prompts: Sequence[Prompt]) -> Chosen:
    from pytest_aprt.engines.command import Command, values_of

    line = settings.engine_command
    assert line is not None  # the settings see to it
    values = values_of(pair, settings.model, settings.weights)
    engine = Command(line, values, pair, prompts, settings.engine_timeout_s)
    return Chosen(engine, "command", lambda: engine.details)


def _checked(pair: Pair | Sides, engine: Any, source: str, name: str = "") -> Chosen:
    checked = CheckedEngine(engine, pair.graph, pair.oracle_facts, source)
    return Chosen(checked, name or source, lambda: getattr(engine, "details", {}))


def _builtin(pair: Pair | Sides, settings: Settings) -> Chosen:
    return Chosen(BuiltinRunner(pair.model_weights, pair.model_facts, pair.architecture), "builtin")


def _llamacpp(pair: Pair | Sides, settings: Settings) -> Chosen:
    from pytest_aprt.engines.llamacpp import LlamaCpp

    assert pair.gguf is not None  # no other model is run by it
    engine = LlamaCpp(pair.gguf.path, pair.model_facts, pair.architecture, settings.engine_options)
    return _checked(pair, engine, "llama.cpp")


_ENGINES: dict[str, Callable[[Pair | Sides, Settings], Chosen]] = {
    "auto": _builtin,
    "builtin": _builtin,
    "llama.cpp": _llamacpp,
}
