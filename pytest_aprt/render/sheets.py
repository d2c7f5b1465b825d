"""Rungs that are more than a list, as a page shows them: logits, decode, contracts, prompts.

A row that lacks what is shown here (of an older or a later report) is left to the plain tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_aprt.contracts.ladder import height, rung_of
from pytest_aprt.render.ladder import BAD, NEUTRAL, mark
from pytest_aprt.render.words import cosine, excess, rel_l2, small, where
from pytest_aprt.report import PointJson, PromptErrorsJson, Report

_ERRORS = ("total", "weights", "engine")
_SIDES = ("model", "shadow", "oracle")


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first cell of a row is its head, ``marks`` says how each row is seen."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Sequence[str] = ()


@dataclass(frozen=True)
class Sheet:
    """One row of a rung with what belongs to it."""

    name: str
    status: str
    mark: str
    reason: str
    tables: Sequence[Table]


def _share(value: Any) -> str:
    return f"{float(value):.1%}"


_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("same next token", "argmax_same", _share),
    ("top 5 shared", "top5_overlap", _share),
    ("top 5 in order", "top5_in_order", _share),
    ("KL divergence in nats", "kl", small),
    ("  at the worst position", "kl_worst", small),
    ("p of the reference's token", "p_of_reference_token", _share),
    ("  p there in the reference", "p_reference", _share),
    ("margin in logits", "margin", lambda v: f"{float(v):.3g}"),
    ("worst relative gap", "worst_gap", small),
)


def _has_figures(row: Mapping[str, Any]) -> bool:
    wanted = {key for _, key, _ in _FIGURES}
    return all(isinstance(row.get(e), Mapping) and wanted <= row[e].keys() for e in _ERRORS)


def _rows(report: Report, rung: str) -> list[dict[str, Any]]:
    found: Any = report["ladder"].get(rung)
    return [row for row in found if "name" in row] if isinstance(found, list) else []


def _sheet(row: Mapping[str, Any], tables: Sequence[Table]) -> Sheet:
    return Sheet(row["name"], str(row.get("status", "")), mark(row), str(row.get("reason", "")),
                 tables)  # fmt: skip


def logits(report: Report) -> list[Sheet]:
    """Return the logits rung: figures of three errors, and the highest tokens side by side."""
    sheets = []
    for row in filter(_has_figures, _rows(report, "logits")):
        figures = [
            [label, *(text(row[error][key]) for error in _ERRORS)] for label, key, text in _FIGURES
        ]
        count = row.get("positions", 1)
        title = f"prompt {row.get('prompt', 0)}, {count} position{'s' if count != 1 else ''}"
        sheets.append(_sheet(row, [Table(title, ["", *_ERRORS], figures), *_tops(row)]))
    return sheets


def _tops(row: Mapping[str, Any]) -> list[Table]:
    top = row.get("top")
    if not isinstance(top, Mapping) or not all(top.get(side) for side in _SIDES):
        return []
    ranks = zip(*(top[side] for side in _SIDES), strict=False)
    rows = [[str(rank), *map(_token, found)] for rank, found in enumerate(ranks, 1)]
    return [Table("most likely next tokens", ["", *_SIDES], rows)]


def _token(found: Mapping[str, Any]) -> str:
    shown = f"[{found['id']}]" if found["token"] is None else repr(found["token"])
    return f"{shown} {_share(found['p'])}"


@dataclass(frozen=True)
class Decode:
    """The decode rung: growth over the steps, what each step shows, both sides' texts."""

    engine: list[float]  # of the prefill, then of every step
    weights: list[float]  # of every step
    steps: Table
    says: Sequence[Sequence[str]]


def decode(report: Report) -> Decode | None:
    """Return the decode rung where it was judged."""
    rows = {row["name"]: row for row in _rows(report, "decode")}
    growth, text = rows.get("growth", {}), rows.get("text", {})
    steps = [row for name, row in rows.items() if name.startswith("step") and _has_figures(row)]
    if not steps or "engine" not in growth or "weights" not in growth:
        return None
    cells = [
        [row["name"].removeprefix("step"), str(row["status"]),
         " / ".join(_token(row["top"][s][0]) for s in _SIDES if row.get("top", {}).get(s)),
         *(small(row[error]["kl"]) for error in _ERRORS),
         small(row.get("engine_rel_l2")), small(row.get("weights_rel_l2")),
         f"{row['worst_point']} {small(row['worst_rel_l2'])}" if "worst_point" in row else ""]
        for row in steps
    ]  # fmt: skip
    head = ["step", "status", "next token of model / shadow / oracle",
            *(f"KL {error}" for error in _ERRORS), "engine rel L2", "weights rel L2",
            "furthest from its own prefill"]  # fmt: skip
    says = [(side, repr(text[f"{side}_text"])) for side in ("model", "oracle")
            if f"{side}_text" in text]  # fmt: skip
    return Decode(
        [float(value) for value in growth["engine"]],
        [float(value) for value in growth["weights"]],
        Table("", head, cells, [mark(row) for row in steps]),
        says,
    )


