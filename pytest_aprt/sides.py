"""Two sides without transformers' code to run on the model's weights: no shadow of that kind.

A dump does not hold the weights behind it, so without ``--aprt-weights`` there is no shadow and no
replay, and an oracle that is a dump has no code: `total` is all that can be measured. An oracle
that is an engine is its own shadow, and each side is replayed (``two_engines``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_aprt.architectures import Architecture, architecture_of
from pytest_aprt.checkpoints import (
    Checkpoint,
    HfCheckpoint,
    checkpoint_of,
    family_of,
    layers_of,
    open_files,
    read_config,
)
from pytest_aprt.dump import DumpRunner
from pytest_aprt.errors import ArchitectureError, SourceError
from pytest_aprt.facts import FACTS, Facts, agree
from pytest_aprt.pair import config_of, tokenizer_of
from pytest_aprt.sources.hf import HfFolder
from pytest_aprt.stages import StageGraph

if TYPE_CHECKING:
    from pytest_aprt.settings import Settings
    from pytest_aprt.weights import HfWeights, ModelWeights

NO_WEIGHTS = "without --aprt-weights there is no shadow and no replay"
NO_ORACLE = "the oracle is a dump, so there is no shadow and no replay"
"""Why nothing but `total` can be measured."""

ENGINE = "the oracle is an engine"
"""Why some rungs are not judged, although each side is replayed."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What is known of both sides; ``why`` says why no more can be judged.

    ``model`` are the weights behind the model, None where they are not known, and ``other`` those
    that the oracle's engine runs, where it is one. ``config`` is the raw content of the oracle's
    config.json, None where nobody knows it: then the model's files say the shapes.
    """

    architecture: Architecture
    graph: StageGraph
    model: Checkpoint | None
    other: Checkpoint | None = None
    oracle: HfFolder | None
    config: Mapping[str, Any] | None
    why: str

    @cached_property
    def oracle_facts(self) -> Facts:
        """What decides the shapes of both sides' stages.

        Raises:
            ArchitectureError: the sides differ in a size, so that no stage could be compared.
        """
        ours = None if self.model is None else self.model.facts
        if self.config is None:
            found = ours or (None if self.other is None else self.other.facts)
            assert found is not None  # one of them is known
            return found
        facts = Facts.from_config(self.transformers_config)
        for fact in FACTS.values() if ours else ():
            a, b = getattr(ours, fact.field), getattr(facts, fact.field)
            if fact.is_size and not agree(a, b):
                raise ArchitectureError(
                    f"model and oracle differ in {fact.name}: {a} in the model's weights, {b} in "
                    "the oracle; give the oracle that the model was made from"
                )
        return facts

    @cached_property
    def transformers_config(self) -> Any:
        """The oracle's configuration."""
        if self.oracle is not None:
            return read_config(self.oracle)
        assert self.config is not None
        return config_of(self.config)

    @property
    def model_facts(self) -> Facts:
        """What the files behind the model say; only where there are some."""
        return self._model.facts

    @cached_property
    def model_weights(self) -> ModelWeights:
        """The weights behind the model; only where they are known."""
        from pytest_aprt.weights import weights_of

        return weights_of(self._model)

    @cached_property
    def oracle_weights(self) -> HfWeights:
        """The oracle's weights; only where it is no dump."""
        from pytest_aprt.weights import HfWeights

        assert self.oracle is not None
        return HfWeights(self.oracle, self.architecture, self.oracle_facts)

    @cached_property
    def tokenizer(self) -> Any:
        """The oracle's tokenizer, or the model's where the oracle has none.

        Raises:
            SourceError: there is none.
        """
        if self.oracle is not None:
            return tokenizer_of(self.oracle.path)
        if isinstance(self.model, HfCheckpoint):
            return tokenizer_of(self.model.path)
        if self.is_replayed:
            raise SourceError(
                "neither side is a Hugging Face model, so there is no tokenizer: give token ids "
                "with --aprt-tokens"
            )
        raise SourceError(
            "the oracle is a dump, which has no tokenizer: give the tokens that it ran on with "
            "--aprt-tokens, or leave the prompt out if it has a manifest"
        )

    @property
    def is_replayed(self) -> bool:
        """Whether the oracle is another engine, so that each side is judged by its own replay."""
        return self.why == ENGINE

    @cached_property
    def other_weights(self) -> ModelWeights:
        """The weights that the oracle's engine runs: the model's, unless they are others."""
        from pytest_aprt.weights import weights_of

        return self.model_weights if self.same_weights else weights_of(self.other or self._model)

    @cached_property
    def same_weights(self) -> bool:
        """Whether both engines run the same weights; one that does not say runs the model's."""
        return self.other is None or self.other.sha256() == self._model.sha256()

    @property
    def _model(self) -> Checkpoint:
        assert self.model is not None
        return self.model


def open_sides(settings: Settings) -> Sides:
    """Open both sides' headers, and check that they are of one family.

    Raises:
        AprtError: something is missing, damaged or unknown, or the sides do not fit.
    """
    file = None if settings.weights is None else open_files(settings.weights)
    theirs = settings.oracle_side.weights
    other = open_files(theirs) if settings.oracle_is_engine and theirs is not None else None
    for source in settings.dumps:
        DumpRunner.open(source)
    oracle = other if isinstance(other, HfFolder) else None
    if settings.oracle_kind == "huggingface" and oracle is None:
        oracle = HfFolder.open(settings.oracle)
    config: Mapping[str, Any] | None = None if oracle is None else oracle.config
    if settings.oracle_kind == "dump":
        config = DumpRunner.open(settings.oracle).config
    known = file or other
    if known is None and config is None:
        raise SourceError(
            f"{settings.oracle}: the shapes of its stages are not known, since it has no "
            "manifest.json with the oracle's config: give --aprt-weights, the weights behind the "
            "model, or dump the oracle anew with aprt trace or --aprt-dump"
        )
    if known is None:
        assert config is not None
        architecture = architecture_of(None, str(config.get("model_type")))
    else:
        architecture = family_of(known, config)
        if other is not None and family_of(other, config) != architecture:
            raise ArchitectureError(
                f"model and oracle are of different families: {architecture.name} and "
                f"{family_of(other, config).name}; give an oracle of the model's family"
            )
    model, run = (None if f is None else checkpoint_of(f, architecture) for f in (file, other))
    for checkpoint in (model, run):
        if checkpoint is not None:
            checkpoint.check()
    whole = model or run
    layers = layers_of(config or {}, settings.oracle) if whole is None else whole.layers
    return Sides(
        architecture=architecture,
        graph=architecture.graph(layers),
        model=model,
        other=run,
        oracle=oracle,
        config=config,
        why=_why(settings),
    )


def _why(settings: Settings) -> str:
    if settings.oracle_kind == "dump":
        return NO_ORACLE
    return NO_WEIGHTS if settings.weights is None else ENGINE
