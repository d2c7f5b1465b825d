"""Weights under Hugging Face names, as float32, from either side's files.

One layer of each is at hand at a time; runners, replay and the weights rung read the same one. Its
large matrices are not even held: ``times`` multiplies by them piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pytest_aprt.architectures import HEAD, Architecture
from pytest_aprt.checkpoints import Checkpoint, GgufCheckpoint, HfCheckpoint, Stored
from pytest_aprt.errors import SourceError
from pytest_aprt.facts import Facts
from pytest_aprt.matrices import WHOLE, Matrix

if TYPE_CHECKING:
    from pytest_aprt.sources.gguf import GgufFile
    from pytest_aprt.sources.hf import HfFolder

HEAD_CHUNK = 4096
"""Rows of a vocabulary matrix held as floats at a time: 59 MB at hidden size 3584."""


FEW = 16
"""Tokens that pass through a streamed head for the logits of the last."""


class WeightSource(Protocol):
    """Tensors of one model by their Hugging Face names, float32."""

    def layer(self, index: int) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a layer by their name within it; the last one asked is kept."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor such as ``model.norm.weight``."""

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, in the order asked: (len(indices), columns)."""


class ModelWeights(WeightSource, Protocol):
    """The weights behind the model under test: read as floats, and named as its files name them."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by the name that the files give it."""

    def stored(self, layer: int | None, suffix: str) -> str:
        """Return the name of a tensor there, given its Hugging Face name (within the layer)."""

    def has(self, layer: int, suffix: str) -> bool:
        """Return whether a layer's tensor is there."""

    def layer_tensor(self, index: int, suffix: str) -> torch.Tensor:
        """Return one tensor of a layer, read anew, in Hugging Face order."""

    def matrix(self, name: str) -> Matrix:
        """Return a whole-model matrix, to be read in pieces."""

    def types(self, layer: int | None) -> dict[str, str]:
        """Return the type of every matrix of a layer (None: of the head)."""


