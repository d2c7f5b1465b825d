"""The weights rung: every tensor of the model against the oracle's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM, HEAD
from pytest_aprt.matrices import compare
from pytest_aprt.quants import QUANT_TYPES
from pytest_aprt.rungs.diagnosis import Case, diagnose, figures, misplaced
from pytest_aprt.rungs.distances import Distance, distance_of, moved, piece_distance, summed
from pytest_aprt.stages import STAGES, Stage
from pytest_aprt.weights import row_chunks

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the model against the oracle's.

    ``rel_l2`` is ``|dequantised - oracle| / |oracle|``, nan where one side has no such tensor.
    ``differs`` where it holds other numbers, as after training: no fault, whatever the reason says.
    """

    name: str
    layer: int | None
    suffix: str  # its Hugging Face name, within the layer if it lies in one
    type: str
    shape: tuple[int, ...]
    rel_l2: float
    bound: float
    reason: str  # why it is broken; empty if it is not
    differs: bool = False

    @property
    def broken(self) -> bool:
        """Whether neither the quantisation type nor training explains the distance."""
        return bool(self.reason) and not self.differs


class Watched:
    """The distances of the matrices that pass by in pieces, from both sides at once.

    Args:
        pair: the opened model and oracle.
        layer: whose matrices they are; None for those of the whole model.
    """

    def __init__(self, pair: Pair, layer: int | None) -> None:
        self._pair, self._layer = pair, layer
        self._parts: dict[str, list[Distance]] = {}

    def __call__(self, name: str, start: int, model: Tensor, oracle: Tensor) -> None:
        """Take a piece that begins at row ``start``; called from several threads."""
        _, beyond = _bounds(self._pair, self._stored(name))
        part = moved(piece_distance(model, oracle, beyond, overwrite=True), start)
        self._parts.setdefault(name, []).append(part)

    def _stored(self, name: str) -> str:
        return self._pair.model_weights.stored(self._layer, name)

    def distance(self, name: str) -> Distance | None:
        """Return the distance of a matrix all of whose pieces were seen, else None."""
        return summed(self._parts[name]) if name in self._parts else None


def layer_rows(pair: Pair, layer: int, watched: Watched | None = None) -> list[TensorRow]:
    """Return the weights rung for one layer, from weights that both sides have at hand.

    Args:
        pair: the opened model and oracle.
        layer: which one.
        watched: what was seen of the matrices of the layer that passed in pieces.
    """
    model, oracle = pair.model_weights.layer(layer), pair.oracle_weights.layer(layer)
    rows = []
    for suffix in pair.architecture.layer_tensors:
        name = pair.model_weights.stored(layer, suffix)
        if not pair.model_weights.has(layer, suffix):
            rows.append(_row(pair, name, layer, suffix, math.nan, "is missing in the model"))
            continue
        seen = None if watched is None else watched.distance(suffix)
        if seen is not None and _is_explained(pair, name, seen):
            rows.append(_row(pair, name, layer, suffix, seen.rel_l2))
            continue
        rows.append(_judged(pair, name, layer, suffix, [(model[suffix], oracle[suffix])]))
    return rows


def _is_explained(pair: Pair, name: str, seen: Distance) -> bool:
    bound, block_bound = _bounds(pair, name)
    return seen.rel_l2 <= bound and seen.worst[0] <= block_bound


def model_rows(pair: Pair, watched: Watched | None = None) -> list[TensorRow]:
    """Return the weights rung for whole-model tensors, and for tensors that belong to no stage."""
    watched = watched or Watched(pair, None)
    rows = []
    for suffix in (EMBEDDING, FINAL_NORM, HEAD):
        name = pair.model_weights.stored(None, suffix)
        shares_embedding = suffix == HEAD and name == pair.model_weights.stored(None, EMBEDDING)
        if shares_embedding and pair.oracle_facts.tied_embeddings:
            continue  # judged once, as the embedding
        seen = watched.distance(suffix) if suffix == HEAD else None
        if seen is None and suffix != FINAL_NORM:
            model, oracle = (w.matrix(suffix) for w in (pair.model_weights, pair.oracle_weights))
            compare(model, oracle, watched)
            seen = watched.distance(suffix)
        if seen is not None and _is_explained(pair, name, seen):
            rows.append(_row(pair, name, None, suffix, seen.rel_l2))
            continue
        rows.append(_judged(pair, name, None, suffix, _parts(pair, suffix)))
    known = {row.name for row in rows} | set(pair.architecture.parameter_tensors)
    known |= {
        pair.model_weights.stored(layer, suffix)
        for layer in range(pair.graph.n_layers)
        for suffix in pair.architecture.layer_tensors
    }
    for name in pair.model_weights.tensors:
        if name not in known:
            rows.append(_row(pair, name, None, "", math.nan, "is no tensor of this architecture"))
    return rows


