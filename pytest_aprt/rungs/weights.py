"""The weights rung: every tensor of the GGUF against the oracle's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM, HEAD
from pytest_aprt.quants import QUANT_TYPES
from pytest_aprt.stages import STAGES, Stage
from pytest_aprt.weights import row_chunks

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the GGUF against the oracle's.

    ``rel_l2`` is ``|dequantised - oracle| / |oracle|``, nan where one side has no such tensor.
    """

    name: str
    layer: int | None
    suffix: str  # its Hugging Face name, within the layer if it lies in one
    type: str
    shape: tuple[int, ...]
    rel_l2: float
    bound: float
    reason: str  # why it is broken; empty if it is not

    @property
    def broken(self) -> bool:
        """Whether the quantisation type does not explain the distance."""
        return bool(self.reason)


def layer_rows(pair: Pair, layer: int) -> list[TensorRow]:
    """Return the weights rung for one layer, from weights that both sides have at hand."""
    model, oracle = pair.model_weights.layer(layer), pair.oracle_weights.layer(layer)
    rows = []
    for suffix, gguf_suffix in pair.architecture.layer_tensors.items():
        name = f"blk.{layer}.{gguf_suffix}"
        if not pair.model_weights.has(layer, suffix):
            rows.append(_row(pair, name, layer, suffix, math.nan, "missing in the GGUF"))
            continue
        sums = _squares(model[suffix], oracle[suffix])
        rows.append(_row(pair, name, layer, suffix, _distance(*sums)))
    return rows


def model_rows(pair: Pair) -> list[TensorRow]:
    """Return the weights rung for whole-model tensors, and for tensors that belong to no stage."""
    rows = []
    for suffix in (EMBEDDING, FINAL_NORM, HEAD):
        name = pair.model_weights.name_of(suffix)
        shares_embedding = suffix == HEAD and name == pair.model_weights.name_of(EMBEDDING)
        if shares_embedding and pair.oracle_facts.tied_embeddings:
            continue  # judged once, as the embedding
        rows.append(_row(pair, name, None, suffix, _distance(*_streamed(pair, suffix))))
    known = {row.name for row in rows} | set(pair.architecture.parameter_tensors)
    known |= {
        pair.architecture.layer_tensor(layer, suffix)
        for layer in range(pair.model_facts.layers)
        for suffix in pair.architecture.layer_tensors
    }
    for name in pair.gguf.tensors:
        if name not in known:
            rows.append(_row(pair, name, None, "", math.nan, "no such tensor in this architecture"))
    return rows


def stage_tensors(stage: Stage, layer: int | None, rows: list[TensorRow]) -> list[TensorRow]:
    """Return the rows of the tensors that a stage reads."""
    whole = not stage.per_layer or stage.first_layer_only
    return [r for r in rows if r.suffix in stage.tensors and r.layer == (None if whole else layer)]


STAGE_OF_TENSOR = {name: stage.name for stage in STAGES.values() for name in stage.tensors}
"""Which stage reads a tensor, by the tensor's Hugging Face name."""


def _row(
    pair: Pair, name: str, layer: int | None, suffix: str, rel_l2: float, reason: str = ""
) -> TensorRow:
    info = pair.gguf.tensors.get(name)
    kind = info.type if info else ""
    bound = QUANT_TYPES[kind].bound if kind in QUANT_TYPES else math.nan
    if not reason and kind not in QUANT_TYPES:
        reason = f"no bound is known for type {kind}"
    if not reason and not rel_l2 <= bound:
        reason = f"{rel_l2:.3g} from the oracle's tensor: {kind} explains at most {bound:.3g}"
    return TensorRow(
        name=name,
        layer=layer,
        suffix=suffix,
        type=kind,
        shape=tuple(info.shape) if info else (),
        rel_l2=rel_l2,
        bound=bound,
        reason=reason,
    )


def _streamed(pair: Pair, suffix: str) -> tuple[float, float]:
    if suffix == FINAL_NORM:
        return _squares(pair.model_weights.tensor(suffix), pair.oracle_weights.tensor(suffix))
    sums = [0.0, 0.0]
    for rows in row_chunks(pair.oracle_facts.vocab):
        part = _squares(
            pair.model_weights.rows(suffix, rows), pair.oracle_weights.rows(suffix, rows)
        )
        sums = [a + b for a, b in zip(sums, part, strict=True)]
    return sums[0], sums[1]


def _squares(model: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Return ``|model - oracle|^2`` and ``|oracle|^2``, summed in float64 a few rows at a time."""
    error = norm = 0.0
    for a, b in zip(_blocks(model), _blocks(oracle), strict=True):
        b = b.double()
        error += float((a.double() - b).square().sum())
        norm += float(b.square().sum())
    return error, norm


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, (1 << 20) // max(1, tensor[0].numel())))


def _distance(error: float, norm: float) -> float:
    if norm:
        return math.sqrt(error / norm)
    return math.inf if error else 0.0