class Layer(Mapping[str, torch.Tensor]):
    """The tensors of a layer by their name within it, each read when it is first asked for.

    ``matrices`` are those that are too large to be held; asking for one as a tensor holds it all
    the same.
    """

    def __init__(
        self,
        load: Callable[[str], torch.Tensor],
        names: Sequence[str],
        matrices: Mapping[str, Matrix],
    ) -> None:
        self._load, self._names, self.matrices = load, tuple(names), matrices
        self._tensors: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._tensors:
            self._tensors[name] = self._load(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def times(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weights[name].T``: (T, columns) to (T, rows)."""
    if isinstance(weights, Layer) and name in weights.matrices:
        return weights.matrices[name].times(x)
    return torch.nn.functional.linear(x, weights[name])


def pieces(weights: Mapping[str, torch.Tensor], name: str) -> Iterator[torch.Tensor]:
    """Yield a matrix in pieces of whole rows; what was yielded before is overwritten."""
    if not (isinstance(weights, Layer) and name in weights.matrices):
        yield weights[name]
        return
    matrix = weights.matrices[name]
    for rows in matrix.pieces():
        yield matrix.piece(rows)


class _Named:
    """Weights that are named as a checkpoint names them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.stored = checkpoint.stored

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by the name that the files give it."""
        return self._checkpoint.tensors

    def has(self, layer: int, suffix: str) -> bool:
        """Return whether a layer's tensor is there."""
        return self.stored(layer, suffix) in self.tensors


_NARROWER = {torch.float16: "F16", torch.bfloat16: "BF16"}


class HfWeights(_Named):
    """Weights from safetensors: the oracle's, or those behind the model under test.

    Args:
        folder: where they lie.
        architecture: of the model.
        facts: of the model.
        side: ``model`` or ``oracle``.
        dtype: to which the model rounds them as it loads them; the values are float32 all the same.
    """

    def __init__(
        self,
        folder: HfFolder,
        architecture: Architecture,
        facts: Facts,
        side: str = "oracle",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(HfCheckpoint(folder, architecture))
        self._folder, self._facts, self._side, self._dtype = folder, facts, side, dtype
        self._architecture = architecture
        self.layer = lru_cache(maxsize=1)(self._load)
        self._matrices: dict[str, Matrix] = {}

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by its name, of the type in which the model keeps it."""
        found = super().tensors
        kept = _NARROWER.get(self._dtype)
        return {name: t._replace(type=kept or t.type) for name, t in found.items()}

    def types(self, layer: int | None) -> dict[str, str]:
        """Return nothing: the types decide how llama.cpp's kernels round, which do not run here."""
        return {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor, float32."""
        return self._kept(self._folder.tensor(self.stored(None, name)))

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, float32."""
        return self._kept(self._folder.rows(self.stored(None, name), indices))

    def matrix(self, name: str) -> Matrix:
        """Return a whole-model matrix, to be read in pieces: the same one for all who ask."""
        if name not in self._matrices:
            place = self._facts.layers, 0
            self._matrices[name] = self._matrix(self.stored(None, name), name, place)
        return self._matrices[name]

    def layer_tensor(self, index: int, suffix: str) -> torch.Tensor:
        """Return one tensor of a layer, read anew."""
        absent = self._side == "model" and not self.has(index, suffix)
        if suffix.endswith(".bias") and absent:  # as of a GGUF
            return torch.zeros(layer_shape(suffix, self._facts))
        return self._kept(self._folder.tensor(self.stored(index, suffix)))

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._dtype == torch.float32 else tensor.to(self._dtype).float()

    def _matrix(self, stored: str, name: str, order: tuple[int, int]) -> Matrix:
        rows, columns = self._folder.shape(stored)

        def read(wanted: range, out: torch.Tensor) -> None:
            self._folder.fill(stored, wanted, out)
            if self._dtype != torch.float32:
                out.copy_(out.to(self._dtype))

        return Matrix(name, self._side, order, rows, columns, read)

    def _load(self, index: int) -> Layer:
        names = list(self._architecture.layer_tensors)
        large = {s: self.stored(index, s) for s in _large(names, self._facts)}
        return Layer(
            lambda suffix: self.layer_tensor(index, suffix),
            names,
            {s: self._matrix(name, s, (index, names.index(s))) for s, name in large.items()},
        )


class GgufWeights(_Named):
    """The model's dequantised weights in Hugging Face order."""

    def __init__(self, file: GgufFile, architecture: Architecture, facts: Facts) -> None:
        super().__init__(GgufCheckpoint(file, architecture))
        self._file = file
        self._architecture = architecture
        self._facts = facts
        self.layer = lru_cache(maxsize=1)(self._load)
        self._matrices: dict[str, Matrix] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole-model tensor, dequantised to float32."""
        return self._as_in_hf(name, torch.from_numpy(self._file.tensor(self.stored(None, name))))

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a whole-model matrix, dequantised to float32."""
        return torch.from_numpy(self._file.rows(self.stored(None, name), indices))

    def types(self, layer: int | None) -> dict[str, str]:
        """Return the quantisation type of every matrix of a layer (None: of the head)."""
        suffixes = [HEAD] if layer is None else list(self._architecture.layer_tensors)
        names = {suffix: self.stored(layer, suffix) for suffix in suffixes}
        return {s: self._file.tensors[n].type for s, n in names.items() if n in self._file.tensors}

    def layer_tensor(self, index: int, suffix: str) -> torch.Tensor:
        """Return one tensor of a layer, read anew, as the checkpoint has it."""
        return self._as_in_hf(suffix, self._read(index, suffix))

    def matrix(self, name: str) -> Matrix:
        """Return a whole-model matrix, to be read in pieces: the same one for all who ask."""
        if name not in self._matrices:
            place = self._facts.layers, 0
            self._matrices[name] = self._matrix(self.stored(None, name), name, place, None)
        return self._matrices[name]

    def _matrix(
        self, stored: str, name: str, order: tuple[int, int], permutation: torch.Tensor | None
    ) -> Matrix:
        rows, columns = self._file.info(stored).shape

        def read(wanted: range, out: torch.Tensor) -> None:
            span: slice | np.ndarray = slice(wanted.start, wanted.stop)
            if permutation is not None:
                span = permutation[span].numpy()
            self._file.fill(stored, span, out.numpy())

        return Matrix(name, "model", order, rows, columns, read)

    def _load(self, index: int) -> Layer:
        names, large = list(self._architecture.layer_tensors), {}
        for suffix in _large(names, self._facts):
            stored = self._architecture.layer_tensor(index, suffix)
            if self._file.info(stored).shape == layer_shape(suffix, self._facts):  # else _read's
                rows = self._in_hf_order(suffix, torch.arange(layer_shape(suffix, self._facts)[0]))
                permuted = suffix in ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
                large[suffix] = self._matrix(
                    stored, suffix, (index, names.index(suffix)),
                    rows if permuted and self._architecture.permuted_qk else None,
                )  # fmt: skip
        return Layer(lambda suffix: self.layer_tensor(index, suffix), names, large)

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

    def _as_in_hf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        offset = self._architecture.norm_offset
        if offset and name.endswith("norm.weight"):
            return tensor - offset
        return self._in_hf_order(name, tensor)

    def _in_hf_order(self, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
        heads = {"self_attn.q_proj": self._facts.heads, "self_attn.k_proj": self._facts.kv_heads}
        count = heads.get(suffix.rpartition(".")[0])
        if count is None or not self._architecture.permuted_qk:
            return tensor
        # GGUF rows of a head run (0, D/2, 1, D/2 + 1, ...); Hugging Face's run 0 .. D-1.
        rest = tensor.shape[1:]
        return tensor.reshape(count, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape)


def weights_of(checkpoint: Checkpoint) -> ModelWeights:
    """Return the weights of a checkpoint, as the model under test."""
    if isinstance(checkpoint, GgufCheckpoint):
        return GgufWeights(checkpoint.file, checkpoint.architecture, checkpoint.facts)
    assert isinstance(checkpoint, HfCheckpoint)
    return HfWeights(checkpoint.file, checkpoint.architecture, checkpoint.facts, "model")


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


def _large(names: Sequence[str], facts: Facts) -> list[str]:
    """Return the matrices of a layer that are read in pieces."""
    shapes = {name: layer_shape(name, facts) for name in names}
    return [name for name, s in shapes.items() if len(s) == 2 and s[0] * s[1] > WHOLE]


def row_chunks(rows: int) -> Iterator[range]:
    """Yield the row numbers of a vocabulary matrix in pieces that fit in memory."""
    for start in range(0, rows, HEAD_CHUNK):
        yield range(start, min(start + HEAD_CHUNK, rows))


def streams(matrix: Matrix) -> bool:
    """Return whether a matrix is too large to be held, so that it passes in pieces."""
    return matrix.rows * matrix.columns > WHOLE


def logits(weights: WeightSource, hidden: torch.Tensor, vocab: int, keep: int = 0) -> torch.Tensor:
    """Return ``hidden @ head.T`` of the last ``keep`` tokens (0: of all): (keep, V).

    All tokens pass through the same matmul whatever is kept, as in transformers: for a single row
    other kernels run, which round otherwise and depend on where the weights lie in memory. The
    head is never held as a whole. Where it streams, which rounds otherwise all the same, the last
    FEW tokens pass: logits of 2,048 tokens would take 1.2 GB.

    Args:
        weights: where the head comes from.
        hidden: (T, H) float32, after the final norm.
        vocab: rows of the head.
        keep: how many tokens.
    """
    matrix: Matrix | None = weights.matrix(HEAD) if hasattr(weights, "matrix") else None
    if matrix is not None and streams(matrix):
        return matrix.times(hidden[-max(keep, FEW) :] if keep else hidden)[-keep:]
    linear = torch.nn.functional.linear
    parts = [linear(hidden, weights.rows(HEAD, rows))[-keep:] for rows in row_chunks(vocab)]
    return torch.cat(parts, dim=-1)
