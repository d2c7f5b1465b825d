"""The weights behind the model under test as their files hold them: names, types and shapes.

A GGUF or a Hugging Face folder; whoever reads one of the two need not know which. No torch is
needed for it: the names of tests come from here.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pytest_aprt.architectures import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROPE_DIVISORS,
    Architecture,
    architecture_of,
)
from pytest_aprt.errors import SourceError
from pytest_aprt.facts import Fact, Facts
from pytest_aprt.quants import type_of
from pytest_aprt.sources.gguf import GgufFile
from pytest_aprt.sources.hf import FLOATS, HfFolder

BUFFER = "self_attn.rotary_emb.inv_freq"
"""In a layer of older checkpoints; transformers forms it anew."""

HEADS = ("output.weight", HEAD)
"""How checkpoints call the output projection."""


class Stored(NamedTuple):
    """A tensor as a file holds it: its quantisation type, and its shape once it is dequantised."""

    type: str
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """The files of a model, and how they name what the table of architectures knows.

    ``defaults`` says whose default a fact is that the files do not state; it holds ``{key}``.
    """

    architecture: Architecture
    kind: str  # as in the settings: gguf or huggingface
    head: str  # name of the output projection, where it is not tied
    defaults: str
    remedy: str  # for files that are not whole

    @property
    def path(self) -> Path:
        """The file, or the folder."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor that the model reads, by the name that it has there."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""

    @property
    def facts(self) -> Facts:
        """What the files say of the model."""

    def check(self) -> None:
        """Make sure that a whole model is there.

        Raises:
            AprtError: a key or a tensor is missing, or contradicts another.
        """

    def sha256(self) -> str:
        """Return the hash of the weights."""

    def stored(self, layer: int | None, suffix: str) -> str:
        """Return the name of a tensor there, given its Hugging Face name (within the layer)."""

    def key(self, fact: Fact) -> str:
        """Return how the files call a fact."""

    def states(self, fact: Fact) -> bool:
        """Return whether the files state a fact, so that it is no default."""


class GgufCheckpoint:
    """A GGUF file."""

    kind = "gguf"
    head = "output.weight"
    defaults = "the GGUF has no {key}: llama.cpp's default"
    remedy = "convert the file again"

    def __init__(self, file: GgufFile, architecture: Architecture) -> None:
        self.file, self.path, self.architecture = file, file.path, architecture

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of the file."""
        return {name: Stored(t.type, tuple(t.shape)) for name, t in self.file.tensors.items()}

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.facts.layers

    @cached_property
    def facts(self) -> Facts:
        """What the header says."""
        tensors = self.file.tensors
        divisors = self.file.tensor(ROPE_DIVISORS).tolist() if ROPE_DIVISORS in tensors else ()
        return Facts.from_gguf(self.file.metadata, tensors, self.architecture, divisors)

    def check(self) -> None:
        """Make sure that a whole model is there."""
        _require(self, self.file.tensors)

    def sha256(self) -> str:
        """Return the hash of all parts of the file."""
        return self.file.sha256()

    def stored(self, layer: int | None, suffix: str) -> str:
        """Return the GGUF name of a tensor; without output.weight the head is the embedding."""
        if layer is not None:
            return self.architecture.layer_tensor(layer, suffix)
        name = self.architecture.model_tensors[suffix]
        absent_head = name == "output.weight" and name not in self.file.tensors
        return self.architecture.model_tensors[EMBEDDING] if absent_head else name

    def key(self, fact: Fact) -> str:
        """Return the metadata key of a fact, without the architecture's prefix."""
        return fact.key

    def states(self, fact: Fact) -> bool:
        """Return whether the file holds a key, or keys below it, or a tensor that stands for it."""
        key, metadata = fact.key, self.file.metadata
        full = f"{self.architecture.name}.{key}"
        stated = key in metadata or key in self.file.tensors
        if key == "rope.scaling":
            stated |= ROPE_DIVISORS in self.file.tensors
        return stated or any(k == full or k.startswith(f"{full}.") for k in metadata)


