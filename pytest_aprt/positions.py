"""Captures of the last position alone: how they are told, and how the other side is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_aprt.stages import STAGES

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_aprt.readings import PointErrors, Prompt

READS_ALL = {"attn_scores": "K", "attention": "V"}
"""The stages that read earlier positions than their own, and what of them."""

STRAYS = 16.0
"""How many times as far from the shadow as the last position's an earlier position's K or V may be.

Healthy 8-bit engines stay below 0.54 of what that allows, on 2 to 64 tokens of three families; with
few keys and heads the distance is a matter of chance. tests/test_last_position.py
"""


def token_axis(stage: str) -> int | None:
    """Return which axis of a stage's tensor counts the positions; None where none does."""
    shape = STAGES[stage].shape
    return shape.index("T") if "T" in shape else None


def last(stage: str, tensor: Tensor, count: int) -> Tensor:
    """Return the last ``count`` positions of a stage; one without positions as it is."""
    axis = token_axis(stage)
    if axis is None or tensor.shape[axis] == count:
        return tensor
    return tensor.narrow(axis, tensor.shape[axis] - count, count)


def first_of(stages: Mapping[str, Tensor], tokens: int) -> int:
    """Return the first position that all of these stages hold: 0, or the last one."""
    for name, tensor in stages.items():
        axis = token_axis(name)
        if axis is not None and tensor.shape[axis] != tokens:
            return tokens - int(tensor.shape[axis])
    return 0


def note_on(errors: Sequence[PointErrors], prompts: Sequence[Prompt]) -> list[str]:
    """Return what a reader must know where the last position alone was compared."""
    cut = [e for e in errors if not e.missing and _is_cut(e, len(prompts[e.prompt].tokens))]
    if not cut:
        return []
    points = list(dict.fromkeys(str(e.point) for e in cut))
    note = (
        f"the last position alone was captured and judged at {len(points)} points, first at "
        f"{points[0]}: the other side is cut to match"
    )
    if any(e.stood_in for e in cut):
        note += (
            "; the K and V that attention reads of earlier positions are the shadow's, so what "
            "attention adds is seen down to the distance of the engine from the shadow; dump all "
            "positions to see more"
        )
    return [note]


def _is_cut(e: PointErrors, tokens: int) -> bool:
    axis = token_axis(e.point.stage)
    return axis is not None and e.shape[axis] != tokens