@dataclass(frozen=True)
class Claims:
    """What contracts claim and what this run and the ledger say of it."""

    tally: str
    bad: int
    first: str  # ids of those, the first few
    table: Table


def contracts(report: Report) -> Claims | None:
    """Return the contracts: falsified and overstated ones first."""
    rows = list(report.get("contracts") or [])
    if not rows:
        return None
    flags = [_flag(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (not flags[i], rows[i]["outcome"] == "passed"))
    discharged = sum(row["supported"] == "DISCHARGED" for row in rows)
    partial = sum(0 < height(row["supported"]) < height("DISCHARGED") for row in rows)
    held = sum(row["outcome"] == "passed" for row in rows)
    cells = [
        [rows[i]["id"], flags[i] or rows[i]["outcome"], rows[i]["rule"],
         _spaced(rows[i]["declared"]), _spaced(rows[i]["supported"]), rows[i]["detail"],
         rows[i]["contract"]]
        for i in order
    ]  # fmt: skip
    head = ["falsifier", "outcome", "rule", "declared", "supported", "measured", "contract"]
    marks = [BAD if flags[i] else NEUTRAL for i in order]
    tally = (
        f"{held} of {len(rows)} held; tally {discharged}+{partial}: {discharged} discharged, "
        f"{partial} partial"
    )
    bad = [cells[i][0] for i in range(len(cells)) if marks[i] == BAD]
    first = ", ".join(bad[:4]) + (", ..." if len(bad) > 4 else "")
    return Claims(tally, len(bad), first, Table("", head, cells, marks))


def _spaced(status: str | None) -> str:
    return (status or "").replace("_", " ")  # breaks between lines


def _flag(row: Mapping[str, Any]) -> str:
    """Return why a claim needs attention, nothing where it does not."""
    if row["outcome"] in ("failed", "error") or row["supported"] == "FALSIFIED":
        return "falsified" if row["outcome"] != "error" else "error"
    overstated = height(rung_of(row["declared"])) > max(0, height(row["supported"]))
    return "overstated" if overstated else ""


_PROMPT_HEAD = ("total cos", "weights cos", "engine rel L2", "local rel L2", "worst slice")


def prompts_of(point: PointJson, most: int) -> Table | None:
    """Return a point's errors on every prompt, the worst first; None where there is only one."""
    found = point.get("prompts") or []
    if len(found) < 2 or most < 1:
        return None
    found = sorted(found, key=_badness, reverse=True)
    more = f"the worst {most} of {len(found)} prompts" if len(found) > most else "on every prompt"
    rows = [[f"prompt {e['prompt']}", *_errors_of(e)] for e in found[:most]]
    return Table(more, ["", *_PROMPT_HEAD], rows)


def _errors_of(e: PromptErrorsJson) -> list[str]:
    worst = e["worst_slice"]
    return [cosine(e["total"]), cosine(e["weights"]), rel_l2(e["engine"]), rel_l2(e["local"]),
            f"{small(worst['rel_l2'])}{where(worst)}" if worst else ""]  # fmt: skip


def _badness(e: PromptErrorsJson) -> float:
    worst = e["worst_slice"]
    value = float(worst["rel_l2"]) if worst else -1.0
    return value if value == value else float("inf")


def by_prompt(report: Report, what: Callable[[int], str]) -> Table | None:
    """Return each prompt with the points where it is worst; None where there is only one."""
    count = len(report["run"]["prompts"])
    if count < 2:
        return None
    rows = []
    for number in range(count):
        mine = [
            (p, e)
            for p in report["points"]
            for e in p.get("prompts") or []
            if e["prompt"] == number
        ]
        totals = [(float(e["total"]["cosine"]), p["point"]) for p, e in mine if e["total"]]
        # a slice's error over its point's tolerance, which is that of the point's worst prompt
        borne = [
            (excess({**p, "worst_slice": e["worst_slice"]}), p["point"], e)
            for p, e in mine if e["worst_slice"]
        ]  # fmt: skip
        lowest = min(totals, key=lambda t: -1.0 if t[0] != t[0] else t[0], default=None)
        largest = max(borne, key=lambda b: b[0], default=None)
        rows.append([
            f"prompt {number}",
            what(number),
            f"{lowest[0]:.6f} at {lowest[1]}" if lowest else "",
            f"{small(largest[2]['worst_slice']['rel_l2'])} at {largest[1]}"
            if largest and largest[2]["worst_slice"] else "",
            f"{largest[0]:.2g}" if largest else "",
        ])  # fmt: skip
    return Table("", ["", "text", "lowest total cosine", "largest local error", "of its tolerance"],
                 rows)  # fmt: skip
