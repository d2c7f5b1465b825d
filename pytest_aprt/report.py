"""The one model of results: ``aprt-report-v1``, as plain JSON types.

Everything that shows results (terminal, Markdown, JUnit, fixtures) reads this and nothing else.
Numbers that JSON cannot hold are strings: ``"nan"``, ``"inf"``; ``float()`` reads both forms.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union, cast

from pytest_aprt.errors import SettingsError
from pytest_aprt.images import DECADES
from pytest_aprt.positions import STRAYS
from pytest_aprt.sources._files import replace_file
from pytest_aprt.stages import Point

if TYPE_CHECKING:
    from pytest_aprt.compare import Metrics, Slice
    from pytest_aprt.measure import Measurement
    from pytest_aprt.readings import PointErrors, Prompt
    from pytest_aprt.rungs import Row
    from pytest_aprt.rungs.config import FactRow
    from pytest_aprt.rungs.weights import TensorRow
    from pytest_aprt.verdict import Judged, Verdict

SCHEMA: Literal["aprt-report-v1"] = "aprt-report-v1"

_IMAGES = {"diverged": 16, "inherited": 6}
"""How many points of a status keep an image: 5.5 KB each at most."""

Number = Union[float, str]  # noqa: UP007 - evaluated at run time on Python 3.10


class PromptJson(TypedDict):
    """A prompt and its token ids."""

    text: str
    tokens: list[int]


class RunJson(TypedDict):
    """Where, when and how a run took place."""

    id: str
    started_utc: str
    wall_s: float
    peak_rss_bytes: int
    command: str
    host: dict[str, Any]
    versions: dict[str, str]
    prompts: list[PromptJson]


class ModelJson(TypedDict):
    """The model under test."""

    source: str
    kind: str
    engine: str
    engine_details: dict[str, Any]  # parameters that were set, and what the engine says of itself
    arithmetic: str  # as found or declared; stages that differ are named
    profile: str  # what was asked for or declared
    architecture: str
    quantisation: dict[str, int]
    sha256: str


class OracleJson(TypedDict):
    """The Hugging Face model."""

    source: str
    kind: str
    architecture: str
    sha256: str


class MetricsJson(TypedDict):
    """One of the four errors of a point."""

    cosine: Number
    rel_l2: Number
    slope: Number
    norm_ratio: Number
    max_abs: Number
    max_abs_at: dict[str, int]
    rms: Number
    sqnr_db: Number
    non_finite: dict[str, int]  # of the left and of the right side of the comparison
    worst_token: dict[str, Number] | None


class SliceJson(TypedDict):
    """The slice whose local error is largest in units of its tolerance."""

    axis: str
    index: int | None
    rel_l2: Number


class ToleranceJson(TypedDict):
    """What rounding explains in the worst slice."""

    rel_l2: Number
    source: str


class ThresholdJson(TypedDict):
    """The bound on cosine for `engine` and `total`."""

    cosine: float
    source: str


class DiffJson(TypedDict):
    """One element: where it is, the model's value, and the replay's."""

    at: dict[str, int]
    model: Number
    reference: Number


class PromptErrorsJson(TypedDict):
    """The errors of a point on one prompt."""

    prompt: int
    shape: list[int]
    total: MetricsJson | None
    weights: MetricsJson | None
    engine: MetricsJson | None
    local: MetricsJson | None
    worst_slice: SliceJson | None


class ImageJson(TypedDict):
    """The difference of a point as a small image; ``images.Image`` says how levels are meant."""

    error: str  # which of the four
    rows: str
    columns: str
    shape: list[int]
    pixels: list[int]
    largest: Number
    decades: int
    levels: str  # base64, one byte a pixel, row by row


class PointJson(TypedDict):
    """One point on the prompt where it is worst, and in `prompts` its errors on every prompt."""

    layer: int | None
    stage: str
    point: str
    shape: list[int]
    status: str
    outcome: str
    reason: str
    follows: str | None
    total: MetricsJson | None
    weights: MetricsJson | None
    engine: MetricsJson | None
    local: MetricsJson | None
    worst_slice: SliceJson | None
    threshold: ThresholdJson
    tolerance: ToleranceJson | None
    prompt: int
    top_diffs: list[DiffJson]
    prompts: list[PromptErrorsJson]
    image: ImageJson | None  # of origins, and of the first points that inherit


class GoodJson(TypedDict):
    """The nearest captured ancestor that is no origin, on the origin's prompt."""

    point: str
    rel_l2: Number  # of its `local`; "nan" where it has none


