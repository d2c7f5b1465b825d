"""Two sides of which only `total` can be measured: the model's weights, or the oracle, are unknown.

A dump does not hold the weights behind it, so without ``--aprt-weights`` there is no shadow and no
replay; an oracle that is a dump has no code to run on the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_aprt.architectures import Architecture, architecture_of
from pytest_aprt.dump import DumpRunner
from pytest_aprt.errors import ArchitectureError, SourceError
from pytest_aprt.facts import FACTS, Facts, agree
from pytest_aprt.pair import config_of, gguf_facts, read_config, tokenizer_of
from pytest_aprt.sources.gguf import GgufFile
from pytest_aprt.sources.hf import HfFolder
from pytest_aprt.stages import StageGraph

if TYPE_CHECKING:
    from pytest_aprt.settings import Settings
    from pytest_aprt.weights import GgufWeights, HfWeights

NO_WEIGHTS = "without --aprt-weights there is no shadow and no replay"
NO_ORACLE = "the oracle is a dump, so there is no shadow and no replay"
"""Why nothing but `total` can be measured."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What is known of both sides; ``why`` says why no more can be judged.

    ``config`` is the raw content of the oracle's config.json, None where nobody knows it: then the
    GGUF says the shapes.
    """

    architecture: Architecture
    graph: StageGraph
    gguf: GgufFile | None
    oracle: HfFolder | None
    config: Mapping[str, Any] | None
    why: str

    @cached_property
    def oracle_facts(self) -> Facts:
        """What decides the shapes of both sides' stages.

        Raises:
            ArchitectureError: the sides differ in a size, so that no stage could be compared.
        """
        ours = None if self.gguf is None else self.model_facts
        if self.config is None:
            assert ours is not None  # one of the two is known
            return ours
        facts = Facts.from_config(self.transformers_config)
        for fact in FACTS.values() if ours else ():
            a, b = getattr(ours, fact.field), getattr(facts, fact.field)
            if fact.is_size and not agree(a, b):
                raise ArchitectureError(
                    f"model and oracle differ in {fact.name}: {a} in the GGUF, {b} in the oracle; "
                    "give the oracle that the model was made from"
                )
        return facts

    @cached_property
    def transformers_config(self) -> Any:
        """The oracle's configuration."""
        if self.oracle is not None:
            return read_config(self.oracle)
        assert self.config is not None
        return config_of(self.config)

    @cached_property
    def model_facts(self) -> Facts:
        """What the GGUF's header says; only where there is one."""
        assert self.gguf is not None
        return gguf_facts(self.gguf, self.architecture)

    @cached_property
    def model_weights(self) -> GgufWeights:
        """The weights behind the model; only where there is a GGUF."""
        from pytest_aprt.weights import GgufWeights

        assert self.gguf is not None
        return GgufWeights(self.gguf, self.architecture, self.model_facts)

    @cached_property
    def oracle_weights(self) -> HfWeights:
        """The oracle's weights; only where it is no dump."""
        from pytest_aprt.weights import HfWeights

        assert self.oracle is not None
        return HfWeights(self.oracle, self.architecture, self.oracle_facts)

    @cached_property
    def tokenizer(self) -> Any:
        """The oracle's tokenizer.

        Raises:
            SourceError: there is none.
        """
        if self.oracle is None:
            raise SourceError(
                "the oracle is a dump, which has no tokenizer: give the tokens that it ran on with "
                "--aprt-tokens, or leave the prompt out if it has a manifest"
            )
        return tokenizer_of(self.oracle.path)


def open_sides(settings: Settings) -> Sides:
    """Open both sides' headers, and check that they are of one family.

    Raises:
        AprtError: something is missing, damaged or unknown, or the sides do not fit.
    """
    gguf = None if settings.weights is None else GgufFile.open(settings.weights)
    oracle, config = None, None
    for source in settings.dumps:
        DumpRunner.open(source)
    if settings.oracle_kind == "dump":
        config = DumpRunner.open(settings.oracle).config
    else:
        oracle = HfFolder.open(settings.oracle)
        config = oracle.config
    if gguf is None and config is None:
        raise SourceError(
            f"{settings.oracle}: the shapes of its stages are not known, since it has no "
            "manifest.json with the oracle's config: give --aprt-weights, the GGUF behind the "
            "model, or dump the oracle anew with aprt trace or --aprt-dump"
        )
    model_type = None if config is None else str(config.get("model_type"))
    architecture = architecture_of(None if gguf is None else gguf.architecture, model_type)
    return Sides(
        architecture=architecture,
        graph=architecture.graph(_layers(gguf, config, architecture, settings)),
        gguf=gguf,
        oracle=oracle,
        config=config,
        why=NO_ORACLE if settings.oracle_kind == "dump" else NO_WEIGHTS,
    )


def _layers(
    gguf: GgufFile | None,
    config: Mapping[str, Any] | None,
    architecture: Architecture,
    settings: Settings,
) -> int:
    if gguf is not None:
        return gguf_facts(gguf, architecture).layers
    count = None if config is None else config.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        raise SourceError(
            f"{settings.oracle}: num_hidden_layers in its configuration is {count!r}: expected a "
            "number of layers"
        )
    return count
