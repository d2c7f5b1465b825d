"""The weights of a model that transformers has loaded, as it multiplies by them.

Plain numbers are read from the model's files, rounded as loading rounds them. Of quantised modules
nobody but their own code knows what they stand for, so they are asked: the identity goes in, the
weight comes out. That holds for every quantiser alike, and needs none of their packages here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytest_aprt.architectures import Architecture
from pytest_aprt.checkpoints import Checkpoint, HfCheckpoint, Stored
from pytest_aprt.facts import Facts
from pytest_aprt.matrices import Matrix
from pytest_aprt.quants import type_of
from pytest_aprt.sources.hf import FLOATS
from pytest_aprt.weights import HfWeights, Layer, ModelWeights, layer_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = 256
"""Rows of the identity that pass through a module at a time."""

_TYPES = {getattr(torch, name): stored for stored, name in FLOATS.items()}


def weights_in(model: Any, checkpoint: Checkpoint) -> ModelWeights | None:
    """Return the weights of a loaded model; None where its files say what they are.

    Args:
        model: as ``from_pretrained`` returns it.
        checkpoint: its files.
    """
    if not isinstance(checkpoint, HfCheckpoint):
        return None
    facts = checkpoint.facts
    if getattr(model.config, "quantization_config", None) is None:
        return HfWeights(checkpoint.file, checkpoint.architecture, facts, "model", model.dtype)
    return LoadedWeights(model, checkpoint, facts)


class LoadedWeights:
    """The weights of a loaded model, float32, by the names of Hugging Face.

    Args:
        model: as ``from_pretrained`` returns it.
        checkpoint: its files.
        facts: what they say.
    """

    def __init__(self, model: Any, checkpoint: HfCheckpoint, facts: Facts) -> None:
        self._model, self._facts, self._dtype = model, facts, model.dtype
        self._architecture: Architecture = checkpoint.architecture
        self.stored = checkpoint.stored
        self._matrices: dict[str, Matrix] = {}
        self._index, self._layer = -1, Layer(self.tensor, (), {})

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by its name, with what its module is quantised to."""
        config = self._model.config.quantization_config
        kind = type_of(config if isinstance(config, dict) else config.to_dict())
        names = {
            self.stored(layer, suffix): layer_shape(suffix, self._facts)
            for layer in range(self._facts.layers)
            for suffix in self._architecture.layer_tensors
        }
        matrix = (self._facts.vocab, self._facts.hidden)
        names |= {self.stored(None, name): matrix for name in self._architecture.model_tensors}
        found = {}
        for name, shape in names.items():
            shape = matrix[1:] if name.endswith("norm.weight") and len(shape) == 2 else shape
            plain = self._plain(name, shape)
            if plain is not None or not name.endswith(".bias"):
                found[name] = Stored(kind if plain is None else _TYPES[plain.dtype], shape)
        return found

    def has(self, layer: int, suffix: str) -> bool:
        """Return whether the model has a layer's tensor."""
        return self.stored(layer, suffix) in self.tensors

    def types(self, layer: int | None) -> dict[str, str]:
        """Return nothing: the types decide how llama.cpp's kernels round, which do not run here."""
        return {}

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Return the tensors of a layer, each made when it is first asked for."""
        if index != self._index:
            self._index = index
            self._layer = Layer(
                lambda suffix: self.layer_tensor(index, suffix),
                list(self._architecture.layer_tensors),
                {},
            )
        return self._layer

    def layer_tensor(self, index: int, suffix: str) -> Tensor:
        """Return one tensor of a layer, made anew."""
        if suffix.endswith(".bias") and not self.has(index, suffix):
            return torch.zeros(layer_shape(suffix, self._facts))
        return self._tensor(self.stored(index, suffix), layer_shape(suffix, self._facts))

    def tensor(self, name: str) -> Tensor:
        """Return a whole-model tensor, float32."""
        name = self.stored(None, name)
        return self._tensor(name, self.tensors[name].shape)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return some rows of a whole-model matrix, float32."""
        return self._whole[self.stored(None, name)][torch.tensor(list(indices))].float()

    def matrix(self, name: str) -> Matrix:
        """Return a whole-model matrix, to be read in pieces: the same one for all who ask."""
        if name not in self._matrices:
            values, place = self._whole[self.stored(None, name)], (self._facts.layers, 0)

            def read(wanted: range, out: Tensor) -> None:
                out.copy_(values[wanted.start : wanted.stop])

            rows, columns = values.shape
            self._matrices[name] = Matrix(name, "model", place, rows, columns, read)
        return self._matrices[name]

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The matrices over the vocabulary, in the dtype in which the model computes."""
        names = {self.stored(None, name) for name in self._architecture.model_tensors}
        shape = (self._facts.vocab, self._facts.hidden)
        return {n: self._tensor(n, shape).to(self._dtype) for n in names
                if self.tensors[n].shape == shape}  # fmt: skip

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return a tensor that is kept as plain numbers, of the shape that it stands for."""
        path, _, attribute = name.rpartition(".")
        found: Any = getattr(self._model.get_submodule(path), attribute, None)
        is_plain = type(found) in (Tensor, nn.Parameter) and found.dtype in _TYPES
        return found if is_plain and tuple(found.shape) == shape else None

    @torch.no_grad()
    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        plain = self._plain(name, shape)
        if plain is not None:
            return plain.detach().to("cpu", torch.float32)
        return self._asked(self._model.get_submodule(name.rpartition(".")[0]), shape[1])

    def _asked(self, module: nn.Module, columns: int) -> Tensor:
        """Return what a module multiplies by, (rows, columns), from what it makes of the identity.

        Its bias is taken off meanwhile: added to a product it would cost the weight its last bits.
        """
        device = next(iter([*module.parameters(), *module.buffers()])).device
        parts = []
        with _without_bias(module):
            for start in range(0, columns, _ROWS):
                count = min(_ROWS, columns - start)
                rows = torch.zeros(1, count, columns, dtype=self._dtype, device=device)
                rows[0, torch.arange(count), torch.arange(start, start + count)] = 1
                parts.append(module(rows)[0].to("cpu", torch.float32))
        return torch.cat(parts).T.contiguous()


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    kept: list[dict[str, Any]] = [module._parameters, module._buffers]
    places = [place for place in kept if place.get("bias") is not None]
    before = [place["bias"] for place in places]
    for place in places:
        place["bias"] = None
    try:
        yield
    finally:
        for place, bias in zip(places, before, strict=True):
            place["bias"] = bias