class OriginJson(TypedDict):
    """A point where error was born."""

    layer: int | None
    stage: str
    point: str
    bracket: list[str]
    local: MetricsJson | None
    worst: SliceJson | None
    born_non_finite: int  # NaN and Inf that appear although all inputs are finite
    previous_good: GoodJson | None
    hint: str | None


class DivergenceJson(TypedDict):
    """The first origin in computation order."""

    layer: int | None
    stage: str
    point: str
    previous_good: str | None


class VerdictJson(TypedDict):
    """What the run concludes."""

    status: str
    summary: str
    rung: str | None
    first_divergence: DivergenceJson | None
    origins: list[OriginJson]


class SelfTestJson(TypedDict):
    """One check of the instrument."""

    name: str
    passed: bool
    detail: str


class FactJson(TypedDict):
    """One fact of the config rung."""

    name: str
    model: Any
    oracle: Any
    key: str
    config: str
    status: str  # agree, differs (without effect on this run), broken
    reason: str
    model_states: bool  # whether the file holds the key; else the value is a default
    oracle_states: bool
    matters_beyond: Number  # tokens


class TensorJson(TypedDict):
    """One tensor of the weights rung."""

    name: str
    type: str
    shape: list[int]
    rel_l2: Number
    bound: Number
    status: str  # pass, differs (as after training), broken
    reason: str


class LadderJson(TypedDict):
    """The rungs beside the stages."""

    tokens: list[dict[str, Any]]  # rows as of logits, decode and path: see _row
    config: list[FactJson]
    weights: list[TensorJson]
    logits: list[dict[str, Any]]
    decode: list[dict[str, Any]]
    path: list[dict[str, Any]]


class ContractJson(TypedDict):
    """One falsifier of a contract."""

    contract: str
    id: str
    rule: str
    declared: str | None
    outcome: str
    supported: str
    detail: str


class BaselineJson(TypedDict):
    """This run against an earlier one: names of tests."""

    path: str
    id: str  # of the earlier run
    worse: list[str]  # fail now, and did not before or less
    known: list[str]  # fail as they did before
    better: list[str]  # failed before


class _Whole(TypedDict):
    schema: str
    run: RunJson
    model: ModelJson
    oracle: OracleJson
    verdict: VerdictJson
    self_test: list[SelfTestJson]
    ladder: LadderJson
    points: list[PointJson]
    notes: list[str]


class Report(_Whole, total=False):
    """A whole run; what changed since a baseline, and contracts, where there are any."""

    baseline: BaselineJson
    contracts: list[ContractJson]


def build(
    *,
    run: RunJson,
    model: ModelJson,
    oracle: OracleJson,
    measurement: Measurement,
    facts: list[FactRow],
    rungs: Mapping[str, Sequence[Row]],
    verdict: Verdict,
    notes: list[str],
    graph: Any,
) -> Report:
    """Put a run's results into the report's form."""
    from pytest_aprt.verdict import previous_good  # loads torch, which readers do without

    by_point: dict[Point, list[PointErrors]] = {}
    for errors in measurement.errors:
        by_point.setdefault(errors.point, []).append(errors)
    origins = [
        _origin(judged, previous_good(judged, graph, by_point)) for judged in verdict.origins
    ]
    divergence: DivergenceJson | None = None
    if verdict.first_divergence is not None:
        good = origins[0]["previous_good"]
        divergence = {
            **_place(verdict.first_divergence.point),
            "previous_good": None if good is None else good["point"],
        }
    report: Report = {
        "schema": SCHEMA,
        "run": run,
        "model": model,
        "oracle": oracle,
        "verdict": {
            "status": verdict.status,
            "summary": verdict.summary,
            "rung": verdict.rung,
            "first_divergence": divergence,
            "origins": origins,
        },
        "self_test": [
            {"name": t.name, "passed": t.passed, "detail": t.detail} for t in measurement.self_tests
        ],
        "ladder": {
            "tokens": [_row(row) for row in rungs["tokens"]],
            "config": [_fact(row) for row in facts],
            "weights": [_tensor(row) for row in measurement.tensors],
            "logits": [_row(row) for row in rungs["logits"]],
            "decode": [_row(row) for row in rungs["decode"]],
            "path": [_row(row) for row in rungs["path"]],
        },
        "points": _points(verdict.points, by_point),
        "notes": notes,
    }
    return report


