"""A run without the oracle's code: the model's stages against the oracle's, `total` first of all.

Where the oracle is an engine, each side's own replay is added (``two_engines``); else `total` is
alone.

What agrees passes. What does not agree is left open, since quantised weights may explain it; only
non-finite values that appear behind finite inputs are an origin, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_aprt import report, selftest
from pytest_aprt.bridges import BridgedReplay
from pytest_aprt.buffers import hold_on
from pytest_aprt.capture import Engine, LayerStages
from pytest_aprt.compare import Metrics, measure, non_finite
from pytest_aprt.consensus import in_words
from pytest_aprt.dump import DumpRunner, Fields, kept_in
from pytest_aprt.engines.choose import Chosen, engine_of
from pytest_aprt.errors import CaptureError
from pytest_aprt.matrices import compute_threads
from pytest_aprt.measure import Keep, Measurement, Progress, readings_of
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.positions import first_of, last, note_on
from pytest_aprt.readings import Finals, PointErrors, Prompt
from pytest_aprt.run import (
    facts_of_run,
    notes_on,
    prompts_of,
    quantisation_of,
    thresholds_of,
)
from pytest_aprt.rungs import PATH, TOKENS, Row, decode_names, unavailable
from pytest_aprt.rungs.config import FactRow, engine_fact_rows
from pytest_aprt.rungs.logits import total_rows
from pytest_aprt.rungs.path import path_rows
from pytest_aprt.settings import Settings
from pytest_aprt.sides import Sides
from pytest_aprt.stages import STAGES, Point, Stage
from pytest_aprt.statuses import OF_ENGINES, OF_LIVE_ORACLE, OF_TOTALS
from pytest_aprt.two_engines import Engines, engines_of, note_on_engines
from pytest_aprt.verdict import conclude
from pytest_aprt.views import View


def run_totals(
    sides: Sides,
    settings: Settings,
    user_engine: Any | None,
    progress: Progress,
    keep: Keep = lambda side, prompt, layers: layers,
    user_oracle: Any | None = None,
) -> report.Report:
    """Run or read both sides on the prompts and judge every point by `total` alone.

    Where the oracle is another engine, each side's replay judges as well (``two_engines``).

    Args:
        sides: the opened files.
        settings: what was asked.
        user_engine: the engine of ``pytest_aprt_model``, if any.
        progress: told after every layer.
        keep: wraps the layers of both sides (see ``measure_pair``).
        user_oracle: the engine that is the oracle, if it is of the user's own.

    Raises:
        AprtError: the input cannot be run.
    """
    told = facts_of_run(settings)
    prompts = prompts_of(settings, sides)
    chosen = engine_of(sides, settings.model_side, user_engine, prompts)
    engine, name = chosen.engine, chosen.name
    hashes = _hashes(sides, settings)
    if settings.dump is not None:
        fields: Fields = {
            "model": {"model_sha256": hashes["model"], "engine": name, "arithmetic": "auto"},
            "oracle": {"oracle_sha256": hashes["oracle"], "config": sides.config},
        }
        keep = kept_in(settings.dump, prompts, fields, keep)
    oracle, engines, facts = _oracle_of(sides, settings, chosen, user_oracle, prompts)
    thresholds = thresholds_of(settings)
    path = unavailable(PATH, sides.why)
    with compute_threads(settings.threads):
        measurement = measure_totals(sides, engine, oracle.engine, prompts, progress, keep, engines)
        logits = total_rows(sides, measurement.finals)
        if engines is not None:
            path = path_rows(sides, engine, measurement.finals, thresholds["lm_head"].cosine)
    rungs: dict[str, Sequence[Row]] = {
        "tokens": unavailable(TOKENS, sides.why),
        "logits": logits,
        "decode": unavailable(decode_names(settings.decode_steps), sides.why),
        "path": path,
    }
    verdict = conclude(
        sides.graph, sides.graph.points, measurement, facts, thresholds, rungs,
        strict=settings.strict,
    )  # fmt: skip
    return report.build(
        run=told(prompts),
        model={
            "source": settings.model,
            "kind": settings.model_kind,
            "engine": name,
            "engine_details": dict(chosen.details()),
            "arithmetic": in_words(measurement.arithmetics) if engines else "not judged",
            "profile": engines.model.profile.name if engines else settings.arithmetic,
            "architecture": sides.architecture.name,
            "quantisation": {} if sides.model is None else quantisation_of(sides.model),
            "sha256": hashes["model"],
        },
        oracle={
            "source": settings.oracle,
            "kind": settings.oracle_kind,
            "architecture": str((sides.config or {}).get("model_type", "unknown")),
            "sha256": hashes["oracle"],
        },
        measurement=measurement,
        facts=facts,
        rungs=rungs,
        verdict=verdict,
        notes=[
            *(_notes(sides, measurement) if engines is None else [note_on_engines(sides, oracle)]),
            *note_on(measurement.errors, prompts),
            *getattr(engine, "notes", ()),
            *notes_on(prompts),
        ],
        graph=sides.graph,
    )


def _notes(sides: Sides, measurement: Measurement) -> list[str]:
    """Return what a reader must know of such a run."""
    notes = [
        f"total alone was judged: {sides.why}. What the quantised weights cost and what the engine "
        "adds cannot be told apart, nor can an error below the threshold be seen. The rungs "
        "tokens, config, weights, decode and path were not judged."
    ]
    compared = [e.total for e in measurement.errors if e.total is not None]
    if compared and all(total.rel_l2 == 0 for total in compared):
        notes.append(
            f"the model's capture equals the oracle's bit for bit at all {len(compared)} points, "
            "as no two engines' do: it is a dump of the oracle"
        )
    return notes


def _oracle_of(
    sides: Sides,
    settings: Settings,
    model: Chosen,
    user_oracle: Any | None,
    prompts: Sequence[Prompt],
) -> tuple[Chosen, Engines | None, list[FactRow]]:
    """Return what runs or reads the oracle; of an engine what replays it, and the facts."""
    if sides.oracle is not None and not settings.oracle_is_engine:
        runner = TransformersRunner(sides.transformers_config, sides.oracle_weights)
        return Chosen(runner, "transformers"), None, []
    oracle = engine_of(sides, settings.oracle_side, user_oracle, prompts, sides.other)
    if not sides.is_replayed:
        return oracle, None, []
    engines = engines_of(sides, settings, model, oracle, prompts)
    longest = max(len(prompt.tokens) for prompt in prompts)
    facts: list[FactRow] = []
    if sides.model is not None and sides.other is not None:
        facts = engine_fact_rows(sides.model, sides.other, longest)
    return oracle, engines, facts


def _hashes(sides: Sides, settings: Settings) -> dict[str, str]:
    """Return the sha256 of each side's weights; of a dump what its manifest says, or nothing."""
    found = dict.fromkeys(("model", "oracle"), "")
    for side, file, source in (
        ("model", sides.model, settings.model),
        ("oracle", sides.other or sides.oracle, settings.oracle),
    ):
        if file is not None:
            found[side] = file.sha256()
        elif source in settings.dumps:
            found[side] = str(DumpRunner.open(source).recorded(f"{side}_sha256") or "")
    return found


