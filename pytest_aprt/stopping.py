"""Whether the first divergence is certain before the run is over.

What may still change it are the arithmetics that the layers to come vote for: a point that only
another arithmetic explains is an origin or none, as the vote of its group goes. So the first
divergence is certain once it, and every point before it, stays what it is however they vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pytest_aprt.consensus import Tally, group_of
from pytest_aprt.stages import Point, StageGraph

if TYPE_CHECKING:
    from pytest_aprt.readings import PointErrors


class Decider:
    """Tells which points are origins for certain.

    Args:
        graph: the points of the model.
        prompts: how many are run.
        fed: the stages that a broken fact feeds, in which no origin is seen.
        tally: the votes so far.
    """

    def __init__(self, graph: StageGraph, prompts: int, fed: Collection[str], tally: Tally) -> None:
        self._graph, self._prompts, self._fed, self._tally = graph, prompts, fed, tally

    def first(self, errors: Sequence[PointErrors]) -> Point | None:
        """Return the first divergence if it is certain, given the errors so far."""
        votes = self._votes_left(errors)
        for e in sorted(errors, key=lambda e: self._graph.order(e.point)):
            origin = e.point.stage not in self._fed and self._is_origin(e, votes)
            if origin is None:
                return None
            if origin:
                return e.point
        return None

    def reached(self, errors: Sequence[PointErrors], layer: int | None) -> bool:
        """Return whether a prompt that was run up to ``layer`` need not go on.

        Another prompt's first divergence may lie in a layer that this one is yet to run.
        """
        first = None if layer is None else self.first(errors)
        return first is not None and first.layer is not None and first.layer <= (layer or 0)

    def certain(self, errors: Sequence[PointErrors]) -> list[PointErrors]:
        """Return the errors of the points that are an origin, or none, for certain.

        Those are points that every prompt reached.
        """
        votes, runs = self._votes_left(errors), Counter(e.point for e in errors)
        unsure = {e.point for e in errors if self._is_origin(e, votes) is None}
        return [e for e in errors if runs[e.point] == self._prompts and e.point not in unsure]

    def _votes_left(self, errors: Sequence[PointErrors]) -> Counter[str]:
        """Return how many points of each stage are still to be measured."""
        left = Counter(point.stage for point in self._graph.points for _ in range(self._prompts))
        left.subtract(e.point.stage for e in errors)
        return left

    def _is_origin(self, e: PointErrors, votes: Counter[str]) -> bool | None:
        """Return whether error was born at a point; None where the vote may decide either way."""
        if e.born_non_finite:
            return True
        if not e.readings or e.readings[0].explains:
            return False
        explaining = {r.arithmetic.name for r in e.readings if r.explains}
        if not explaining:
            return True
        if e.stood_in:  # has no part in the vote
            return False
        within = self._tally.will_be_among(
            group_of(e.point, e.bracket), explaining, votes[e.point.stage]
        )
        return None if within is None else not within
