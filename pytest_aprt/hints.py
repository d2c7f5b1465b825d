"""What a local error probably means: signatures, the first that fits speaks.

Each row is a test on the numbers of one origin and one sentence. A hint never decides anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_aprt.stages import Stage

if TYPE_CHECKING:
    from pytest_aprt.readings import PointErrors

_Test = Callable[[Stage, "PointErrors"], bool]


def _non_finite(stage: Stage, e: PointErrors) -> bool:
    return e.born_non_finite > 0


def _vanished(stage: Stage, e: PointErrors) -> bool:
    return e.local is not None and e.local.norm_ratio == 0


def _scaled(stage: Stage, e: PointErrors) -> bool:
    return (
        e.local is not None
        and e.local.cosine > 1 - 1e-7
        and not math.isclose(e.local.slope, 1.0, rel_tol=1e-5)
    )


def _negated(stage: Stage, e: PointErrors) -> bool:
    return e.local is not None and e.local.cosine < -0.999


def _one_slice(axis: str) -> _Test:
    """Fits where one slice alone carries the error: its share of the whole is nearly all."""

    def test(stage: Stage, e: PointErrors) -> bool:
        return (
            e.worst is not None
            and e.local is not None
            and e.worst.axis == axis
            and e.worst.rel_l2 > 10 * e.local.rel_l2
        )

    return test


def _of_kind(*kinds: str) -> _Test:
    return lambda stage, e: stage.kind in kinds


_ROWS: tuple[tuple[_Test, str], ...] = (
    (_non_finite, "overflow, an uninitialised buffer, or a division by zero in this operation"),
    (_vanished, "the output is all zero: the operation did not run, or its buffer was not read"),
    (
        _scaled,
        "the direction is right and the length is not: a missing or doubled factor (softmax scale, "
        "1/sqrt(head_dim), a wrong eps, norm weight, embedding scale)",
    ),
    (_negated, "the sign is turned"),
    (_one_slice("channel"), "one output channel is wrong: a bad row or block of the weight"),
    (_one_slice("head"), "one head is wrong: head mapping, stride, or a grouped-query index"),
    (_one_slice("token"), "one token is wrong: position, padding, or a stale row of a buffer"),
    (_one_slice("part"), "one of Q, K and V is wrong and the others are right"),
    (
        _of_kind("rope"),
        "rotary embedding: base, pairing of channels (halves or neighbours), positions, scaling, "
        "or QK-norm; position 0 is blind to most of these",
    ),
    (_of_kind("scores"), "scale 1/sqrt(head_dim), or which K head each Q head reads"),
    (_of_kind("softmax"), "causal mask or sliding window, or a softmax over the wrong axis"),
    (_of_kind("mix"), "which V head each head reads, V's layout, or how heads are concatenated"),
    (_of_kind("norm"), "norm weight, eps, or the kind of norm"),
    (
        _of_kind("matmul"),
        "the weight as the engine reads it: dequantisation, layout, transposition",
    ),
    (_of_kind("add"), "a bias or residual: missing, added twice, or of another layer"),
    (_of_kind("gate"), "activation function, or gate and up exchanged"),
    (_of_kind("lookup"), "row lookup, token ids, or a missing embedding scale"),
)


def hint_for(stage: Stage, errors: PointErrors) -> str | None:
    """Return one sentence on what the local error of an origin probably means."""
    return next((text for test, text in _ROWS if test(stage, errors)), None)
