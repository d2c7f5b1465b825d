"""Q and K in the order of rows that GGUF files of some families have: recognised, and undone.

Such files store the rows of a head as (0, D/2, 1, D/2 + 1, ...), so that rotary pairs are
neighbours, and an engine that runs them as they are dumps Q and K so. That is no fault: scores are
the same. Which order a dump is in is told from its values, stage by stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, Architecture
from pytest_aprt.capture import LayerStages
from pytest_aprt.forward import rms_norm
from pytest_aprt.weights import times

if TYPE_CHECKING:
    from pytest_aprt.facts import Facts
    from pytest_aprt.weights import WeightSource

NEAR = 0.5
"""An order is believed if it leaves at most half of the value, and half of what the other order
leaves. 2-bit weights leave 0.3, the wrong order of random rows 1.4: tests/test_row_order.py."""

NEAR_IN_LENGTH = 0.1
"""The same for lengths, which are positive: those of unrelated pairs differ by 0.6."""

_PARTS = {
    # stage: which parts of qkv it holds
    "qkv_matmul": (0, 1),
    "qkv_bias": (0, 1),
    "q_post_rope": (0,),
    "k_post_rope": (1,),
}


def in_hf_order(x: Tensor, head_dim: int) -> Tensor:
    """Return (T, heads*D) in GGUF's order of rows in that of Hugging Face."""
    pairs = x.reshape(len(x), -1, head_dim // 2, 2)
    return pairs.transpose(2, 3).reshape(len(x), -1)


class RowOrder:
    """Tells the order of a dump's Q and K, and puts them in that of Hugging Face.

    Args:
        facts: the shapes.
        architecture: its family.
        weights: those behind the dump, or those of the other side.
    """

    def __init__(
        self, facts: Facts, architecture: Architecture, weights: WeightSource | None
    ) -> None:
        self._facts, self._architecture, self._weights = facts, architecture, weights
        self._permuted: dict[str, bool] = {}
        self._entry: Tensor | None = None  # what enters the layer, if it was captured

    @property
    def notes(self) -> list[str]:
        """What a reader must know: the stages that were in GGUF's order."""
        found = [stage for stage in _PARTS if self._permuted.get(stage)]
        if not found:
            return []
        return [
            f"the dump holds {', '.join(found)} in GGUF's order of Q and K rows, in which rotary "
            "pairs are neighbours: read in the order of Hugging Face, no fault"
        ]

    def undone(self, captured: LayerStages, tokens: Sequence[int]) -> LayerStages:
        """Return a layer's stages with Q and K in the order of Hugging Face."""
        if captured.layer is None or not self._architecture.permuted_qk or self._weights is None:
            return captured
        open_ = [s for s in _PARTS if s in captured.stages and s not in self._permuted]
        if open_:
            self._tell(open_, captured.layer, captured.stages, tokens, self._weights)
        self._entry = captured.stages.get("post_ffn_residual")
        put = {
            stage: self._reordered(stage, value) if self._permuted.get(stage) else value
            for stage, value in captured.stages.items()
        }
        return LayerStages(captured.layer, put)

    def _tell(
        self,
        stages: Sequence[str],
        layer: int,
        captured: Mapping[str, Tensor],
        tokens: Sequence[int],
        weights: WeightSource,
    ) -> None:
        normed = self._normed(layer, captured, tokens, weights)
        if normed is None:
            return
        tensors = weights.layer(layer)
        parts = [times(tensors, f"self_attn.{part}_proj.weight", normed) for part in "qk"]
        for stage in stages:
            expected = torch.cat([parts[part] for part in _PARTS[stage]], dim=-1)
            told = self._is_permuted(stage, captured[stage], expected, len(tokens))
            if told is not None:
                self._permuted[stage] = told

    def _is_permuted(self, stage: str, value: Tensor, expected: Tensor, tokens: int) -> bool | None:
        """Return whether a stage is in GGUF's order; None where its values do not say."""
        rows, near = min(len(value), len(expected)), NEAR
        plain, expected = value[-rows:, : expected.shape[-1]], expected[-rows:]
        turned = in_hf_order(plain, self._facts.head_dim)
        if stage.endswith("_post_rope"):
            if self._architecture.qk_norm:
                return None
            if rows == tokens:  # position 0 is not turned
                plain, turned, expected = plain[:1], turned[:1], expected[:1]
            else:
                plain, turned, expected = map(self._lengths, (plain, turned, expected))
                near = NEAR_IN_LENGTH
        errors = [float((side - expected).norm()) for side in (plain, turned)]
        bound = near * min(float(plain.norm()), max(errors))
        return errors[1] < errors[0] if min(errors) < bound else None

    def _lengths(self, x: Tensor) -> Tensor:
        """Return the length of every rotary pair, which no rotation changes."""
        first, second = x.unflatten(-1, (-1, 2, self._facts.head_dim // 2)).unbind(-2)
        return torch.hypot(first, second)

    def _normed(
        self,
        layer: int,
        captured: Mapping[str, Tensor],
        tokens: Sequence[int],
        weights: WeightSource,
    ) -> Tensor | None:
        """Return what the projections read, captured or computed; None where it is not known."""
        if "attn_norm" in captured:
            return captured["attn_norm"]
        entry = self._entry
        if layer == 0:
            entry = weights.rows(EMBEDDING, tokens) * self._architecture.embedding_scale(
                self._facts.hidden
            )
        if entry is None:
            return None
        gamma = weights.layer(layer)["input_layernorm.weight"]
        return rms_norm(entry, gamma, self._facts.eps, self._architecture)

    def _reordered(self, stage: str, value: Tensor) -> Tensor:
        turned = sum(self._facts.qkv_sizes[part] for part in _PARTS[stage])
        ours = in_hf_order(value[:, :turned], self._facts.head_dim)
        return torch.cat([ours, value[:, turned:]], dim=-1)
