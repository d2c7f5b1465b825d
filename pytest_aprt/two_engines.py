"""Two engines, one question: an oracle that is itself an engine (old build, other device).

There is no code of transformers to run on the model's weights. Instead the oracle's engine runs
them too: it is the shadow, and where both sides hold the same weights it is the oracle itself. Each
side is replayed from its own inputs, by the configuration in its own files, so an error is laid to
the side in which it is born.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_aprt.architectures import Architecture
from pytest_aprt.arithmetic import Profile
from pytest_aprt.bridges import BridgedReplay
from pytest_aprt.capture import Engine
from pytest_aprt.consensus import Tally, settled
from pytest_aprt.engines.choose import Chosen, engine_of
from pytest_aprt.facts import Facts
from pytest_aprt.preludes import prelude_of
from pytest_aprt.readings import PointErrors, Prompt
from pytest_aprt.run import profile_of
from pytest_aprt.selftest import Checks
from pytest_aprt.stages import StageGraph
from pytest_aprt.weights import ModelWeights

if TYPE_CHECKING:
    from pytest_aprt.settings import Settings
    from pytest_aprt.sides import Sides


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What one side is replayed with; ``tally`` counts how it rounds."""

    graph: StageGraph
    architecture: Architecture
    oracle_facts: Facts
    model_weights: ModelWeights
    profile: Profile
    tally: Tally = field(default_factory=Tally)

    def on(self, tokens: tuple[int, ...]) -> BridgedReplay:
        """Return the replay of a prompt."""
        prelude = prelude_of(self.oracle_facts, self.architecture, tokens)
        return BridgedReplay(self, tokens, prelude, self.profile, self.tally)


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Both sides, and what the oracle's own replay finds.

    ``shadow`` is the oracle's engine on the model's weights, None where it is the oracle.
    """

    model: Replayed
    oracle: Replayed
    shadow: Engine | None
    of_oracle: list[PointErrors] = field(default_factory=list)

    def settle(self, errors: Sequence[PointErrors], checks: Checks) -> list[PointErrors]:
        """Return the model's errors, each in its arithmetic; the oracle's are a self-test."""
        checks.oracle_engine(settled(self.of_oracle, self.oracle.tally.arithmetics()))
        return settled(errors, self.model.tally.arithmetics())


def engines_of(
    sides: Sides, settings: Settings, model: Chosen, oracle: Chosen, prompts: Sequence[Prompt]
) -> Engines:
    """Return what both sides are replayed with.

    Raises:
        AprtError: the oracle's engine cannot be set up for the model's weights.
    """
    shadow: Engine | None = None
    if not sides.same_weights:
        shadow = engine_of(sides, settings.oracle_side, None, prompts, sides.model).engine
    other = sides.other or sides.model
    assert sides.model is not None and other is not None
    return Engines(
        model=Replayed(
            graph=sides.graph,
            architecture=sides.architecture,
            oracle_facts=sides.model.facts,
            model_weights=model.weights or sides.model_weights,
            profile=profile_of(settings.arithmetic, model.engine),
        ),
        oracle=Replayed(
            graph=sides.graph,
            architecture=sides.architecture,
            oracle_facts=other.facts,
            model_weights=oracle.weights or sides.other_weights,
            profile=profile_of("auto", oracle.engine),
        ),
        shadow=shadow,
    )


def note_on_engines(sides: Sides, oracle: Chosen) -> str:
    """Return what a reader must know of such a run."""
    details = ", ".join(f"{name} {value}" for name, value in oracle.details().items())
    told = f"the oracle is an engine: {oracle.name}{f' ({details})' if details else ''}. "
    if sides.same_weights:
        told += (
            "Both sides run the same weights, so `engine` is `total`, and no quantisation explains "
            "a difference. "
        )
    else:
        told += (
            "The sides run different weights, which were not compared tensor by tensor; the shadow "
            "is the oracle's engine on the model's weights. "
        )
    return told + (
        "Each side was replayed by the configuration in its own files: what both have wrong alike "
        "cannot be seen. The rungs tokens, weights and decode were not judged."
    )
