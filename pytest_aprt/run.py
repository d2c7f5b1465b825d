"""One run: model, oracle, tokens and settings in, one report out."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pytest_aprt import report
from pytest_aprt.arithmetic import Profile, profile_named
from pytest_aprt.beside import Beside
from pytest_aprt.capture import Engine
from pytest_aprt.compiled import PROCESSOR
from pytest_aprt.consensus import in_words
from pytest_aprt.dump import DumpRunner, Fields, kept_in
from pytest_aprt.dump_checks import swapped_sides
from pytest_aprt.engines.choose import Chosen, engine_of
from pytest_aprt.errors import SettingsError
from pytest_aprt.matrices import compute_threads
from pytest_aprt.measure import Keep, Progress, Stop, measure_pair
from pytest_aprt.options import DEFAULT_PROMPT
from pytest_aprt.pair import Headers, Pair, open_pair
from pytest_aprt.positions import note_on
from pytest_aprt.prompts import PROMPT_SETS, Cut
from pytest_aprt.readings import Prompt
from pytest_aprt.rungs import LOGITS, PATH, Row, decode_names, following, unavailable
from pytest_aprt.rungs.config import fact_rows
from pytest_aprt.rungs.decode import decode_rows
from pytest_aprt.rungs.logits import logit_rows
from pytest_aprt.rungs.path import path_rows
from pytest_aprt.selftest import failed
from pytest_aprt.settings import Settings
from pytest_aprt.stages import Point
from pytest_aprt.verdict import Threshold, conclude, not_run

if TYPE_CHECKING:
    from pytest_aprt.checkpoints import Checkpoint
    from pytest_aprt.rungs.weights import TensorRow
    from pytest_aprt.sides import Sides
    from pytest_aprt.weights import ModelWeights

_VERSIONS = ("pytest-aprt", "pytest", "numpy", "torch", "transformers", "safetensors", "gguf",
             "llama-cpp-python")  # fmt: skip


def run(
    headers: Headers,
    settings: Settings,
    user_engine: Any | None,
    progress: Progress,
    keep: Keep = lambda side, prompt, layers: layers,
    beside: Beside | None = None,
) -> report.Report:
    """Run model and oracle on the prompts and judge every point.

    Args:
        headers: the opened files.
        settings: what was asked.
        user_engine: the engine of ``pytest_aprt_model`` or ``python:module:factory``, if any.
        progress: told after every layer.
        keep: wraps the layers of both sides (see ``measure_pair``).
        beside: the process that the oracle's tokenizer is asked of, if there is one.

    Raises:
        AprtError: the input cannot be run.
    """
    told = facts_of_run(settings)
    beside = beside or Beside()
    pair, prompts, chosen = set_up(headers, settings, user_engine, beside)
    texts = [prompt.text for prompt in prompts if prompt.text]
    beside.judge(texts)
    engine = chosen.engine
    profile = profile_of(settings.arithmetic, engine)
    if settings.dump is not None:
        keep = kept_in(settings.dump, prompts, _recorded(pair, chosen.name, profile), keep)
    points = pair.graph.points  # all: a fault upstream of the tests that were asked for counts
    longest = max(len(prompt.tokens) for prompt in prompts)
    facts = fact_rows(pair, longest)
    fed = frozenset(stage for row in facts if row.broken for stage in row.feeds)
    stop = Stop(fed=fed) if settings.stop_at_first else None
    with compute_threads(settings.threads):
        measurement = measure_pair(pair, engine, prompts, points, profile, progress, keep, stop)
    if settings.model_kind == "dump" and (swapped := swapped_sides(measurement.errors)):
        measurement.self_tests = failed(measurement.self_tests, "capture", swapped)
    thresholds = thresholds_of(settings)
    finals = measurement.finals
    rungs = {"tokens": beside.rows(pair, texts)}
    if measurement.stopped is not None:
        rungs |= rungs_not_run(measurement.stopped, settings)
    else:
        with compute_threads(settings.threads):
            rungs["logits"] = logit_rows(pair, finals)
            rungs["decode"] = decode_rows(pair, engine, finals, settings.decode_steps)
            rungs["path"] = path_rows(pair, engine, finals, thresholds["lm_head"].cosine)
    verdict = conclude(
        pair.graph, points, measurement, facts, thresholds, rungs, strict=settings.strict
    )
    causes = [f"config-{row.name}" for row in facts if row.broken]
    causes += [str(origin.point) for origin in verdict.origins]
    for rung in ("logits", "decode") if causes else ():
        rungs[rung] = following(rungs[rung], causes[0])
    return report.build(
        run=told(prompts),
        model={
            "source": settings.model,
            "kind": settings.model_kind,
            "engine": chosen.name,
            "engine_details": dict(chosen.details()),
            "arithmetic": in_words(measurement.arithmetics),
            "profile": profile.name,
            "architecture": pair.architecture.name,
            "quantisation": quantisation_of(pair.model_weights),
            "sha256": pair.model.sha256(),
        },
        oracle={
            "source": settings.oracle,
            "kind": "huggingface",
            "architecture": str(pair.oracle.config.get("model_type")),
            "sha256": pair.oracle.sha256(),
        },
        measurement=measurement,
        facts=facts,
        rungs=rungs,
        verdict=verdict,
        notes=[
            *_note_on_weights(measurement.tensors),
            *note_on(measurement.errors, prompts),
            *getattr(engine, "notes", ()),
            *notes_on(prompts),
        ],
        graph=pair.graph,
    )


def rungs_not_run(stopped: Point, settings: Settings) -> dict[str, list[Row]]:
    """Return the rungs behind the stages, of a run that ended at its first divergence."""
    names = {"logits": LOGITS, "decode": decode_names(settings.decode_steps), "path": PATH}
    return {rung: unavailable(rows, not_run(stopped)) for rung, rows in names.items()}


def set_up(
    headers: Headers, settings: Settings, user_engine: Any | None, beside: Beside | None = None
) -> tuple[Pair, list[Prompt], Chosen]:
    """Make both sides, the prompts and the engine ready to run.

    Raises:
        AprtError: the input cannot be run.
    """
    pair = open_pair(headers)
    if beside is not None:
        pair = replace(pair, lent_tokenizer=beside.tokenizer(pair.oracle.path))
    prompts = prompts_of(settings, pair)
    chosen = engine_of(pair, settings.model_side, user_engine, prompts)
    if chosen.weights is not None:
        pair = replace(pair, model_weights=chosen.weights)
    return pair, prompts, chosen


def facts_of_run(settings: Settings) -> Callable[[Sequence[Prompt]], report.RunJson]:
    """Start the clock, and return what tells of the run once it is over."""
    started, clock = datetime.now(timezone.utc), time.monotonic()

    def told(prompts: Sequence[Prompt]) -> report.RunJson:
        return {
            "id": uuid.uuid4().hex,
            "started_utc": started.isoformat(timespec="seconds"),
            "wall_s": round(time.monotonic() - clock, 3),
            "peak_rss_bytes": peak_rss(),
            "command": settings.command,
            "host": _host(),
            "versions": _versions(),
            "prompts": [report.prompt_json(prompt) for prompt in prompts],
        }

    return told


def thresholds_of(settings: Settings) -> dict[str, Threshold]:
    """Return every stage's threshold."""
    return {
        stage: Threshold(cosine=cosine, source=source)
        for stage, (cosine, source) in settings.thresholds.items()
    }


