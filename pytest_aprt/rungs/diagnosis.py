"""Names what is wrong with a tensor: computed for those alone that their type does not explain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_aprt.quants import QUANT_TYPES
from pytest_aprt.rungs.distances import BLOCK, block_errors, distance, worst_block

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair

OTHER_NUMBERS = "holds other numbers"
"""What is said of a tensor in which nothing else is found."""

_FEW = 0.25  # of the rows: what more of them share is no matter of single rows
_MATCHED_ROWS = 8192  # rows up to which each is looked for among all others
_LOOK = 8  # rows of another layer's tensor that decide whether the rest is read
_OFFSET = 0.05  # how near to 1 an offset lies that is called so


@dataclass(frozen=True)
class Case:
    """A tensor in question, both sides in Hugging Face order, float32.

    ``bounds`` are what the type explains: of the tensor, and of a block. ``layer`` is None for
    whole-model tensors.
    """

    pair: Pair
    layer: int | None
    suffix: str
    model: Tensor
    oracle: Tensor
    bounds: tuple[float, float]

    def fits(self, changed: Tensor, oracle: Tensor | None = None) -> bool:
        """Return whether a change explains the tensor: what is left is the type's."""
        return distance(changed, self.oracle if oracle is None else oracle) <= self.bounds[0]


def diagnose(case: Case) -> str:
    """Return what is wrong in words; without an explanation, the figures that tell most."""
    tests = _LOCAL if case.fits(case.model) else _GLOBAL + _LOCAL
    return next((found for test in tests if (found := test(case))), figures(case))


def misplaced(case: Case) -> str:
    """Return what no training does to a tensor, in words; empty where it merely holds others."""
    return next((found for test in _STRUCTURAL if (found := test(case))), "")


def _not_finite(c: Case) -> str:
    for tensor, where in ((c.model, ""), (c.oracle, " in the oracle")):
        wrong = ~torch.isfinite(tensor)
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            return f"holds {int(wrong.sum())} non-finite values{where}, the first at {place}"
    return ""


def _constant(c: Case) -> str:
    low, high = float(c.model.min()), float(c.model.max())
    if low != high or bool((c.oracle == c.oracle.view(-1)[0]).all()):
        return ""
    return "is all zeros" if low == 0 else f"is {low:g} everywhere"


def _offset(c: Case) -> str:
    off = float((c.model.double() - c.oracle).mean())
    if not c.fits(c.model - off) or not off:
        return ""
    if abs(abs(off) - 1) < _OFFSET:
        way = "one too large: 1 was added" if off > 0 else "one too small: 1 was taken off"
        return f"is offset by {way} where the architecture expects none"
    return f"is offset by {off:.4g}"


def _scaled(c: Case) -> str:
    norm = float(c.oracle.double().square().sum())
    factor = float((c.model.double() * c.oracle).sum()) / norm if norm else 0.0
    if not factor or abs(factor - 1) <= c.bounds[0] / 2 or not c.fits(c.model / factor):
        return ""
    return "has its sign turned" if abs(factor + 1) < c.bounds[0] else f"is scaled by {factor:.4g}"


def _transposed(c: Case) -> str:
    if c.model.dim() != 2:
        return ""
    rows, columns = c.oracle.shape
    return "is transposed" if c.fits(c.model.reshape(columns, rows).T) else ""


def _rope_permuted(c: Case) -> str:
    facts = c.pair.oracle_facts
    counts = {"self_attn.q_proj": facts.heads, "self_attn.k_proj": facts.kv_heads}
    heads = counts.get(c.suffix.rpartition(".")[0])
    if heads is None:
        return ""
    rest = c.model.shape[1:]
    half = c.model.shape[0] // heads // 2
    to_halves = c.model.reshape(heads, half, 2, *rest).transpose(1, 2).reshape(c.model.shape)
    to_pairs = c.model.reshape(heads, 2, half, *rest).transpose(1, 2).reshape(c.model.shape)
    stored = c.pair.architecture.permuted_qk
    if c.fits(to_halves):
        how = "twice" if stored else "although this architecture rotates halves"
        return f"has its rows permuted for rotary pairs of neighbours {how}"
    if c.fits(to_pairs):
        how = "not permuted for rotary pairs of neighbours, which this architecture stores"
        return f"has its rows {how if stored else 'permuted back from pairs of neighbours'}"
    return ""


def _anothers(c: Case) -> str:
    """It may hold what belongs elsewhere: the same layer first, then the same name elsewhere."""
    for layer, suffix, theirs in _others(c):
        if not c.fits(c.model, theirs):
            continue
        weights = c.pair.model_weights
        name = weights.stored(layer, suffix)
        if not weights.has(layer, suffix):
            return f"holds what belongs in {name}"
        kind = QUANT_TYPES.get(weights.tensors[name].type)
        partner = replace(c, model=weights.layer_tensor(layer, suffix),
                          bounds=(kind.bound, kind.block_bound) if kind else c.bounds)  # fmt: skip
        if partner.fits(partner.model):
            return f"is swapped with {name}"
        is_right = partner.fits(partner.model, theirs)
        return f"{'is a duplicate of' if is_right else 'holds what belongs in'} {name}"
    return ""


