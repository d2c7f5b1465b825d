"""Opens the two sides of a run and makes sure that they can be compared at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_aprt.architectures import Architecture
from pytest_aprt.checkpoints import (
    BUFFER,
    Checkpoint,
    checkpoint_of,
    family_of,
    open_files,
    read_config,
)
from pytest_aprt.errors import ArchitectureError, SourceError
from pytest_aprt.facts import FACTS, Facts, agree
from pytest_aprt.sources.hf import HfFolder
from pytest_aprt.stages import StageGraph

if TYPE_CHECKING:
    from pytest_aprt.weights import HfWeights, ModelWeights


@dataclass(frozen=True, kw_only=True)
class Headers:
    """Both sides' headers, read without torch: enough to know the points and refuse bad input."""

    model: Checkpoint
    oracle: HfFolder
    architecture: Architecture
    graph: StageGraph


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Model and oracle, ready to run."""

    model: Checkpoint
    oracle: HfFolder
    architecture: Architecture
    model_facts: Facts
    oracle_facts: Facts
    config: Any  # transformers' PretrainedConfig
    model_weights: ModelWeights
    oracle_weights: HfWeights
    graph: StageGraph
    lent_tokenizer: Any = None  # what stands in for the oracle's tokenizer, if anything does

    @property
    def witnesses(self) -> frozenset[int | None]:
        """The layers on which the replay itself is tested: the first of each kind, and the head."""
        windows = self.oracle_facts.windows
        return frozenset({windows.index(kind) for kind in windows} | {None})

    @cached_property
    def tokenizer(self) -> Any:
        """The oracle's tokenizer, as transformers loads it.

        Raises:
            SourceError: the oracle has none.
        """
        return self.lent_tokenizer or tokenizer_of(self.oracle.path)


def open_headers(weights: str, oracle: str) -> Headers:
    """Open a model and an oracle, and check that they are of one family.

    Args:
        weights: path of a GGUF (any part of a split one), or a Hugging Face folder or hub id.
        oracle: Hugging Face folder or hub id.

    Raises:
        AprtError: something is missing, damaged, unknown, or the sides do not fit.
    """
    file, folder = open_files(weights), HfFolder.open(oracle)
    architecture = family_of(file, folder.config)
    model = checkpoint_of(file, architecture)
    model.check()
    _refuse_unknown_tensors(folder, architecture)
    return Headers(
        model=model,
        oracle=folder,
        architecture=architecture,
        graph=architecture.graph(model.layers),
    )


def config_of(content: Mapping[str, Any]) -> Any:
    """Return transformers' configuration, given the content of a config.json.

    Raises:
        SourceError: transformers does not accept it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"the config in the oracle's manifest.json: transformers does not accept it ({error})"
        ) from error


def open_pair(headers: Headers) -> Pair:
    """Make a pair ready to run; imports torch and transformers.

    Raises:
        ArchitectureError: the two sides differ in a size, so that no stage could be compared.
    """
    from pytest_aprt.weights import HfWeights, weights_of

    model, folder, architecture = headers.model, headers.oracle, headers.architecture
    config = read_config(folder)
    oracle_facts = Facts.from_config(config)
    for fact in FACTS.values():
        a, b = getattr(model.facts, fact.field), getattr(oracle_facts, fact.field)
        if fact.is_size and not agree(a, b):
            raise ArchitectureError(
                f"model and oracle differ in {fact.name}: {a} in {model.path.name} "
                f"({model.key(fact)}), {b} in the oracle's config.json ({fact.config}); give the "
                "oracle that the model was made from"
            )
    return Pair(
        model=model,
        oracle=folder,
        architecture=architecture,
        model_facts=model.facts,
        oracle_facts=oracle_facts,
        config=config,
        model_weights=weights_of(model),
        oracle_weights=HfWeights(folder, architecture, oracle_facts),
        graph=headers.graph,
    )


def _refuse_unknown_tensors(folder: HfFolder, architecture: Architecture) -> None:
    """Refuse an oracle that computes with more than its family's row names, such as biases."""
    first = "model.layers.0."
    own = {name.removeprefix(first) for name in folder.names if name.startswith(first)}
    unknown = own.difference(architecture.layer_tensors, {BUFFER})
    if unknown:
        raise ArchitectureError(
            f"{folder.path}: its layers hold {', '.join(sorted(unknown))}, which no "
            f"{architecture.name} model that can be judged has; this variant of the family is not "
            "supported"
        )


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder.

    Raises:
        SourceError: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if len(found) <= len(found.added_tokens_decoder):
            raise ValueError("it has no vocabulary")  # a class without files makes one of none
    except (ValueError, OSError, TypeError, KeyError, ImportError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise SourceError(
            f"{folder}: it has no tokenizer that transformers can load "
            f"({said or type(error).__name__}); give token ids instead"
        ) from error
    return found
