"""Which arithmetic each stage is in: what is found in most layers is the engine's way to compute.

A rounding in one layer alone is a fault, and the same rounding in every layer is an arithmetic.
So the readings of all layers vote, stage by stage, before anything is judged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pytest_aprt.arithmetic import EXACT, Arithmetic
from pytest_aprt.readings import PointErrors, Reading
from pytest_aprt.stages import Point

Group = tuple[str, ...]
"""A stage and the missing stages that its replay bridged: such points have one arithmetic."""

_ENOUGH = 3
"""Points of a stage that are read in every arithmetic before the leading one is tried first."""

_LEAST_SUPPORT = 2
"""Points of a run that each rounding of an arithmetic must help to explain; one alone may be a
fault that looks like it. The head is one point: it is read by what rounds elsewhere."""


def group_of(point: Point, bracket: Sequence[Point]) -> Group:
    """Return the group that a point votes in."""
    return (point.stage, *dict.fromkeys(p.stage for p in bracket))


@dataclass
class Tally:
    """Counts, group by group, which arithmetics explain what the exact one does not."""

    _groups: dict[Group, list[Sequence[Reading]]] = field(default_factory=lambda: defaultdict(list))
    _support: Counter[tuple[str, str]] = field(default_factory=Counter)
    _known: dict[str, Arithmetic] = field(default_factory=dict)

    def add(self, group: Group, explaining: Sequence[Reading]) -> None:
        """Take in all that explain one point."""
        if explaining:
            self._groups[group].append(explaining)
        self._support.update({r for reading in explaining for r in reading.arithmetic.roundings})
        for reading in explaining:
            self._known.setdefault(reading.arithmetic.name, reading.arithmetic)

    def leaders(self, group: Group) -> list[Arithmetic]:
        """Return the arithmetics to try first, once enough points were read in all of them.

        All that explain most points so far: two may do until a point tells them apart, and
        every point must have been read in the one that is chosen in the end.
        """
        if len(self._groups.get(group, ())) < _ENOUGH:
            return []
        count = Counter(r.arithmetic.name for point in self._groups[group] for r in point)
        return [self._known[name] for name in count if count[name] == max(count.values())]

    def choice(self, group: Group) -> Arithmetic:
        """Return the arithmetic that explains most points of a group, and of these the nearest."""
        count: Counter[str] = Counter()
        error: dict[str, float] = defaultdict(float)
        for explaining in self._groups.get(group, ()):
            for reading in explaining:
                count[reading.arithmetic.name] += 1
                error[reading.arithmetic.name] += reading.local.rel_l2
        fit = [name for name in count if self._fits(name)]
        if not fit:
            return EXACT
        best = min(fit, key=lambda name: (-count[name], name != EXACT.name, error[name]))
        return self._known[best]

    def _fits(self, name: str) -> bool:
        return all(self._support[r] >= _LEAST_SUPPORT for r in self._known[name].roundings)

    def will_be_among(self, group: Group, names: Collection[str], votes: int) -> bool | None:
        """Return whether the choice will be one of ``names``, whatever the votes to come.

        Args:
            group: of points.
            names: of arithmetics.
            votes: how many points of the group are to come, at most.

        Returns:
            None where that is open.
        """
        count = Counter(r.arithmetic.name for point in self._groups.get(group, ()) for r in point)
        fit = {name: c for name, c in count.items() if self._fits(name)}
        among = max((c for name, c in fit.items() if name in names), default=0)
        beside = max((c for name, c in count.items() if name not in names), default=0)
        if among > beside + votes:
            return True
        beside = max((c for name, c in fit.items() if name not in names), default=0)
        among = max((c for name, c in count.items() if name in names), default=0)
        return False if beside > among + votes else None

    def arithmetics(self) -> dict[Group, Arithmetic]:
        """Return the arithmetic of every group of which a point was explained."""
        return {group: self.choice(group) for group in self._groups}

    def explained_by(self) -> list[Arithmetic]:
        """Return every arithmetic but the exact one that explained a point so far."""
        return [a for name, a in self._known.items() if name != EXACT.name]


def settled(
    errors: Sequence[PointErrors], arithmetics: Mapping[Group, Arithmetic]
) -> list[PointErrors]:
    """Return the errors, each read in the arithmetic of its group.

    A point that only another arithmetic explains keeps its exact reading, so it is an origin. But
    one whose replay rests on a stand-in has no part in the vote: what rounding does to it is lost
    in the stand-in's distance at some of the layers, and not at others.
    """
    return [
        _nearest(e)
        if e.stood_in
        else _read(e, arithmetics.get(group_of(e.point, e.bracket), EXACT))
        for e in errors
    ]


def _nearest(e: PointErrors) -> PointErrors:
    explaining = [reading for reading in e.readings if reading.explains]
    best = min(explaining, key=lambda reading: reading.local.rel_l2, default=None)
    return e if best is None else _read(e, best.arithmetic)


def _read(e: PointErrors, arithmetic: Arithmetic) -> PointErrors:
    for reading in e.readings:
        if reading.arithmetic.name == arithmetic.name:
            return replace(e, local=reading.local, worst=reading.worst, arithmetic=arithmetic)
    return e


def in_words(arithmetics: Mapping[Group, Arithmetic]) -> str:
    """Return the run's arithmetic: one name, or each name with the stages that it holds for."""
    stages: dict[str, list[str]] = defaultdict(list)
    for (stage, *bridged), arithmetic in arithmetics.items():
        told = stage != "embedding" and not (bridged and arithmetic == EXACT)
        if told and stage not in stages[arithmetic.name]:  # a lookup rounds nothing
            stages[arithmetic.name].append(stage)
    stages = {name: found for name, found in stages.items() if found}
    if len(stages) <= 1:
        return next(iter(stages), EXACT.name)
    rest = max(stages, key=lambda name: len(stages[name]))
    special = [f"{name} at {', '.join(stages[name])}" for name in stages if name != rest]
    return f"{rest}; " + "; ".join(special)
