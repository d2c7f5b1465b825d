"""A run in which `total` alone is measured: the model's stages against the oracle's.

What agrees passes. What does not agree is left open, since quantised weights may explain it; only
non-finite values that appear behind finite inputs are an origin, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_aprt import report, selftest
from pytest_aprt.capture import CheckedEngine, Engine, LayerStages
from pytest_aprt.compare import View, measure, non_finite
from pytest_aprt.dump import DumpRunner, Fields, kept_in
from pytest_aprt.dump_checks import CheckedDump
from pytest_aprt.engines.choose import engine_of
from pytest_aprt.errors import CaptureError
from pytest_aprt.matrices import compute_threads
from pytest_aprt.measure import Finals, Keep, Measurement, PointErrors, Progress, Prompt
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.positions import first_of, last, note_on
from pytest_aprt.run import (
    facts_of_run,
    notes_on,
    prompts_of,
    quantisation_of,
    thresholds_of,
)
from pytest_aprt.rungs import PATH, TOKENS, Row, decode_names, unavailable
from pytest_aprt.rungs.logits import total_rows
from pytest_aprt.settings import Settings
from pytest_aprt.sides import Sides
from pytest_aprt.stages import STAGES, Point
from pytest_aprt.statuses import OF_LIVE_ORACLE, OF_TOTALS
from pytest_aprt.verdict import conclude


def run_totals(
    sides: Sides,
    settings: Settings,
    user_engine: Any | None,
    progress: Progress,
    keep: Keep = lambda side, prompt, layers: layers,
) -> report.Report:
    """Run or read both sides on the prompts and judge every point by `total` alone.

    Args:
        sides: the opened files.
        settings: what was asked.
        user_engine: the engine of ``pytest_aprt_model``, if any.
        progress: told after every layer.
        keep: wraps the layers of both sides (see ``measure_pair``).

    Raises:
        AprtError: the input cannot be run.
    """
    told = facts_of_run(settings)
    prompts = prompts_of(settings, sides)
    chosen = engine_of(sides, settings, user_engine, prompts)
    engine, name = chosen.engine, chosen.name
    hashes = _hashes(sides, settings)
    if settings.dump is not None:
        fields: Fields = {
            "model": {"model_sha256": hashes["model"], "engine": name, "arithmetic": "auto"},
            "oracle": {"oracle_sha256": hashes["oracle"], "config": sides.config},
        }
        keep = kept_in(settings.dump, prompts, fields, keep)
    oracle = oracle_of(sides, settings)
    with compute_threads(settings.threads):
        measurement = measure_totals(sides, engine, oracle, prompts, progress, keep)
        logits = total_rows(sides, measurement.finals)
    rungs: dict[str, Sequence[Row]] = {
        "tokens": unavailable(TOKENS, sides.why),
        "logits": logits,
        "decode": unavailable(decode_names(settings.decode_steps), sides.why),
        "path": unavailable(PATH, sides.why),
    }
    verdict = conclude(
        sides.graph, sides.graph.points, measurement, [], thresholds_of(settings), rungs,
        strict=settings.strict,
    )  # fmt: skip
    return report.build(
        run=told(prompts),
        model={
            "source": settings.model,
            "kind": settings.model_kind,
            "engine": name,
            "engine_details": dict(chosen.details()),
            "arithmetic": "not judged",
            "profile": settings.arithmetic,
            "architecture": sides.architecture.name,
            "quantisation": {} if sides.gguf is None else quantisation_of(sides.gguf),
            "sha256": hashes["model"],
        },
        oracle={
            "source": settings.oracle,
            "kind": settings.oracle_kind,
            "architecture": str((sides.config or {}).get("model_type", "unknown")),
            "sha256": hashes["oracle"],
        },
        measurement=measurement,
        facts=[],
        rungs=rungs,
        verdict=verdict,
        notes=[
            *_notes(sides, measurement),
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


def oracle_of(sides: Sides, settings: Settings) -> Engine:
    """Return what runs the oracle, or reads it."""
    if sides.oracle is not None:
        return TransformersRunner(sides.transformers_config, sides.oracle_weights)
    dump = DumpRunner.open(settings.oracle)
    if dump.has_manifest:
        return CheckedEngine(dump, sides.graph, sides.oracle_facts, settings.oracle)
    return CheckedDump(dump, sides, settings.oracle, of_model=False)


def _hashes(sides: Sides, settings: Settings) -> dict[str, str]:
    """Return the sha256 of each side's weights; of a dump what its manifest says, or nothing."""
    found = dict.fromkeys(("model", "oracle"), "")
    for side, file, source in (
        ("model", sides.gguf, settings.model),
        ("oracle", sides.oracle, settings.oracle),
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
) -> Measurement:
    """Run or read both sides once, and return the numbers.

    Args:
        sides: what is known of both.
        engine: the model under test.
        oracle: the oracle, an engine likewise.
        prompts: at least one.
        progress: told after every layer.
        keep: wraps the layers of the sides ``model`` and ``oracle`` on every prompt.
    """
    result = Measurement()
    runs_oracle = isinstance(oracle, TransformersRunner)
    names = OF_TOTALS + (OF_LIVE_ORACLE if runs_oracle else ())
    checks = selftest.Checks(sides.oracle_facts.vocab, names)
    layers = [*range(sides.graph.n_layers), None]
    done = 0
    try:
        for index, prompt in enumerate(prompts):
            checks.tokens(prompt.tokens)
            lane = _Lane(index, prompt, sides, engine, oracle, keep)
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
    result.self_tests = checks.results()
    return result


class _Lane:
    """One prompt on its way through the layers of both sides."""

    def __init__(
        self, index: int, prompt: Prompt, sides: Sides, engine: Engine, oracle: Engine, keep: Keep
    ) -> None:
        self._index, self._prompt, self._sides = index, prompt, sides
        self._model = keep("model", index, _layers(engine, prompt))
        self._oracle = keep("oracle", index, _layers(oracle, prompt))
        self._finite: dict[Point, bool] = {}
        self._last: dict[str, LayerStages] = {}

    def measured(self, layer: int | None, checks: selftest.Checks) -> list[PointErrors]:
        """Take both sides one layer on and measure its points."""
        model, oracle = next(self._model), next(self._oracle)
        self._last = {"model": model, "oracle": oracle}
        checks.layer(self._index, model)
        seen = None if layer is None else self._visible(layer)
        found = []
        for stage in self._sides.graph.of_layer(layer):
            point = Point(layer, stage.name)
            ours, theirs, first = self._cut(point, model.stages, oracle.stages)
            view = View(stage, self._sides.oracle_facts, seen, first)
            for side in (ours, theirs):
                if side is not None and self._index == 0:
                    checks.canary(point, side, view)
            found.append(self._errors(point, ours, theirs, view))
        return found

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