def prompt_json(prompt: Prompt) -> PromptJson:
    """Return a prompt in the report's form."""
    return {"text": prompt.text, "tokens": list(prompt.tokens)}


def number(value: float) -> Number:
    """Return a number that JSON can hold: non-finite ones as strings."""
    return float(value) if math.isfinite(value) else str(value)


class _Place(TypedDict):
    layer: int | None
    stage: str
    point: str


def _place(point: Point) -> _Place:
    return {"layer": point.layer, "stage": point.stage, "point": str(point)}


def _metrics(m: Metrics | None, left: str, right: str) -> MetricsJson | None:
    if m is None:
        return None
    worst = m.worst_token
    return {
        "cosine": number(m.cosine),
        "rel_l2": number(m.rel_l2),
        "slope": number(m.slope),
        "norm_ratio": number(m.norm_ratio),
        "max_abs": number(m.max_abs),
        "max_abs_at": m.max_abs_at,
        "rms": number(m.rms),
        "sqnr_db": number(m.sqnr_db),
        "non_finite": {left: m.non_finite_a, right: m.non_finite_b},
        "worst_token": None if worst is None else {"token": worst[0], "rel_l2": number(worst[1])},
    }


def _slice(s: Slice | None) -> SliceJson | None:
    return None if s is None else {"axis": s.axis, "index": s.index, "rel_l2": number(s.rel_l2)}


def _origin(judged: Judged, good: PointErrors | None) -> OriginJson:
    e = judged.errors
    return {
        **_place(judged.point),
        "bracket": [str(p) for p in (*e.bracket, e.point)] if e and e.bracket else [],
        "local": _metrics(e.local, "model", "replay") if e else None,
        "worst": _slice(e.worst) if e else None,
        "born_non_finite": e.born_non_finite if e else 0,
        "previous_good": None if good is None else _good(good),
        "hint": judged.hint,
    }


def _good(e: PointErrors) -> GoodJson:
    return {"point": str(e.point), "rel_l2": number(e.local.rel_l2 if e.local else math.nan)}


def _prompt_errors(e: PointErrors) -> PromptErrorsJson:
    return {
        "prompt": e.prompt,
        "shape": list(e.shape),
        "total": _metrics(e.total, "model", "oracle"),
        "weights": _metrics(e.weights, "shadow", "oracle"),
        "engine": _metrics(e.engine, "model", "shadow"),
        "local": _metrics(e.local, "model", "replay"),
        "worst_slice": _slice(e.worst),
    }


def _points(points: list[Judged], by_point: Mapping[Point, list[PointErrors]]) -> list[PointJson]:
    """Return all points; the first few that fail or inherit have an image."""
    left = dict(_IMAGES)
    found = []
    for judged in points:
        point = _point(judged, by_point.get(judged.point, []))
        if left.get(judged.status, 0) > 0:
            point["image"] = _image(judged)
            left[judged.status] -= point["image"] is not None
        found.append(point)
    return found


def _image(judged: Judged) -> ImageJson | None:
    error = "local" if judged.status == "diverged" else "engine"
    metrics: Metrics | None = getattr(judged.errors, error, None)
    image = metrics.image if metrics else None
    if image is None:
        return None
    return {
        "error": error,
        "rows": image.rows,
        "columns": image.columns,
        "shape": list(image.shape),
        "pixels": list(image.pixels),
        "largest": number(image.largest),
        "decades": DECADES,
        "levels": base64.b64encode(image.levels).decode("ascii"),
    }


