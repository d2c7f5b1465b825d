"""What the runs give: the prompts, how each point was read, and its four errors. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pytest_aprt.arithmetic import EXACT, Arithmetic
from pytest_aprt.compare import Metrics, Slice
from pytest_aprt.stages import Point


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and its token ids; the text is empty where ids were given."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The local error of a point, if its stage was computed in this arithmetic."""

    arithmetic: Arithmetic
    local: Metrics
    worst: Slice | None

    @property
    def explains(self) -> bool:
        """Whether nothing but rounding is left."""
        return explains(self.worst)

    @property
    def undoubted(self) -> float:
        """The worst slice's relative error, without what lies on the edge of two roundings."""
        return 0.0 if self.worst is None else self.worst.excess * self.arithmetic.tolerance.base


def explains(worst: Slice | None) -> bool:
    """Return whether a point's worst slice leaves nothing but rounding."""
    return worst is None or worst.excess <= 1


@dataclass(frozen=True, kw_only=True)
class PointErrors:
    """The four errors of one point on one prompt.

    ``local`` and ``worst`` are those of the one of the ``readings`` that is in the stage's own
    ``arithmetic``, else of the first, the exact one. ``bracket`` names the missing stages that
    the replay had to bridge: an error of this point was born in one of them or here.
    ``born_non_finite`` counts NaN and Inf that appear although every parent is wholly finite.
    ``only_total`` says why nothing but `total` could be measured, where that is so. ``stood_in``:
    the replay read the shadow's K or V of earlier positions, which the model's side did not expose.
    """

    point: Point
    prompt: int
    shape: tuple[int, ...]
    missing: bool = False
    total: Metrics | None = None
    weights: Metrics | None = None
    engine: Metrics | None = None
    local: Metrics | None = None
    worst: Slice | None = None
    arithmetic: Arithmetic = EXACT
    readings: tuple[Reading, ...] = ()
    born_non_finite: int = 0
    bracket: tuple[Point, ...] = ()
    only_total: str = ""
    stood_in: bool = False


@dataclass(frozen=True, kw_only=True)
class Finals:
    """The whole-model stages of one prompt on all three runs.

    ``logits`` are those of all positions by run, (T, V), where the runs formed them on their way.
    """

    prompt: Prompt
    model: Mapping[str, Tensor]
    shadow: Mapping[str, Tensor]
    oracle: Mapping[str, Tensor]
    logits: Mapping[str, Tensor] = field(default_factory=dict)
