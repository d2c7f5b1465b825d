"""What may be wrong with a dump that another tool wrote, and is no fault of its engine.

Such a dump does not say what it holds: which prompt, how many rows, before or after the bias. Each
is told from the values, named, and makes the run inconclusive. Q and K in GGUF's order of rows are
told likewise, and put in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytest_aprt.architectures import EMBEDDING
from pytest_aprt.capture import CheckedEngine, LayerStages
from pytest_aprt.errors import CaptureError
from pytest_aprt.row_order import RowOrder
from pytest_aprt.stages import STAGES, point_id
from pytest_aprt.weights import WeightSource, row_chunks

if TYPE_CHECKING:
    from pytest_aprt.dump import DumpRunner
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import PointErrors
    from pytest_aprt.sides import Sides

SAME_ROW = 0.9999
"""Cosine above which a row is a token's: storage in bfloat16 leaves 1 - 1e-5, and two tokens of a
trained vocabulary are far apart."""

SAME_ROW_OF_OTHER = 0.9
"""The same, where the rows at hand are those of the other side's weights: 2 bits leave 0.95."""

CLOSE, BETTER = 0.02, 0.1
"""A reading of a capture is believed if it leaves at most 2 %, and a tenth of what the plain one
leaves: 8-bit inputs leave 1 %, a bias moves a projection by more than that."""

SAME_SIDE, QUANTISED = 1e-5, 1e-3
"""Relative L2 below which two runs are one, and above which weights are quantised."""