class HfCheckpoint:
    """A Hugging Face folder."""

    kind = "huggingface"
    head = HEAD
    defaults = "config.json has no {key}: transformers' default"
    remedy = "fetch it anew"

    def __init__(self, folder: HfFolder, architecture: Architecture) -> None:
        self.file, self.path, self.architecture = folder, folder.path, architecture

    @property
    def quantisation(self) -> Mapping[str, Any] | None:
        """How transformers has to dequantise the weights; None where they are plain numbers."""
        found = self.file.config.get("quantization_config")
        return found if isinstance(found, dict) else None

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor that transformers reads; of quantised weights, what they stand for."""
        found = {name: Stored(t.type, t.shape) for name, t in self.file.tensors.items()}
        if self.quantisation is None:
            return {name: t for name, t in found.items() if not self._is_ignored(name)}
        quantised = Stored(type_of(self.quantisation), ())
        plain = {name: t for name, t in found.items() if t.type in FLOATS}
        return {name: plain.get(name, quantised) for name in _names(self)}

    def _is_ignored(self, name: str) -> bool:
        return name.endswith(BUFFER) or (name == HEAD and self._is_tied)

    @property
    def _is_tied(self) -> bool:
        return bool(self.file.config.get("tie_word_embeddings", False))

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers."""
        return layers_of(self.file.config, self.file.source)

    @cached_property
    def facts(self) -> Facts:
        """What config.json says, with transformers' defaults; imports transformers."""
        return Facts.from_config(read_config(self.file))

    def check(self) -> None:
        """Make sure that a whole model is there."""
        _require(self, self.tensors)

    def sha256(self) -> str:
        """Return the hash of the safetensors files."""
        return self.file.sha256()

    def stored(self, layer: int | None, suffix: str) -> str:
        """Return the name of a tensor; a tied head is the embedding."""
        if layer is not None:
            return f"model.layers.{layer}.{suffix}"
        return EMBEDDING if suffix == HEAD and self._is_tied else suffix

    def key(self, fact: Fact) -> str:
        """Return the name of a fact in config.json."""
        return fact.config

    def states(self, fact: Fact) -> bool:
        """Return whether config.json holds a fact, which may lie among the rope parameters."""
        key, config = fact.config, self.file.config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return key in config or key in rope or (key == "rope_scaling" and bool(rope))


def open_files(source: str) -> GgufFile | HfFolder:
    """Open the files of a model: a GGUF (any part of a split one), or a Hugging Face model.

    Raises:
        SourceError: they are missing or damaged.
    """
    return GgufFile.open(source) if Path(source).is_file() else HfFolder.open(source)


def checkpoint_of(file: GgufFile | HfFolder, architecture: Architecture) -> Checkpoint:
    """Return what a row of the table makes of a model's files."""
    if isinstance(file, GgufFile):
        return GgufCheckpoint(file, architecture)
    return HfCheckpoint(file, architecture)


def family_of(file: GgufFile | HfFolder, oracle: Mapping[str, Any] | None) -> Architecture:
    """Return the row of the table that fits a model and its oracle's configuration.

    Raises:
        ArchitectureError: there is none, or the two are of different families.
    """
    other = None if oracle is None else str(oracle.get("model_type"))
    if isinstance(file, GgufFile):
        return architecture_of(file.architecture, other)
    row = architecture_of(None, str(file.config.get("model_type")))
    return architecture_of(row.name, other)


def layers_of(config: Mapping[str, Any], source: str) -> int:
    """Return the number of layers that a config.json says.

    Raises:
        SourceError: it says none.
    """
    count = config.get("num_hidden_layers")
    if type(count) is not int or count < 1:
        raise SourceError(
            f"{source}: num_hidden_layers in its configuration is {count!r}: expected a number of "
            "layers"
        )
    return count


def read_config(folder: HfFolder) -> Any:
    """Return transformers' configuration of a model folder; imports transformers.

    Raises:
        SourceError: transformers does not accept config.json.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.path, local_files_only=True)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise SourceError(
            f"{folder.path}/config.json: transformers does not accept it ({error})"
        ) from error


def _names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors that a model must have, in computation order."""
    layers, row = range(checkpoint.layers), checkpoint.architecture
    names = [checkpoint.stored(None, EMBEDDING)]
    names += [checkpoint.stored(layer, suffix) for layer in layers for suffix in row.layer_tensors]
    names += [checkpoint.stored(None, FINAL_NORM), checkpoint.stored(None, HEAD)]
    return list(dict.fromkeys(names))


def _require(checkpoint: Checkpoint, held: Container[str]) -> None:
    """Refuse a model that no engine could run; an absent bias runs, and is the weights rung's."""
    for name in _names(checkpoint):
        if name not in held and not name.endswith(".bias"):
            raise SourceError(
                f"{checkpoint.path}: tensor {name} is missing: expected in every "
                f"{checkpoint.architecture.name} model of {checkpoint.layers} layers; "
                f"{checkpoint.remedy}"
            )
