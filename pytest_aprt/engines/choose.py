"""Which engine a side has, by what the options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_aprt.capture import CheckedEngine, Engine
from pytest_aprt.checkpoints import Checkpoint, GgufCheckpoint
from pytest_aprt.errors import SettingsError
from pytest_aprt.forward import BuiltinRunner
from pytest_aprt.options import DEFAULT_DEVICE

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Prompt
    from pytest_aprt.settings import Side
    from pytest_aprt.sides import Sides
    from pytest_aprt.weights import ModelWeights


@dataclass(frozen=True)
class Chosen:
    """An engine, its name, and how it was set up (known in full once it has run).

    ``weights`` are those that it has loaded, where its files alone do not say what they are.
    """

    engine: Engine
    name: str
    details: Callable[[], Mapping[str, Any]] = dict
    weights: ModelWeights | None = None


def engine_of(
    pair: Pair | Sides,
    side: Side,
    user_engine: Any | None,
    prompts: Sequence[Prompt],
    checkpoint: Checkpoint | None = None,
) -> Chosen:
    """Return the engine of a side.

    Args:
        pair: the opened sides.
        side: what was asked.
        user_engine: the engine of ``pytest_aprt_model`` or ``python:module:factory``, if any.
        prompts: of the run.
        checkpoint: what it runs; by default the weights behind the model.

    Raises:
        AprtError: the engine is not installed, or cannot be set up as asked.
    """
    if user_engine is not None:
        name = f"{type(user_engine).__module__}.{type(user_engine).__qualname__}"
        return _checked(pair, user_engine, name)
    if side.kind == "dump":
        from pytest_aprt.dump import DumpRunner
        from pytest_aprt.dump_checks import CheckedDump

        dump, of_model = DumpRunner.open(side.source), side.flag == "--aprt-model"
        if not dump.has_manifest:
            return Chosen(CheckedDump(dump, pair, side.source, of_model=of_model), "dump")
        return _checked(pair, dump, side.source, "dump")
    if side.engine == "command":
        return _command(pair, side, prompts, checkpoint)
    checkpoint = checkpoint or pair.model
    assert checkpoint is not None  # no other source is left
    engine = side.engine
    if engine == "auto":
        engine = "builtin" if isinstance(checkpoint, GgufCheckpoint) else "transformers"
    if side.device != DEFAULT_DEVICE and engine != "transformers":
        raise SettingsError(
            f"--aprt-device={side.device} is not valid with the engine {engine}: expected "
            "--aprt-engine=transformers, which runs there"
        )
    return _ENGINES[engine](pair, side, checkpoint)


def _command(
    pair: Pair | Sides, side: Side, prompts: Sequence[Prompt], checkpoint: Checkpoint | None
) -> Chosen:
    from pytest_aprt.engines.command import Command, values_of

    assert side.command is not None  # the settings see to it
    source = side.source if checkpoint is None else str(checkpoint.path)
    engine = Command(
        side.command, values_of(pair, source, side.weights), pair, prompts, side.timeout_s
    )
    return Chosen(engine, "command", lambda: engine.details)


def _checked(
    pair: Pair | Sides,
    engine: Any,
    source: str,
    name: str = "",
    weights: ModelWeights | None = None,
) -> Chosen:
    checked = CheckedEngine(engine, pair.graph, pair.oracle_facts, source)
    return Chosen(checked, name or source, lambda: getattr(engine, "details", {}), weights)


def _builtin(pair: Pair | Sides, side: Side, checkpoint: Checkpoint) -> Chosen:
    from pytest_aprt.weights import weights_of

    weights = pair.model_weights if checkpoint is pair.model else weights_of(checkpoint)
    return Chosen(BuiltinRunner(weights, checkpoint.facts, checkpoint.architecture), "builtin")


def _llamacpp(pair: Pair | Sides, side: Side, checkpoint: Checkpoint) -> Chosen:
    from pytest_aprt.engines.llamacpp import LlamaCpp

    engine = LlamaCpp(checkpoint.path, checkpoint.facts, checkpoint.architecture, side.options)
    return _checked(pair, engine, "llama.cpp")


def _transformers(pair: Pair | Sides, side: Side, checkpoint: Checkpoint) -> Chosen:
    from pytest_aprt.engines.loaded import weights_in
    from pytest_aprt.engines.transformers import Transformers

    engine = Transformers(checkpoint, side.options, side.device)
    return _checked(pair, engine, "transformers", weights=weights_in(engine.model, checkpoint))


_ENGINES: dict[str, Callable[[Pair | Sides, Side, Checkpoint], Chosen]] = {
    "builtin": _builtin,
    "llama.cpp": _llamacpp,
    "transformers": _transformers,
}