def quantisation_of(weights: Checkpoint | ModelWeights) -> dict[str, int]:
    """Return how many tensors are of each type, the most frequent first."""
    return dict(Counter(t.type for t in weights.tensors.values()).most_common())


def prompts_of(settings: Settings, pair: Pair | Sides) -> list[Prompt]:
    """Return the prompts as the oracle's tokenizer splits them, or the ids that were given.

    Where none was asked for, they are those of a dump's manifest, the model's before the oracle's.

    Raises:
        SettingsError: a prompt without tokens, or an id outside the vocabulary.
        SourceError: the oracle has no tokenizer.
    """
    prompts = [Prompt(text="", tokens=tokens) for tokens in settings.tokens]
    texts = [Cut(text) for text in settings.prompts]
    if not (prompts or texts or settings.prompt_sets):
        dumps = (DumpRunner.open(source).prompts for source in settings.dumps)
        dumped = next(filter(None, dumps), ())  # where there is no dump, there is a default
        prompts = [Prompt(text=text, tokens=tokens) for text, tokens in dumped]
        texts = [] if prompts else [Cut(DEFAULT_PROMPT)]
    texts += [cut for name in settings.prompt_sets for cut in PROMPT_SETS[name]]
    if texts:
        prompts += [_tokenised(pair.tokenizer, cut) for cut in texts]
    for prompt in prompts:
        if not prompt.tokens:
            raise SettingsError(f"prompt {prompt.text!r} has no tokens: expected some text")
        for token in prompt.tokens:
            if not 0 <= token < pair.oracle_facts.vocab:
                raise SettingsError(
                    f"token id {token} is outside the vocabulary: expected 0 to "
                    f"{pair.oracle_facts.vocab - 1}"
                )
    return prompts


def _tokenised(tokenizer: Any, cut: Cut) -> Prompt:
    tokens = tuple(tokenizer(cut.text)["input_ids"])
    if cut.tokens is None or len(tokens) <= cut.tokens:
        return Prompt(text=cut.text, tokens=tokens)
    tokens = tokens[: cut.tokens]
    return Prompt(text=tokenizer.decode(tokens, skip_special_tokens=True), tokens=tokens)


def _recorded(pair: Pair, engine: str, profile: Profile) -> Fields:
    """Return what the manifests of both sides' dumps say."""
    hashes = {"model_sha256": pair.model.sha256(), "oracle_sha256": pair.oracle.sha256()}
    return {
        "model": {**hashes, "engine": engine, "arithmetic": profile.name},
        "oracle": {
            **hashes,
            "engine": "transformers",
            "arithmetic": "float32",
            "config": pair.oracle.config,
        },
    }


def profile_of(asked: str, engine: Engine) -> Profile:
    """Return the profile that was asked for, else the one that the engine declares, else auto."""
    declared = getattr(engine, "arithmetic", None)
    if asked == "auto" and declared:
        return profile_named(str(declared))
    return profile_named(asked)


def _note_on_weights(tensors: Sequence[TensorRow]) -> list[str]:
    """Return what a reader must know where model and oracle are two trainings."""
    others = [tensor for tensor in tensors if tensor.differs]
    if not others:
        return []
    return [
        f"{len(others)} of {len(tensors)} tensors hold other numbers than the oracle's, first "
        f"{others[0].name} ({others[0].rel_l2:.2g} away): the model was trained further, or "
        "quantised before it was stored. total and weights tell how far the two models are apart; "
        "engine and local what the engine does"
    ]


def notes_on(prompts: Sequence[Prompt]) -> list[str]:
    """Return what a reader must know of the prompts."""
    if all(len(prompt.tokens) == 1 for prompt in prompts):
        return [
            "every prompt is a single token: position 0 is blind to RoPE, masks and most attention "
            "faults; use a longer prompt"
        ]
    return []


def peak_rss() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _host() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "kernels": PROCESSOR or "torch",
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