@torch.no_grad()
@compute_threads()
def measure_totals(
    sides: Sides,
    engine: Engine,
    oracle: Engine,
    prompts: Sequence[Prompt],
    progress: Progress = lambda what, done, total: None,
    keep: Keep = lambda side, prompt, layers: layers,
    engines: Engines | None = None,
) -> Measurement:
    """Run or read both sides once, and return the numbers.

    Args:
        sides: what is known of both.
        engine: the model under test.
        oracle: the oracle, an engine likewise.
        prompts: at least one.
        progress: told after every layer.
        keep: wraps the layers of the sides ``model`` and ``oracle`` on every prompt.
        engines: what both sides are replayed with, where the oracle is an engine.
    """
    hold_on()
    result = Measurement()
    runs_oracle = isinstance(oracle, TransformersRunner)
    names = OF_TOTALS + (OF_LIVE_ORACLE if runs_oracle else OF_ENGINES if engines else ())
    checks = selftest.Checks(sides.oracle_facts.vocab, names)
    layers = [*range(sides.graph.n_layers), None]
    done = 0
    try:
        for index, prompt in enumerate(prompts):
            checks.tokens(prompt.tokens)
            lane = _Lane(index, prompt, sides, engine, oracle, keep, engines)
            for layer in layers:
                result.errors += lane.measured(layer, checks)
                if isinstance(oracle, TransformersRunner) and layer == 0 and index == 0:
                    checks.oracle_layer(oracle, prompt.tokens)
                done += 1
                what = "final norm and head" if layer is None else f"layer {layer}"
                progress(what, done, len(layers) * len(prompts))
            result.finals.append(lane.finals())
    except CaptureError as error:
        checks.fail(error.test, str(error))
    if engines is not None:
        result.errors = engines.settle(result.errors, checks)
        result.arithmetics = engines.model.tally.arithmetics()
    result.self_tests = checks.results()
    return result


