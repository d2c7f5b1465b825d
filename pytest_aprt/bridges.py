"""Replays one side's captures, and bridges the stages that it does not expose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pytest_aprt.arithmetic import EXACT, FLOAT32_ULP, Arithmetic, Profile
from pytest_aprt.compare import non_finite
from pytest_aprt.consensus import Tally
from pytest_aprt.matrices import until
from pytest_aprt.positions import READS_ALL, STRAYS, first_of, last
from pytest_aprt.replay import (
    LINEAR,
    Context,
    Input,
    Reference,
    UnfitError,
    captured_input,
    replay,
    replayed_input,
)
from pytest_aprt.stages import STAGES, Point, Stage
from pytest_aprt.views import View

if TYPE_CHECKING:
    from pytest_aprt.architectures import Architecture
    from pytest_aprt.capture import LayerStages
    from pytest_aprt.facts import Facts
    from pytest_aprt.oracle import Prelude
    from pytest_aprt.stages import StageGraph
    from pytest_aprt.weights import ModelWeights


class Observable(Protocol):
    """A runner that can be looked at while it runs a layer."""

    stages: dict[str, Tensor]


class Replayable(Protocol):
    """What is known of a side that is replayed."""

    @property
    def graph(self) -> StageGraph:
        """The points of the model."""

    @property
    def architecture(self) -> Architecture:
        """The family."""

    @property
    def oracle_facts(self) -> Facts:
        """The configuration that the side should have."""

    @property
    def model_weights(self) -> ModelWeights:
        """The weights that it runs."""


class BridgedReplay:
    """Replays one side's captures, and bridges stages that the side does not expose.

    What stands in for a missing stage is computed in the same arithmetic as the stage that is
    asked for. Where a layer's output is missing, it is carried into the next layer in every
    arithmetic that has explained a point so far.

    Where the side captured the last position alone, ``first`` is that position, and the K and V
    that attention reads of earlier positions are the shadow's (``stand_in``).
    """

    def __init__(
        self,
        pair: Replayable,
        tokens: tuple[int, ...],
        prelude: Prelude,
        profile: Profile,
        tally: Tally,
    ) -> None:
        self._pair, self._tokens, self._prelude = pair, tokens, prelude
        self.profile, self.tally = profile, tally
        self._values: dict[Point, Tensor] = {}
        self._bridges: dict[tuple[Point, str], Reference] = {}
        self._carried: tuple[Point, tuple[Point, ...]] | None = None
        self._prepared: dict[Point, Reference] = {}
        self._asked: tuple[Point, Reference] | None = None
        self.first = 0
        self._whole: dict[Point, Tensor] = {}  # of all positions, though others are not
        self._stand_ins: Mapping[str, Tensor] = {}

    def enter(self, captured: LayerStages) -> Context:
        """Take in a layer's captured stages and return what its replay needs besides them."""
        self._layer, pair = captured.layer, self._pair
        layer = self._layer
        entry = pair.graph.layer_input(layer)
        values = {Point(layer, name): tensor for name, tensor in captured.stages.items()}
        self._carry(entry, () if layer == 0 else self._arithmetics_to_carry())
        if entry in self._values:
            values[entry] = self._values[entry]
        tokens = len(self._tokens)
        self.first = self.first or first_of(captured.stages, tokens)
        self._whole = {p: x for p, x in values.items() if self.first and len(x) == tokens}
        self._values = {p: last(p.stage, x, tokens - self.first) for p, x in values.items()}
        self._bridges = {k: self._cut(k[0], found) for k, found in self._bridges.items()}
        self._prepared, self._stand_ins, self._asked = {}, {}, None
        self._context = Context(
            facts=pair.oracle_facts,
            architecture=pair.architecture,
            weights={} if layer is None else pair.model_weights.layer(layer),
            call={} if layer is None else self._prelude.calls[layer],
            source=pair.model_weights,
            tokens=self._tokens,
            types=pair.model_weights.types(layer),
            first=self.first,
        )
        return self._context

    def stand_in(self, shadow: Mapping[str, Tensor]) -> None:
        """Take in the shadow's stages of the layer, all positions."""
        self._stand_ins = shadow

    def cut(self, stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return another side's stages at the positions that were captured of this one."""
        count = len(self._tokens) - self.first
        return {name: last(name, tensor, count) for name, tensor in stages.items()}

    def _cut(self, point: Point, found: Reference) -> Reference:
        count = len(self._tokens) - self.first
        doubt = None if found.doubt is None else last(point.stage, found.doubt, count)
        return Reference(
            last(point.stage, found.value, count),
            lambda: last(point.stage, found.response, count),
            doubt,
        )

    def _carry(self, entry: Point, arithmetics: Sequence[Arithmetic]) -> None:
        """Leave the last layer, keeping what stands in for its output where that is missing."""
        bridges: dict[tuple[Point, str], Reference] = {}
        gap: tuple[Point, ...] | None = None
        if arithmetics and entry not in self._values:
            gap = (*self._gap(entry), entry)
            for arithmetic in arithmetics:
                with suppress(UnfitError):
                    bridges[entry, arithmetic.name] = self._bridge(entry, arithmetic)
        self._bridges = bridges
        self._carried = None if gap is None else (entry, gap)

    def _arithmetics_to_carry(self) -> list[Arithmetic]:
        found = self.tally.explained_by()
        return [EXACT, *found] if found else self.profile.arithmetics(["matmul"])

    def reference(self, point: Point, arithmetic: Arithmetic = EXACT) -> Reference:
        """Return the replay of a point in an arithmetic.

        Raises:
            UnfitError: the arithmetic's blocks do not fit the point's shapes.
        """
        parents = self._pair.graph.parents(point)
        if arithmetic == EXACT and point in self._prepared:
            found = self._prepared[point]
        else:
            inputs = [self._read(point, parent, arithmetic) for parent in parents]
            found = replay(point.stage, replace(self._context, arithmetic=arithmetic), inputs)
        captured = all(parent in self._values for parent in parents)
        return self._responding(point, found) if captured and not self.stood_in(point) else found

    def _responding(self, point: Point, found: Reference) -> Reference:
        """Return the same: what responds to captured inputs does so in every arithmetic alike."""
        if self._asked is None or self._asked[0] != point:
            self._asked = point, found
        first = self._asked[1]
        return replace(found, respond=lambda: first.response)

    def take(self, stages: Mapping[str, Tensor]) -> None:
        """Take in more of the layer's captured stages."""
        self._values |= {Point(self._layer, name): tensor for name, tensor in stages.items()}

    def products(self) -> Iterator[Callable[[], None]]:
        """Yield what replays each product with weights ahead of time, for ``together``."""
        for stage in self._pair.graph.of_layer(self._layer):
            point = Point(self._layer, stage.name)
            parents = self._pair.graph.parents(point)
            if stage.name in LINEAR and all(parent in self._values for parent in parents):
                yield partial(self._prepare, point)

    def products_of(self, runner: Observable) -> Iterator[Callable[[], None]]:
        """Yield the same for a runner that runs side by side with them."""
        for stage in self._pair.graph.of_layer(self._layer):
            if stage.name in LINEAR:
                yield partial(self._prepare_when_there, Point(self._layer, stage.name), runner)

    def _prepare_when_there(self, point: Point, runner: Observable) -> None:
        (parent,) = self._pair.graph.parents(point)
        until(lambda: parent.stage in runner.stages)
        self.take({parent.stage: runner.stages[parent.stage].detach()})
        self._prepare(point)

    def _prepare(self, point: Point) -> None:
        self._prepared[point] = self.reference(point)

    def _input(self, point: Point, arithmetic: Arithmetic) -> Input:
        if point in self._values:
            return captured_input(self._values[point])
        return replayed_input(self._bridge(point, arithmetic), arithmetic.tolerance.base)

    def _read(self, point: Point, parent: Point, arithmetic: Arithmetic) -> Input:
        """Return what a point reads of a parent: of K and V all positions."""
        found = self._input(parent, arithmetic)
        if not self.first or parent != self._history_of(point):
            return found
        if parent in self._whole:
            return captured_input(self._whole[parent])
        shadow = self._stand_ins[parent.stage].double()
        earlier, own = shadow[: self.first], shadow[self.first :]
        channels = slice(None)
        if point.stage == "attention":
            channels = slice(sum(self._pair.oracle_facts.qkv_sizes[:2]), None)
        apart = (found.value - own)[:, channels].norm() / own[:, channels].norm()
        size = earlier[:, channels].square().mean(-1, keepdim=True).sqrt()
        off = STRAYS * apart * torch.maximum(size, earlier.abs())
        ulps = off * (FLOAT32_ULP / arithmetic.tolerance.base)
        return Input(
            torch.cat([earlier, found.value]),
            torch.cat([torch.hypot(earlier.abs() * FLOAT32_ULP, ulps), found.move]),
            torch.cat([off, torch.zeros_like(found.value) if found.off is None else found.off]),
        )

    def _history_of(self, point: Point) -> Point | None:
        """Return the parent of which a point reads earlier positions than its own."""
        read = {"K": "k_post_rope", "V": self._pair.graph.qkv}.get(READS_ALL.get(point.stage, ""))
        return None if read is None else Point(point.layer, read)

    def stood_in(self, point: Point) -> bool:
        """Return whether the point's replay rests on another side's K or V."""
        if not self.first:
            return False
        read = (self._history_of(p) for p in (*self._gap(point), point))
        return any(p is not None and p not in self._whole for p in read)

    def _bridge(self, point: Point, arithmetic: Arithmetic) -> Reference:
        """Return what stands in for a point that was not captured."""
        key = (point, arithmetic.name)
        if self._carried and point == self._carried[0]:
            return self._bridges.get(key) or self._bridges[point, EXACT.name]
        if key not in self._bridges:
            self._bridges[key] = self.reference(point, arithmetic.stored("float32"))
        return self._bridges[key]

    def bracket(self, point: Point) -> tuple[Point, ...]:
        """Return the missing points that lie between this one and its captured ancestors."""
        return tuple(sorted(self._gap(point), key=self._pair.graph.order))

    def _gap(self, point: Point) -> set[Point]:
        found: set[Point] = set()
        for parent in self._pair.graph.parents(point):
            if self._carried and parent == self._carried[0]:
                found.update(self._carried[1])
            elif parent not in self._values:
                found |= {parent} | self._gap(parent)
        return found

    def parents_finite(self, point: Point, view_of: Callable[[Stage], View]) -> bool:
        """Return whether everything that the point was computed from is finite."""
        return all(
            non_finite(self._input(p, EXACT).value, view_of(STAGES[p.stage])) == 0
            and bool(torch.isfinite(self._whole.get(p, torch.zeros(()))).all())
            for p in self._pair.graph.parents(point)
        )