class CheckedDump(CheckedEngine):
    """A dump without manifest behind the checks that say what it holds.

    Args:
        dump: the dump.
        pair: both sides; where the weights behind the dump are known, more can be told.
        name: what to call it in messages.
        of_model: whether the dump is the model's, else the oracle's.
    """

    def __init__(
        self, dump: DumpRunner, pair: Pair | Sides, name: str, *, of_model: bool = True
    ) -> None:
        super().__init__(dump, pair.graph, pair.oracle_facts, name)
        self._architecture = pair.architecture
        own: WeightSource | None = None
        other: WeightSource | None = None
        if pair.model is not None:
            own, other = (pair.model_weights, None) if of_model else (None, pair.model_weights)
        elif pair.oracle is not None:
            other = pair.oracle_weights
        self._weights, self._vocabulary = own, own or other
        self._same_row = SAME_ROW if own else SAME_ROW_OF_OTHER
        self._order = RowOrder(pair.oracle_facts, pair.architecture, self._vocabulary)

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the dump, once its layers have passed."""
        return self._order.notes

    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Yield every layer once and in order, Q and K rows in the order of Hugging Face.

        Raises:
            CaptureError: the values are another prompt's, or not those of their stage.
        """
        for captured in super().layers(tokens):
            if captured.layer == 0:
                if "embedding" in captured.stages:
                    self._check_tokens(captured.stages["embedding"], tokens)
                if self._weights is not None:
                    self._check_bias(captured.stages, self._weights)
            yield self._order.undone(captured, tokens)

    def _checked(
        self, layer: int | None, stages: Mapping[str, Any], tokens: int
    ) -> dict[str, Tensor]:
        sizes = self._facts.sizes(tokens)
        for name, value in stages.items():
            symbols = STAGES[name].shape if name in STAGES else ()
            if symbols[:1] != ("T",):
                continue
            rows, rest = divmod(np.size(value), math.prod(sizes[s] for s in symbols[1:]))
            if not rest and rows not in (1, tokens):
                raise CaptureError(
                    f"{self._name}: {point_id(layer, name)} holds {rows} rows, the prompt has "
                    f"{tokens} tokens: {_rows_in_words(rows, tokens)}"
                )
        return super()._checked(layer, stages, tokens)

    def _check_tokens(self, rows: Tensor, tokens: Sequence[int]) -> None:
        if self._vocabulary is None:
            return
        first, tokens = len(tokens) - len(rows), tokens[-len(rows) :]
        right = self._vocabulary.rows(EMBEDDING, tokens)
        wrong = [int(i) for i in (_cosine(rows, right) < self._same_row).nonzero()]
        found = self._tokens_of(rows[wrong], self._vocabulary)
        other = [(place, token) for place, token in zip(wrong, found, strict=True) if token >= 0]
        if other:
            place, token = other[0]
            raise CaptureError(
                f"{self._name}: the dump is another prompt's: row {first + place} of its embedding "
                f"is that of token {token}, the prompt has {tokens[place]} there ({len(other)} of "
                f"{len(tokens)} differ); give the tokens it ran on with --aprt-tokens",
                test="tokens",
            )

    def _tokens_of(self, rows: Tensor, weights: WeightSource) -> list[int]:
        """Return the token whose embedding each row is, -1 where it is none's."""
        best, token = torch.full((len(rows),), self._same_row), torch.full((len(rows),), -1)
        if len(rows):
            for chunk in row_chunks(self._facts.vocab):
                vocabulary = _unit(weights.rows(EMBEDDING, chunk))
                cosine, place = (_unit(rows) @ vocabulary.T).max(dim=1)
                token = torch.where(cosine > best, place + chunk.start, token)
                best = torch.maximum(cosine, best)
        return [int(t) for t in token]

    def _check_bias(self, stages: Mapping[str, Tensor], source: WeightSource) -> None:
        if not self._architecture.qkv_bias:
            return
        weights = source.layer(0)
        bias = torch.cat([weights[name] for name in STAGES["qkv_bias"].tensors])
        if {"attn_norm", "qkv_matmul"} <= stages.keys():
            matrix = torch.cat([weights[name] for name in STAGES["qkv_matmul"].tensors])
            product = stages["attn_norm"] @ matrix.T
            if _explains(stages["qkv_matmul"], product, product + bias):
                raise self._other_bias("qkv_matmul", "after")
        if {"qkv_bias", "k_post_rope"} <= stages.keys():
            keys = slice(self._facts.qkv_sizes[0], sum(self._facts.qkv_sizes[:2]))
            plain, biased = stages["qkv_bias"][:, keys], (stages["qkv_bias"] + bias)[:, keys]
            turned, *unturned = map(self._lengths, (stages["k_post_rope"], plain, biased))
            if _explains(turned, *unturned):
                raise self._other_bias("qkv_bias", "before")

    def _lengths(self, keys: Tensor) -> Tensor:
        """Return the length of every pair of channels, which no rotation changes: (T, g, D/2)."""
        heads = keys.reshape(len(keys), -1, self._facts.head_dim)
        if self._architecture.rotated_pairs == "half":
            first, second = heads.chunk(2, dim=-1)
        else:
            first, second = heads[..., ::2], heads[..., 1::2]
        return torch.hypot(first, second)

    def _other_bias(self, stage: str, side: str) -> CaptureError:
        expected = "before" if side == "after" else "after"
        return CaptureError(
            f"{self._name}: L00-{stage} holds the values {side} the bias, expected "
            f"those {expected} it; dump that stage at its place, or leave it out"
        )


def swapped_sides(errors: Iterable[PointErrors]) -> str | None:
    """Return what is wrong if the model's dump is a run of the oracle, else None.

    Quantised weights leave a distance to the oracle in any run of the model.
    """
    compared = [e for e in errors if e.total is not None and e.weights is not None]
    quantised = [e for e in compared if e.weights and e.weights.rel_l2 > QUANTISED]
    if not quantised or any(e.total and not e.total.rel_l2 <= SAME_SIDE for e in compared):
        return None
    return (
        f"the model's capture equals the oracle at all {len(compared)} points, although the "
        "weights are quantised: it is a dump of the oracle; name the model's"
    )


def _rows_in_words(rows: int, tokens: int) -> str:
    if rows > tokens:
        return "it is padded or another prompt's, dump the rows of this prompt alone"
    return "it is cut or another prompt's, dump all positions of this prompt"


def _explains(value: Tensor, plain: Tensor, other: Tensor) -> bool:
    """Return whether ``other`` explains the value and ``plain`` does not."""
    a, b = (float((value - x).norm()) for x in (plain, other))
    return b < BETTER * a and b < CLOSE * float(value.norm())


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (_unit(a) * _unit(b)).sum(-1)