def stage_tensors(stage: Stage, layer: int | None, rows: list[TensorRow]) -> list[TensorRow]:
    """Return the rows of the tensors that a stage reads."""
    whole = not stage.per_layer or stage.first_layer_only
    return [r for r in rows if r.suffix in stage.tensors and r.layer == (None if whole else layer)]


STAGE_OF_TENSOR = {name: stage.name for stage in STAGES.values() for name in stage.tensors}
"""Which stage reads a tensor, by the tensor's Hugging Face name."""


def _judged(
    pair: Pair, name: str, layer: int | None, suffix: str, parts: Iterable[tuple[Tensor, Tensor]]
) -> TensorRow:
    """Judge a tensor that comes in parts of some rows, as a whole and by its worst block.

    A matrix over the vocabulary is never held as a whole: the part that holds its worst block, or
    its largest error, is what is looked at closely.
    """
    bound, block_bound = bounds = _bounds(pair, name)
    total, start = summed([]), 0
    suspect: tuple[float, int, Case] | None = None
    has_bad_block = False
    for model, oracle in parts:
        part = distance_of(model, oracle)
        block = part.worst[0]
        has_bad_block |= block > block_bound
        sizes = (part.rel_l2 / bound, block / block_bound)
        size = math.inf if math.isnan(sizes[0]) else max(sizes)
        if size > 1 and (suspect is None or size > suspect[0]):
            suspect = size, start, Case(pair, layer, suffix, model, oracle, bounds)
        total, start = summed([total, part]), start + len(model)
    rel_l2 = total.rel_l2
    if suspect is None or (rel_l2 <= bound and not has_bad_block):
        return _row(pair, name, layer, suffix, rel_l2)
    _, first, case = suspect
    where = f" (from row {first} on)" if first else ""
    if pair.model.kind == "gguf":  # made of the oracle
        return _row(pair, name, layer, suffix, rel_l2, f"{diagnose(case)}{where}")
    fault = misplaced(case)
    row = _row(pair, name, layer, suffix, rel_l2, f"{fault or figures(case)}{where}")
    return row if fault else replace(row, differs=True)


def _bounds(pair: Pair, name: str) -> tuple[float, float]:
    """Return what the tensor's type explains: of the tensor, and of a block."""
    info = pair.model_weights.tensors.get(name)
    kind = QUANT_TYPES.get(info.type) if info else None
    return (kind.bound, kind.block_bound) if kind else (math.inf, math.inf)


def _row(
    pair: Pair, name: str, layer: int | None, suffix: str, rel_l2: float, diagnosis: str = ""
) -> TensorRow:
    info = pair.model_weights.tensors.get(name)
    kind = info.type if info else ""
    bound = QUANT_TYPES[kind].bound if kind in QUANT_TYPES else math.nan
    reason = diagnosis
    if not diagnosis and kind not in QUANT_TYPES:
        reason = f"cannot be judged: no bound is known for type {kind}"
    elif diagnosis and not math.isnan(rel_l2):
        reason += f" ({rel_l2:.3g} from the oracle's tensor: {kind} explains {bound:.3g})"
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


def _parts(pair: Pair, suffix: str) -> Iterator[tuple[Tensor, Tensor]]:
    model, oracle = pair.model_weights, pair.oracle_weights
    if suffix == FINAL_NORM:
        yield model.tensor(suffix), oracle.tensor(suffix)
        return
    for rows in row_chunks(pair.oracle_facts.vocab):
        yield model.rows(suffix, rows), oracle.rows(suffix, rows)
