"""report.html: one file that needs no network, drawn from report.json alone.

The page is a Jinja template beside this file; the drawings are matplotlib's. What the template
shows is prepared here, so that it holds no logic but loops.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pytest_aprt.render import figures, sheets
from pytest_aprt.render.ladder import Row, Rung, rung, rungs
from pytest_aprt.render.tiles import Tile, tiles_of
from pytest_aprt.render.words import (
    by_layer,
    cosine,
    engine_details,
    layer_name,
    megabytes,
    place,
    printable,
    rel_l2,
    small,
    span,
    where,
    worst_of,
)
from pytest_aprt.report import MetricsJson, OriginJson, PointJson, Report
from pytest_aprt.stages import STAGES
from pytest_aprt.statuses import VERDICTS

_FOLDER = Path(__file__).parent
_FIGURES = 16  # difference images drawn at most: 15 KB each
_PROMPTS = 8  # of a point, the worst first
_PROMPT_ROWS = 2500  # on the whole page: 250 bytes each

_STATUS_TEXT = {
    "diverged": "error is born here",
    "inherited": "follows from an error upstream",
    "drift": "rounding that adds up",
    "noise": "the quantised weights explain it",
    "pass": "agrees",
    "inconclusive": "cannot be judged",
    "missing": "the model's side does not show it",
}

_HEADLINES = {
    "PARITY": "Model and oracle agree",
    "QUANTISATION_NOISE": "No bug found: the quantised weights explain the distance",
    "INCONCLUSIVE": "No verdict: the run cannot be trusted or judged",
}

_METRICS = (
    # label, text of one error's metrics
    ("cosine", cosine),
    ("relative L2", rel_l2),
    ("slope", lambda m: f"{float(m['slope']):.6g}"),
    ("norm ratio", lambda m: f"{float(m['norm_ratio']):.6g}"),
    ("largest |difference|", lambda m: small(m["max_abs"])),
    ("  its place", lambda m: place(m["max_abs_at"])),
    ("RMS", lambda m: small(m["rms"])),
    ("SQNR", lambda m: f"{float(m['sqnr_db']):.1f} dB"),
    ("worst token", lambda m: _worst_token(m)),
    ("non-finite", lambda m: ", ".join(f"{k} {v}" for k, v in m["non_finite"].items())),
)


def render(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["first_upper"] = lambda text: text[:1].upper() + text[1:]
    assets = {
        name: Markup((_FOLDER / f"report.{name}").read_text(encoding="utf-8"))
        for name in ("css", "js")
    }
    page = environment.get_template("report.html.j2").render(page=Page(report), **assets)
    return printable(page)


def _worst_token(metrics: MetricsJson) -> str:
    worst = metrics["worst_token"]
    return "" if worst is None else f"{worst['token']} ({small(worst['rel_l2'])})"


@dataclass(frozen=True)
class Cell:
    """One cell of the heatmap; None in a row where the layer has no such stage."""

    point: str
    status: str
    classes: str
    text: str


class Page:
    """What the template shows of a report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.verdict = report["verdict"]
        self.errors = ("local", "engine", "weights", "total")
        self.good = VERDICTS[self.verdict["status"]]
        self._left = _FIGURES
        self._rows_left = _PROMPT_ROWS

    # -- the top -----------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The page's title."""
        return f"{self.verdict['status']}: {Path(self.report['model']['source']).name}"

    @property
    def headline(self) -> str:
        """What a reader should take away, in one line."""
        status = self.verdict["status"]
        if status in _HEADLINES:
            return _HEADLINES[status]
        first = self.verdict["first_divergence"]
        if self.verdict["rung"] not in (None, "stages"):
            return f"The fault is in the {self.verdict['rung']}"
        if first is None:
            return "Model and oracle diverge"
        layer = "the whole model" if first["layer"] is None else f"layer {first['layer']}"
        return f"A bug, first seen in {layer} at {first['stage']}"

    @property
    def sentence(self) -> str:
        """The verdict in plain words, without the status before it."""
        return self.verdict["summary"].partition(": ")[2] or self.verdict["summary"]

    @property
    def tiles(self) -> list[Tile]:
        """The facts beside the headline."""
        return tiles_of(self.report)

    @property
    def baseline(self) -> list[tuple[str, list[str]]]:
        """What is worse, known and better than an earlier run, where one was given."""
        found: dict[str, Any] = dict(self.report.get("baseline", {}))
        return [(kind, found[kind]) for kind in ("worse", "known", "better") if kind in found]

    @property
    def failed_self_tests(self) -> list[Any]:
        """Those checks of the instrument that failed."""
        return [test for test in self.report["self_test"] if not test["passed"]]

    # -- heatmap -----------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[str]:
        """The stages of the run, in computation order."""
        found = {p["stage"] for p in self.report["points"]}
        known = [name for name in STAGES if name in found]
        return known + sorted(found.difference(known))

    @cached_property
    def heatmap(self) -> list[tuple[str, list[Cell | None]]]:
        """Rows of cells, by the name of their layer."""
        rows = []
        for layer, points in by_layer(self.report).items():
            cells = {p["stage"]: self._cell(p) for p in points}
            rows.append((layer_name(layer), [cells.get(stage) for stage in self.stages]))
        return rows

    def _cell(self, p: PointJson) -> Cell:
        shades = []
        for error in self.errors:
            level = figures.level(p[error])  # type: ignore[literal-required]
            shades.append(f"{error[0]}{'x' if level is None else level}")
        sizes = ", ".join(
            f"{error} {rel_l2(p[error]) or 'none'}"  # type: ignore[literal-required]
            for error in self.errors
        )
        text = f"{p['point']}: {p['status']}; {sizes}"
        return Cell(p["point"], p["status"], " ".join([p["status"], *shades]), text)

    @property
    def shades(self) -> list[tuple[int, str, str]]:
        """The levels of the colour scale: number, colour on a light page, on a dark one."""
        return [
            (index, light, dark)
            for index, (light, dark) in enumerate(
                zip(figures.ramp(dark=False), figures.ramp(dark=True), strict=True)
            )
        ]

    # -- drawings ----------------------------------------------------------------------------------

    def along_the_pass(self, width: float) -> Markup:
        """The four errors of every point, as SVG."""
        return Markup(figures.errors_along_the_pass(self.report, width))

    def image(self, p: PointJson) -> Markup | None:
        """The difference of a point, as SVG."""
        image = p.get("image")
        if not image or self._left <= 0:
            return None
        self._left -= 1
        return Markup(figures.difference_image(image, f"d-{p['point']}", 5))

    def growth(self, width: float) -> Markup:
        """The errors over the decode steps, as SVG."""
        assert self.decode is not None
        return Markup(figures.decode_growth(self.decode.engine, self.decode.weights, width))

    # -- points ------------------------------------------------------------------------------------

    @cached_property
    def _by_name(self) -> dict[str, PointJson]:
        return {p["point"]: p for p in self.report["points"]}

    @property
    def origins(self) -> list[tuple[OriginJson, PointJson]]:
        """Every origin with its point."""
        return [(o, self._by_name[o["point"]]) for o in self.verdict["origins"]
                if o["point"] in self._by_name]  # fmt: skip

    @property
    def layers(self) -> list[tuple[str, PointJson, list[PointJson]]]:
        """Every layer: its name, its worst point, its points."""
        return [
            (layer_name(layer), worst_of(points), points)
            for layer, points in by_layer(self.report).items()
        ]

    @cached_property
    def origin_names(self) -> frozenset[str]:
        """The names of all origins."""
        return frozenset(o["point"] for o in self.verdict["origins"])

    def is_point(self, name: str | None) -> bool:
        """Whether something is the name of a point on this page."""
        return name in self._by_name

    def what(self, stage: str) -> str:
        """What a stage is, in words."""
        return STAGES[stage].what if stage in STAGES else ""

    def status(self, status: str) -> str:
        """What a status means, in words."""
        return _STATUS_TEXT.get(status, status)

    def metrics(self, p: PointJson) -> list[tuple[str, list[str]]]:
        """The rows of a point's table: a label and the text of each error."""
        rows = []
        failing = p["status"] in ("diverged", "drift", "inconclusive")
        for label, text in _METRICS if failing else _METRICS[:5]:
            found: list[MetricsJson | None] = [p[e] for e in self.errors]  # type: ignore[literal-required]
            rows.append((label, [text(m) if m else "" for m in found]))
        return rows

    def bounds(self, p: PointJson) -> list[str]:
        """What a point was held to, as sentences."""
        lines = []
        if p["worst_slice"] and p["tolerance"]:
            why = f" ({p['tolerance']['source']})" if p["status"] == "diverged" else ""
            lines.append(
                f"Worst slice{where(p['worst_slice']) or ': the whole tensor'}: local relative L2 "
                f"{small(p['worst_slice']['rel_l2'])}, tolerance "
                f"{small(p['tolerance']['rel_l2'])}{why}"
            )
        bound = p["threshold"]
        lines.append(f"Threshold: cosine {bound['cosine']:g} ({bound['source']})")
        return lines

    def elements(self, p: PointJson) -> list[tuple[str, str, str, str]]:
        """The worst elements: place, the model's value, the replay's, the difference."""
        return [
            (place(d["at"]), f"{float(d['model']):.7g}", f"{float(d['reference']):.7g}",
             f"{abs(float(d['model']) - float(d['reference'])):.2e}")
            for d in p["top_diffs"]
        ]  # fmt: skip

    def again(self, p: PointJson) -> str:
        """The command that runs one point again."""
        return f"{self.report['run']['command']} -k {shlex.quote(p['point'])}"

    def on_prompts(self, p: PointJson) -> sheets.Table | None:
        """A point's errors on each of several prompts, while the page has room for them."""
        table = sheets.prompts_of(p, min(_PROMPTS, self._rows_left))
        if table is not None:
            self._rows_left -= len(table.rows)
        return table

    def prompt(self, p: PointJson) -> str:
        """The prompt on which a point is worst."""
        return self._prompt(p["prompt"])

    def _prompt(self, number: int) -> str:
        prompt = self.report["run"]["prompts"][number]
        return f"{prompt['text']!r}" if prompt["text"] else f"{len(prompt['tokens'])} token ids"

    cosine = staticmethod(cosine)
    rel_l2 = staticmethod(rel_l2)
    span = staticmethod(span)

    @property
    def example(self) -> str:
        """A point that one may want to run alone: the first origin, else the worst."""
        if self.verdict["origins"]:
            return self.verdict["origins"][0]["point"]
        points = self.report["points"]
        return worst_of(points)["point"] if points else "gate"

    # -- rungs and provenance ----------------------------------------------------------------------

    @property
    def rungs(self) -> list[Rung]:
        """Self-test, every rung of the ladder and whatever else is a table."""
        report: dict[str, Any] = dict(self.report)
        found = [rung("self-test", report["self_test"])] if report["self_test"] else []
        found += rungs(report["ladder"])
        return found

    @cached_property
    def logits(self) -> list[sheets.Sheet]:
        """The logits rung, row by row."""
        return sheets.logits(self.report)

    @cached_property
    def decode(self) -> sheets.Decode | None:
        """The decode rung, where it was judged."""
        return sheets.decode(self.report)

    @cached_property
    def claims(self) -> sheets.Claims | None:
        """The contracts, where there are some."""
        return sheets.contracts(self.report)

    @cached_property
    def prompts(self) -> sheets.Table | None:
        """Each of several prompts with the points where it is worst."""
        return sheets.by_prompt(self.report, self._prompt)

    def text(self, value: Any) -> str:
        """Any plain value as text."""
        if isinstance(value, str):
            return value
        if isinstance(value, float):
            return f"{value:.4g}"
        return json.dumps(value)

    def reason(self, rung: Rung, row: Row) -> str:
        """Why a row of a rung is as it is."""
        found = dict(zip(rung.columns, row.cells, strict=True))
        return str(found.get("reason", ""))

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """Where the run comes from: label and text."""
        run, model, oracle = self.report["run"], self.report["model"], self.report["oracle"]
        types = ", ".join(f"{count} {kind}" for kind, count in model["quantisation"].items())
        return [
            ("model", f"{model['source']} ({model['architecture']}; {types})"),
            ("model sha256", model["sha256"]),
            ("engine", f"{model['engine']}, arithmetic {self.text(model['arithmetic'])}"),
            *([("engine set up", engine_details(model))] if model["engine_details"] else []),
            ("oracle", f"{oracle['source']} ({oracle['architecture']})"),
            ("oracle sha256", oracle["sha256"]),
            ("started", f"{run['started_utc']}, took {run['wall_s']:.1f} s, "
                        f"peak memory {megabytes(run['peak_rss_bytes'])}"),
            ("host", ", ".join(f"{k} {v}" for k, v in run["host"].items())),
            ("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())),
            ("run id", run["id"]),
        ]  # fmt: skip