class _Lane:
    """One prompt on its way through the layers of both sides."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        sides: Sides,
        engine: Engine,
        oracle: Engine,
        keep: Keep,
        engines: Engines | None,
    ) -> None:
        self._index, self._prompt, self._sides = index, prompt, sides
        self._model = keep("model", index, _layers(engine, prompt))
        self._oracle = keep("oracle", index, _layers(oracle, prompt))
        self._finite: dict[Point, bool] = {}
        self._last: dict[str, LayerStages] = {}
        self._engines = engines
        self._shadow: Iterator[LayerStages] | None = None
        self._replays: dict[str, BridgedReplay] = {}
        if engines is not None:
            if engines.shadow is not None:
                self._shadow = _layers(engines.shadow, prompt)
            sides_replayed = {"model": engines.model, "oracle": engines.oracle}
            self._replays = {s: side.on(prompt.tokens) for s, side in sides_replayed.items()}

    def measured(self, layer: int | None, checks: selftest.Checks) -> list[PointErrors]:
        """Take both sides one layer on and measure its points."""
        model, oracle = next(self._model), next(self._oracle)
        self._last = {"model": model, "oracle": oracle}
        shadow = oracle if self._shadow is None else next(self._shadow)
        checks.layer(self._index, model)
        for side, replay in self._replays.items():
            replay.enter(self._last[side])
            replay.stand_in((shadow if side == "model" else model).stages)
        seen = None if layer is None else self._visible(layer)
        found = []
        for stage in self._sides.graph.of_layer(layer):
            point = Point(layer, stage.name)
            ours, theirs, first = self._cut(point, model.stages, oracle.stages)
            view = View(stage, self._sides.oracle_facts, seen, first)
            for tensor in (ours, theirs):
                if tensor is not None and self._index == 0:
                    checks.canary(point, tensor, view)
            errors = self._errors(point, ours, theirs, view)
            if self._engines is not None:
                errors = self._judged(errors, self._engines, shadow, seen)
            found.append(errors)
        return found

    def _judged(
        self, errors: PointErrors, engines: Engines, shadow: LayerStages, seen: Tensor | None
    ) -> PointErrors:
        """Add what the replays of both sides find, and what the shadow says."""
        point, held = errors.point, self._last["oracle"].stages
        if point.stage in held:
            engines.of_oracle.append(self._replayed("oracle", errors, held[point.stage], seen))
        if errors.missing:
            return replace(errors, only_total="")
        value = self._last["model"].stages[point.stage]
        found = self._replayed("model", errors, value, seen)
        if self._shadow is None:
            return replace(found, engine=errors.total)
        return replace(
            found,
            engine=self._compared(point, self._last["model"], shadow, seen),
            weights=self._compared(point, shadow, self._last["oracle"], seen),
        )

    def _compared(
        self, point: Point, a: LayerStages, b: LayerStages, seen: Tensor | None
    ) -> Metrics | None:
        """Return the metrics of two runs where both hold a point."""
        ours, theirs, first = self._cut(point, a.stages, b.stages)
        if ours is None or theirs is None:
            return None
        view = View(STAGES[point.stage], self._sides.oracle_facts, seen, first)
        return measure(ours, theirs, view, pictured=True)

    def _replayed(
        self, side: str, errors: PointErrors, value: Tensor, seen: Tensor | None
    ) -> PointErrors:
        """Return what a side's replay finds at a point."""
        replays, stage = self._replays[side], STAGES[errors.point.stage]
        view = View(stage, self._sides.oracle_facts, seen, replays.first)
        value = last(stage.name, value, len(self._prompt.tokens) - replays.first)
        readings, _ = readings_of(errors.point, value, replays, view)

        def view_of(parent: Stage) -> View:
            return View(parent, self._sides.oracle_facts, seen, replays.first)

        sound = replays.parents_finite(errors.point, view_of)
        return replace(
            errors,
            only_total="",
            local=readings[0].local,
            worst=readings[0].worst,
            readings=readings,
            born_non_finite=readings[0].local.non_finite_a if sound else 0,
            bracket=replays.bracket(errors.point),
            stood_in=replays.stood_in(errors.point),
        )

    def _cut(
        self, point: Point, *sides: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Return both sides of a point at the positions that both hold, and the first of these."""
        tokens = len(self._prompt.tokens)
        held = [side.get(point.stage) for side in sides]
        first = max(0 if x is None else first_of({point.stage: x}, tokens) for x in held)
        ours, theirs = (None if x is None else last(point.stage, x, tokens - first) for x in held)
        return ours, theirs, first

    def _errors(
        self, point: Point, ours: Tensor | None, theirs: Tensor | None, view: View
    ) -> PointErrors:
        sizes = self._sides.oracle_facts.sizes(len(self._prompt.tokens))
        if ours is None:
            shape = tuple(sizes[symbol] for symbol in STAGES[point.stage].shape)
            return PointErrors(point=point, prompt=self._index, shape=shape, missing=True,
                               only_total=self._sides.why)  # fmt: skip
        bad = non_finite(ours, view)
        self._finite[point] = not bad
        total = None if theirs is None else measure(ours, theirs, view, pictured=True)
        sound = total is not None and not total.non_finite_b
        return PointErrors(
            point=point,
            prompt=self._index,
            shape=tuple(ours.shape),
            only_total=self._sides.why,
            total=total,
            born_non_finite=bad if sound and self._inputs_finite(point) else 0,
        )

    def _inputs_finite(self, point: Point) -> bool:
        """Return whether the nearest captured ancestors are finite."""
        return all(
            self._finite[p] if p in self._finite else self._inputs_finite(p)
            for p in self._sides.graph.parents(point)
        )

    def _visible(self, layer: int) -> Tensor:
        """Return which keys each query may see: (T, T) bool."""
        count = len(self._prompt.tokens)
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        window = self._sides.oracle_facts.windows[layer]
        return seen if window is None else seen.triu(1 - window)

    def finals(self) -> Finals:
        """Return the whole-model stages of both sides, once the layers are through."""
        model, oracle = (self._last[side].stages for side in ("model", "oracle"))
        return Finals(prompt=self._prompt, model=model, shadow={}, oracle=oracle)


def _layers(engine: Engine, prompt: Prompt) -> Iterator[LayerStages]:
    return (LayerStages(*item) for item in engine.layers(prompt.tokens))
