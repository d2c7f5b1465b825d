"""Weights under Hugging Face names, as float32, from either side's files.

One layer of each is kept at a time; runners, replay and the weights rung read the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from pytest_aprt.architectures import EMBEDDING, HEAD, Architecture
from pytest_aprt.errors import SourceError
from pytest_aprt.facts import Facts

if TYPE_CHECKING:
    from pytest_aprt.sources.gguf import GgufFile
    from pytest_aprt.sources.hf import HfFolder

HEAD_CHUNK = 16384
"""Rows of a vocabulary matrix held as floats at a time: 235 MB at hidden size 3584."""


class WeightSource(Protocol):
    """Tensors of one model by their Hugging Face names, float32."""

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer by their name within it; the last one asked is kept."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor such as ``model.norm.weight``."""

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, in the order asked: (len(indices), columns)."""


class _LayerCache:
    def __init__(self, load: Callable[[int], dict[str, torch.Tensor]]) -> None:
        self._load = load
        self._index: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        if index != self._index:
            self._index, self._tensors = None, {}  # free the old layer before the new is read
            self._tensors = self._load(index)
            self._index = index
        return self._tensors


class HfWeights:
    """The oracle's weights, from safetensors."""

    def __init__(self, folder: HfFolder, architecture: Architecture, facts: Facts) -> None:
        self._folder = folder
        self._architecture = architecture
        self._tied = facts.tied_embeddings
        self.layer = _LayerCache(self._load)

    def name_in(self, index: int, suffix: str) -> str:
        """Return the checkpoint's name of a layer's tensor."""
        return f"model.layers.{index}.{suffix}"

    def name_of(self, name: str) -> str:
        """Return the checkpoint's name of a whole-model tensor; a tied head is the embedding."""
        return EMBEDDING if name == HEAD and self._tied else name

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor, float32."""
        return self._folder.tensor(self.name_of(name))

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, float32."""
        return self._folder.rows(self.name_of(name), indices)

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        return {
            suffix: self._folder.tensor(self.name_in(index, suffix))
            for suffix in self._architecture.layer_tensors
        }


class GgufWeights:
    """The model's dequantised weights in Hugging Face order."""

    def __init__(self, file: GgufFile, architecture: Architecture, facts: Facts) -> None:
        self._file = file
        self._architecture = architecture
        self._facts = facts
        self.layer = _LayerCache(self._load)

    def name_of(self, name: str) -> str:
        """Return the GGUF name of a whole-model tensor; without output.weight, the embedding."""
        name = self._architecture.model_tensors[name]
        absent_head = name == "output.weight" and name not in self._file.tensors
        return self._architecture.model_tensors[EMBEDDING] if absent_head else name

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor, dequantised to float32."""
        return torch.from_numpy(self._file.tensor(self.name_of(name)))

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, dequantised to float32."""
        return torch.from_numpy(self._file.rows(self.name_of(name), indices))

    def types(self, layer: int | None) -> dict[str, str]:
        """Return the quantisation type of every matrix of a layer (None: of the head)."""
        if layer is None:
            return {HEAD: self._file.tensors[self.name_of(HEAD)].type}
        names = {s: self._architecture.layer_tensor(layer, s) for s in
                 self._architecture.layer_tensors}  # fmt: skip
        return {s: self._file.tensors[n].type for s, n in names.items() if n in self._file.tensors}

    def has(self, layer: int, suffix: str) -> bool:
        """Return whether the file holds a layer's tensor."""
        return self._architecture.layer_tensor(layer, suffix) in self._file.tensors

    def layer_tensor(self, index: int, suffix: str) -> torch.Tensor:
        """Return one tensor of a layer, read anew, in Hugging Face order."""
        return self._in_hf_order(suffix, self._read(index, suffix))

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        return {
            suffix: self.layer_tensor(index, suffix) for suffix in self._architecture.layer_tensors
        }

    def _read(self, index: int, suffix: str) -> torch.Tensor:
        if suffix.endswith(".bias") and not self.has(index, suffix):
            # Engines run without an absent bias; the weights rung says that it is missing.
            return torch.zeros(layer_shape(suffix, self._facts))
        name = self._architecture.layer_tensor(index, suffix)
        tensor = torch.from_numpy(self._file.tensor(name))
        expected = layer_shape(suffix, self._facts)
        if tuple(tensor.shape) != expected:
            raise SourceError(
                f"{self._file.path}: tensor {name} has shape {tuple(tensor.shape)}, the metadata "
                f"asks for {expected}; the file contradicts itself, convert it again"
            )
        return tensor

    def _in_hf_order(self, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
        heads = {"self_attn.q_proj": self._facts.heads, "self_attn.k_proj": self._facts.kv_heads}
        count = heads.get(suffix.rpartition(".")[0])
        if count is None or not self._architecture.permuted_qk:
            return tensor
        # GGUF rows of a head run (0, D/2, 1, D/2 + 1, ...); Hugging Face's run 0 .. D-1.
        rest = tensor.shape[1:]
        return tensor.reshape(count, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape)


def layer_shape(suffix: str, facts: Facts) -> tuple[int, ...]:
    """Return the shape of a layer's tensor, given its Hugging Face name in the layer."""
    queries, keys, values = facts.qkv_sizes
    module, kind = suffix.rsplit(".", 1)
    rows, columns = {
        "input_layernorm": (facts.hidden, None),
        "post_attention_layernorm": (facts.hidden, None),
        "self_attn.q_norm": (facts.head_dim, None),
        "self_attn.k_norm": (facts.head_dim, None),
        "self_attn.q_proj": (queries, facts.hidden),
        "self_attn.k_proj": (keys, facts.hidden),
        "self_attn.v_proj": (values, facts.hidden),
        "self_attn.o_proj": (facts.hidden, queries),
        "mlp.gate_proj": (facts.intermediate, facts.hidden),
        "mlp.up_proj": (facts.intermediate, facts.hidden),
        "mlp.down_proj": (facts.hidden, facts.intermediate),
    }[module]
    return (rows,) if columns is None or kind == "bias" else (rows, columns)


def row_chunks(rows: int) -> Iterator[range]:
    """Yield the row numbers of a vocabulary matrix in pieces that fit in memory."""
    for start in range(0, rows, HEAD_CHUNK):
        yield range(start, min(start + HEAD_CHUNK, rows))


def logits(weights: WeightSource, hidden: torch.Tensor, vocab: int, keep: int = 0) -> torch.Tensor:
    """Return ``hidden @ head.T`` of the last ``keep`` tokens (0: of all): (keep, V).

    All tokens pass through the same matmul whatever is kept, as in transformers: for a single row
    other kernels run, which round otherwise and depend on where the weights lie in memory. The
    head is never held as a whole.

    Args:
        weights: where the head comes from.
        hidden: (T, H) float32, after the final norm.
        vocab: rows of the head.
        keep: how many tokens.
    """
    linear = torch.nn.functional.linear
    parts = [linear(hidden, weights.rows(HEAD, rows))[-keep:] for rows in row_chunks(vocab)]
    return torch.cat(parts, dim=-1)
