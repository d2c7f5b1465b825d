"""report.md: the verdict, the origins, the layers and the broken rungs, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from pytest_aprt.render.terminal import counts
from pytest_aprt.render.words import by_layer, cosine, megabytes, rel_l2, small, where, worst_of
from pytest_aprt.report import PointJson, Report


def render(report: Report) -> str:
    """Return the report as Markdown."""
    sections = [
        "# Forward-pass parity",
        f"**{report['verdict']['status']}** {report['verdict']['summary'].partition(': ')[2]}",
        _sides(report),
        _origins(report),
        _broken(report),
        _self_tests(report),
        _layers(report),
        _points(report),
        _run(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, head, tablefmt="github", disable_numparse=True)


def _sides(report: Report) -> str:
    model, oracle = report["model"], report["oracle"]
    types = ", ".join(f"{count} {kind}" for kind, count in model["quantisation"].items())
    rows = [
        [
            "model",
            f"`{model['source']}`",
            f"{model['architecture']}; {types}",
            model["sha256"][:12],
        ],
        ["oracle", f"`{oracle['source']}`", oracle["architecture"], oracle["sha256"][:12]],
    ]
    engine = f"Engine: {model['engine']}, arithmetic {model['arithmetic']}."
    return _table(rows, ["", "source", "what", "sha256"]) + "\n\n" + engine


def _origins(report: Report) -> str:
    origins = report["verdict"]["origins"]
    if not origins:
        return ""
    rows = [
        [
            " .. ".join(dict.fromkeys([(o["bracket"] or [o["point"]])[0], o["point"]])),
            rel_l2(o["local"]),
            f"{small(o['worst']['rel_l2'])}{where(o['worst'])}" if o["worst"] else "",
            o["hint"] or "",
        ]
        for o in origins
    ]
    return "## Origins\n\n" + _table(rows, ["point", "local rel_l2", "worst slice", "likely"])


def _broken(report: Report) -> str:
    facts = [f for f in report["ladder"]["config"] if f["status"] != "agree"]
    tensors = [t for t in report["ladder"]["weights"] if t["status"] == "broken"]
    text = ""
    if facts:
        rows = [[f["name"], f["model"], f["oracle"], f["status"]] for f in facts]
        text += "## Config\n\n" + _table(rows, ["fact", "model", "oracle", "status"])
    if tensors:
        rows = [[t["name"], t["type"], t["reason"]] for t in tensors]
        text += (
            ("\n\n" if text else "") + "## Weights\n\n" + _table(rows, ["tensor", "type", "why"])
        )
    return text


def _self_tests(report: Report) -> str:
    rows = [
        [t["name"], "passed" if t["passed"] else "FAILED", t["detail"]] for t in report["self_test"]
    ]
    return "## Self-test\n\n" + _table(rows, ["check", "", "detail"])


def _layers(report: Report) -> str:
    rows = []
    for layer, points in by_layer(report).items():
        p = worst_of(points)
        name = "head" if layer is None else f"L{layer:02d}"
        rows.append([name, *_row(p)])
    head = [
        "layer",
        "worst point",
        "status",
        "total cos",
        "weights cos",
        "engine rel_l2",
        "local rel_l2",
    ]
    return f"## Layers\n\n{counts(report)}.\n\n" + _table(rows, head)


def _row(p: PointJson) -> list[str]:
    return [p["stage"], p["status"], cosine(p["total"]), cosine(p["weights"]),
            rel_l2(p["engine"]), rel_l2(p["local"])]  # fmt: skip


def _points(report: Report) -> str:
    rows = [
        [p["point"], *_row(p)[1:], small(p["tolerance"]["rel_l2"]) if p["tolerance"] else ""]
        for p in report["points"]
    ]
    head = [
        "point",
        "status",
        "total cos",
        "weights cos",
        "engine rel_l2",
        "local rel_l2",
        "tolerance",
    ]
    table = _table(rows, head)
    return f"<details><summary>All {len(rows)} points</summary>\n\n{table}\n\n</details>"


def _run(report: Report) -> str:
    run = report["run"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    lines = [
        "## Run",
        "",
        f"- {run['started_utc']}, {run['wall_s']:.1f} s, peak memory "
        f"{megabytes(run['peak_rss_bytes'])}, id `{run['id']}`",
        f"- `{run['command']}`",
        *[
            f"- prompt {index}: {prompt['text']!r}, {len(prompt['tokens'])} tokens"
            for index, prompt in enumerate(run["prompts"])
        ],
        *[f"- note: {note}" for note in report["notes"]],
        f"- {versions}",
    ]
    return "\n".join(lines)