def _others(c: Case) -> Iterator[tuple[int, str, Tensor]]:
    if c.layer is None:
        return
    weights, oracle = c.pair.oracle_weights, c.pair.oracle
    for suffix, tensor in weights.layer(c.layer).items():
        if suffix != c.suffix and tensor.shape == c.oracle.shape:
            yield c.layer, suffix, tensor
    look = range(min(_LOOK, len(c.oracle)))
    for layer in range(c.pair.graph.n_layers):
        name = weights.stored(layer, c.suffix)
        if layer != c.layer and c.fits(c.model[: len(look)], oracle.rows(name, look)):
            yield layer, c.suffix, oracle.tensor(name)


def _permuted(c: Case) -> str:
    """Rows, or columns, are those of the oracle in another order."""
    sides = [(c.model, c.oracle, "row")]
    if c.model.dim() == 2:
        sides.append((c.model.T, c.oracle.T, "column"))
    for model, oracle, noun in sides:
        if len(model) > _MATCHED_ROWS or model.dim() != 2:
            continue
        unit = [torch.nn.functional.normalize(t, dim=1) for t in (model, oracle)]
        source = torch.cat([(part @ unit[1].T).argmax(1) for part in unit[0].split(1024)])
        moved = (source != torch.arange(len(source))).nonzero().view(-1).tolist()
        if not moved or len(source.unique()) != len(source):
            continue
        if c.fits(model, oracle[source]):
            if len(moved) == 2:
                return f"has its {noun}s {moved[0]} and {moved[1]} swapped"
            first = moved[0]
            return (
                f"has its {noun}s permuted: {len(moved)} are elsewhere, {noun} {first} holds "
                f"{int(source[first])}"
            )
    return ""


def _single_places(c: Case) -> str:
    """All rows are well but a few, or all columns; within one row, perhaps all blocks but one."""
    if c.model.dim() != 2:
        wrong = (
            ((c.model - c.oracle).abs() > c.bounds[0] * c.oracle.abs()).nonzero().view(-1).tolist()
        )
        few = 0 < len(wrong) <= max(1, _FEW * len(c.oracle))
        return f"is wrong at {_places(wrong)} of {len(c.oracle)}" if few else ""
    for axis, noun in ((1, "row"), (0, "column")):
        error = (c.model - c.oracle).double().square().sum(axis)
        norm = c.oracle.double().square().sum(axis)
        wrong = (
            (error > (2 * c.bounds[0]) ** 2 * norm.maximum(norm.mean())).nonzero().view(-1).tolist()
        )
        if not 0 < len(wrong) <= _FEW * len(norm):
            continue
        kept = torch.ones(len(norm), dtype=torch.bool)
        kept[wrong] = False
        rest = (c.model[kept], c.oracle[kept]) if axis else (c.model[:, kept], c.oracle[:, kept])
        if c.fits(*rest):
            what = _kind(c, wrong, axis)
            return f"has {noun}s that are wrong{what}: {_places(wrong)} of {len(norm)}"
    return ""


def _kind(c: Case, wrong: list[int], axis: int) -> str:
    part = c.model[wrong] if axis else c.model[:, wrong]
    return " (all zeros)" if not bool(part.any()) else ""


def _block(c: Case) -> str:
    sizes = block_errors(c.model, c.oracle)
    wrong = sizes > c.bounds[1]
    if not 0 < int(wrong.sum()) <= _FEW * wrong.numel():
        return ""
    healed = torch.where(wrong.repeat_interleave(BLOCK, dim=1), c.oracle, c.model)
    if not c.fits(healed):
        return ""
    _, row, column = worst_block(c.model, c.oracle)
    model, oracle = (t[row, column : column + BLOCK] for t in (c.model, c.oracle))
    factor = float((model * oracle).sum() / oracle.square().sum().clamp(min=1e-30))
    said = "all zeros" if not bool(model.any()) else f"{factor:.3g} times what it should be"
    count = int(wrong.sum())
    what = "a bad block" if count == 1 else f"{count} bad blocks, the worst"
    return f"has {what}: row {row}, columns {column} to {column + BLOCK - 1} ({said})"


def figures(c: Case) -> str:
    """Return the figures that tell most of two tensors."""
    model, oracle = c.model.double().flatten(), c.oracle.double().flatten()
    norms = float(model.norm()), float(oracle.norm())
    cosine = float(model @ oracle) / (norms[0] * norms[1]) if all(norms) else math.nan
    size = norms[0] / norms[1] if norms[1] else math.inf
    return f"{OTHER_NUMBERS}: cosine {cosine:.4f}, norm ratio {size:.4g}"


def _places(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:3]))
    return shown + (f", ... ({len(numbers)})" if len(numbers) > 3 else "")


_GLOBAL: tuple[Callable[[Case], str], ...] = (
    _not_finite, _constant, _offset, _scaled, _transposed, _rope_permuted, _anothers, _permuted,
)  # fmt: skip
_LOCAL: tuple[Callable[[Case], str], ...] = (_single_places, _block)
"""What a whole tensor can suffer, and what a row or a block can; the first that explains it all
is said."""
_STRUCTURAL = (_not_finite, _constant, _transposed, _rope_permuted, _anothers, _permuted)
