"""report.md: the verdict, the origins, the broken rungs and the layers, short enough for a comment.

A comment on GitHub holds 65,536 characters: long tables name their worst rows, and report.html
has the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from pytest_aprt.render.ladder import BAD, rungs
from pytest_aprt.render.sheets import contracts
from pytest_aprt.render.words import (
    SYMBOLS,
    by_layer,
    cosine,
    counts,
    engine_details,
    excess,
    layer_name,
    megabytes,
    printable,
    rel_l2,
    size,
    small,
    span,
    worst_of,
)
from pytest_aprt.report import PointJson, Report

MOST_CHARACTERS = 60_000
_ROWS = 20  # of any table; the layers get more
_LAYERS = 100
_TEXT = 300  # characters of one cell

_FIGURES = ("total", "weights", "engine", "top")  # of logits and steps: report.html has them

_POINT_HEAD = ("status", "total cos", "weights cos", "engine rel_l2", "local rel_l2")


def render(report: Report) -> str:
    """Return the report as Markdown, at most ``MOST_CHARACTERS`` long."""
    verdict = report["verdict"]
    sections = [
        "# Forward-pass parity",
        f"**{verdict['status']}** {_plain(verdict['summary'].partition(': ')[2], 2000)}",
        _baseline(report),
        _sides(report),
        _origins(report),
        _self_tests(report),
        _broken(report),
        _contracts(report),
        _layers(report),
        _points(report),
        _run(report),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    if len(text) > MOST_CHARACTERS:  # only a command or a name of many thousand characters does it
        text = text[: MOST_CHARACTERS - 40] + "\n\n(cut; report.json has it all)\n"
    return printable(text)


def _plain(value: Any, most: int = _TEXT) -> str:
    """Return text that stays text in Markdown: one line, no HTML, no table border, no markup."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    if len(text) > most:
        text = text[: most - 3] + "..."
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w)|(?<!\w)[@#](?=\w))", r"\\\1", text)


def _code(value: str) -> str:
    """Return text as code on one line, whatever it holds."""
    text = " ".join(value.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _first(rows: list[list[str]], head: Sequence[str], noun: str, most: int = _ROWS) -> str:
    """Return a table of the first rows, and how many there are besides."""
    further = len(rows) - most
    more = f"\n\n{further} further {noun}: see report.html." if further > 0 else ""
    return _table(rows[:most], head) + more


def _sides(report: Report) -> str:
    model, oracle = report["model"], report["oracle"]
    types = ", ".join(f"{count} {kind}" for kind, count in model["quantisation"].items())
    rows = [
        ["model", _code(model["source"]), _plain(f"{model['architecture']}; {types}"),
         model["sha256"][:12]],
        ["oracle", _code(oracle["source"]), _plain(oracle["architecture"]),
         oracle["sha256"][:12]],
    ]  # fmt: skip
    engine = f"Engine: {_plain(model['engine'])}, arithmetic {_plain(model['arithmetic'])}."
    if model["engine_details"]:
        engine += f" Set up: {_plain(engine_details(model))}."
    return _table(rows, ["", "source", "what", "sha256"]) + "\n\n" + engine


def _baseline(report: Report) -> str:
    if "baseline" not in report:
        return ""
    found = report["baseline"]
    lines = [
        f"- {kind}: {len(names)}" + (f" ({_plain(', '.join(names[:_ROWS]))})" if names else "")
        for kind in ("worse", "known", "better")
        for names in [found[kind]]
    ]
    return "Against the baseline:\n\n" + "\n".join(lines)


def _origins(report: Report) -> str:
    rows = [
        [span(o), size(o), o["previous_good"]["point"] if o["previous_good"] else "",
         _plain(o["hint"] or "")]
        for o in report["verdict"]["origins"]
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["point", "local rel_l2", "still good", "likely"]
    return "## Origins\n\n" + _first(rows, head, "origins")


def _broken(report: Report) -> str:
    """Return the rows that are not as they should be, of every rung that has some."""
    sections = []
    for rung in rungs(report["ladder"]):
        bad = [row for row in rung.rows if row.mark == BAD]
        if not bad:
            continue
        shown = [i for i, column in enumerate(rung.columns) if column not in _FIGURES]
        rows = [[_plain(row.cells[i]) for i in shown] for row in bad]
        head = [rung.columns[i] for i in shown]
        sections.append(f"## {rung.title}\n\n" + _first(rows, head, f"rows of {rung.name}"))
    return "\n\n".join(sections)


def _contracts(report: Report) -> str:
    found = report.get("contracts") or []
    if not found:
        return ""
    claims = contracts(report)
    assert claims is not None
    head = ["falsifier", "outcome", "declared", "supported", "measured"]
    columns = [claims.table.head.index(name) for name in head]
    cells = [[_plain(row[i], 120) for i in columns] for row in claims.table.rows]
    at_once = [row for row in cells if row[1] != "passed"]
    held = [row for row in cells if row[1] == "passed"]
    parts = [f"## Contracts and ledger\n\n{_plain(claims.tally)}."]
    if at_once:
        parts.append(_first(at_once, head, "falsifiers"))
    if held:
        table = _first(held, head, "falsifiers")
        title = f"{len(held)} falsifiers that held"
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _self_tests(report: Report) -> str:
    tests = report["self_test"]
    failed = [[_plain(t["name"]), _plain(t["detail"])] for t in tests if not t["passed"]]
    if not failed:
        return f"Self-test of the capture: {len(tests)} of {len(tests)} passed."
    return f"## Self-test: {len(failed)} of {len(tests)} failed\n\n" + _first(
        failed, ["check", "why"], "checks"
    )


def _layers(report: Report) -> str:
    worst = {layer: worst_of(points) for layer, points in by_layer(report).items()}
    rows = [[layer_name(layer), p["stage"], *_row(p)] for layer, p in worst.items()]
    head = ["layer", "worst point", *_POINT_HEAD]
    return f"## Layers\n\n{counts(report)}.\n\n" + _first(rows, head, "layers", _LAYERS)


def _row(p: PointJson) -> list[str]:
    return [p["status"], cosine(p["total"]), cosine(p["weights"]),
            rel_l2(p["engine"]), rel_l2(p["local"])]  # fmt: skip


def _points(report: Report) -> str:
    points = report["points"]
    order = list(SYMBOLS)
    worst = sorted(points, key=lambda p: (order.index(p["status"]), -excess(p)))
    rows = [
        [p["point"], *_row(p), small(p["tolerance"]["rel_l2"]) if p["tolerance"] else ""]
        for p in worst
    ]
    title = f"All {len(rows)} points" if len(rows) <= 100 else "The 100 worst points"
    table = _first(rows, ["point", *_POINT_HEAD, "tolerance"], "points", 100)
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def _run(report: Report) -> str:
    run = report["run"]
    fence = "`" * max(3, 1 + max((len(r) for r in re.findall("`+", run["command"])), default=0))
    prompts = [
        f"- prompt {index}: {_code(repr(prompt['text'][:_TEXT]))}, {len(prompt['tokens'])} tokens"
        for index, prompt in enumerate(run["prompts"][:_ROWS])
    ]
    lines = [
        "## Run",
        "",
        f"{fence}console",
        *[("$ " if i == 0 else "> ") + line for i, line in enumerate(run["command"].split("\n"))],
        fence,
        "",
        f"- {run['started_utc']}, {run['wall_s']:.1f} s, peak memory "
        f"{megabytes(run['peak_rss_bytes'])}, id `{run['id']}`",
        *prompts,
        *[f"- note: {_plain(note, 1000)}" for note in report["notes"]],
        "- " + ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
    ]
    return "\n".join(lines)