def _point(judged: Judged, on_prompts: list[PointErrors]) -> PointJson:
    e = judged.errors
    tolerance: ToleranceJson | None = None
    if e and e.worst:
        source = f"{e.arithmetic.name}: {e.arithmetic.tolerance.source}"
        if e.stood_in:
            source += (
                "; and what follows from the shadow's K and V of earlier positions, which may be "
                f"{STRAYS:g} times as far off as the last position's"
            )
        tolerance = {"rel_l2": number(e.worst.tolerance), "source": source}
    return {
        **_place(judged.point),
        "shape": list(e.shape) if e else [],
        "status": judged.status,
        "outcome": judged.outcome,
        "reason": judged.reason,
        "follows": judged.follows,
        "total": _metrics(e.total, "model", "oracle") if e else None,
        "weights": _metrics(e.weights, "shadow", "oracle") if e else None,
        "engine": _metrics(e.engine, "model", "shadow") if e else None,
        "local": _metrics(e.local, "model", "replay") if e else None,
        "worst_slice": _slice(e.worst) if e else None,
        "threshold": {"cosine": judged.threshold.cosine, "source": judged.threshold.source},
        "tolerance": tolerance,
        "prompt": e.prompt if e else 0,
        "top_diffs": [
            {"at": d.at, "model": number(d.a), "reference": number(d.b)}
            for d in (e.local.top_diffs if e and e.local else ())
        ],
        "prompts": [_prompt_errors(errors) for errors in on_prompts],
        "image": None,
    }


def _fact(row: FactRow) -> FactJson:
    return {
        "name": row.name,
        "model": _plain(row.model),
        "oracle": _plain(row.oracle),
        "key": row.key,
        "config": row.config,
        "status": "broken" if row.broken else "agree" if row.agree else "differs",
        "reason": row.reason,
        "model_states": row.model_states,
        "oracle_states": row.oracle_states,
        "matters_beyond": number(row.beyond),
    }


def _tensor(row: TensorRow) -> TensorJson:
    return {
        "name": row.name,
        "type": row.type,
        "shape": list(row.shape),
        "rel_l2": number(row.rel_l2),
        "bound": number(row.bound),
        "status": "broken" if row.broken else "differs" if row.differs else "pass",
        "reason": row.reason,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "status": row.status,
        "reason": row.reason,
        **{key: _plain(value) for key, value in row.figures.items()},
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return number(value) if isinstance(value, float) else value


def write(report: Report, path: Path) -> None:
    """Write a report as JSON; a crash leaves the old file or none, never a half one."""
    write_text(path, _json(report))


def _json(report: Report) -> str:
    """Return a report as text, a line for each of its parts and for each item of a list.

    The C encoder of ``json`` indents nothing, and is three times as fast as the one that does.
    """
    text = functools.partial(json.dumps, allow_nan=False)
    parts = []
    for key, value in report.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(map(text, value))
            parts.append(f"{text(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{text(key)}: {text(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: a failure leaves the old file or none, and nothing beside it.

    Characters that UTF-8 cannot hold (lone surrogates, from paths that are no UTF-8) are written
    as escapes.

    Raises:
        SettingsError: the folder cannot be made or written.
    """
    try:
        replace_file(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise SettingsError(
            f"cannot write {path}: {error.strerror}; choose another folder with --aprt-report"
        ) from error


def read(path: Path) -> Report:
    """Read a report that ``write`` wrote.

    Raises:
        SettingsError: the file cannot be read, is no JSON, or is of another schema.
    """
    expected = f"expected a report.json of --aprt-report (schema {SCHEMA})"
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; {expected}") from error
    except ValueError as error:
        raise SettingsError(f"{path} is no JSON: {error}; {expected}") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise SettingsError(f"{path} is no {SCHEMA} report: its schema is {schema!r}; {expected}")
    return cast(Report, report)
