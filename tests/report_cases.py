"""Reports to render: of real runs, and what these become when a run shows what runs rarely show."""

from __future__ import annotations

import copy
import functools
import typing

import numpy as np
from harness import FIXTURES, faulty

from pytest_aprt.pair import open_headers, open_pair
from pytest_aprt.run import run
from pytest_aprt.settings import read_settings
from pytest_aprt.stages import point_id

MODEL, ORACLE = FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", FIXTURES / "tiny-qwen2" / "hf"
COMMAND = "pytest --aprt-model=q4_k_m.gguf --aprt-oracle=hf"


class Fault:
    """Swaps the channels of K in layer 2 and doubles the output projection."""

    layer = 2
    changes: typing.ClassVar = {
        "k_post_rope": lambda value, work: value[:, ::-1],
        "attn_out": lambda value, work: value * 2,
    }


def _last_token_nan(value, work):
    return np.where(np.arange(len(value))[:, None] == len(value) - 1, np.nan, value)


class Overflow:
    """The last token of layer 1's gate is NaN; a fault of its own lies two stages after."""

    layer = 1
    changes: typing.ClassVar = {
        "ffn_gate": _last_token_nan,
        "ffn_out": lambda value, work: value * 2,
    }


def run_of(fault=None, **options):
    given = {"model": str(MODEL), "oracle": str(ORACLE), **options}
    if not {"tokens", "prompt"} & set(options):
        given["tokens"] = ["3,77,500,12,640,9"]
    settings = read_settings({f"aprt_{k}": v for k, v in given.items()}.get, command=COMMAND)
    headers = open_headers(settings.weights, settings.oracle)
    engine = None if fault is None else faulty(open_pair(headers), fault)
    return run(headers, settings, engine, lambda what, done, total: None)


PROMPTS = [
    "What is 2+2?",
    "a | b\n\nc `code` <b>bold</b>",
    "tab\t\x1b[31m",
    "na\u00efve \u65e5\u672c",
    "1",
]

_RUNS = {
    "clean": lambda: run_of(),
    "fault": lambda: run_of(Fault),
    "overflow": lambda: run_of(Overflow),
    "prompts": lambda: run_of(Fault, prompt=PROMPTS),
}


@functools.cache
def _once(name):
    return _RUNS[name]()


def report_of(name):
    """A report of a real run, to be changed as one likes."""
    return copy.deepcopy(_once(name))


def point_of(report, name):
    return next(p for p in report["points"] if p["point"] == name)


def of_layers(report, count):
    """The same report of a deeper model: layer 3 repeated."""
    last = [p for p in report["points"] if p["layer"] == 3]
    head = [p for p in report["points"] if p["layer"] is None]
    points = [p for p in report["points"] if p["layer"] is not None]
    for layer in range(4, count):
        points += [
            {**copy.deepcopy(p), "layer": layer, "point": point_id(layer, p["stage"])} for p in last
        ]
    report["points"] = points + head
    return report


def with_notes(report):
    note = (
        "every prompt is a single token: position 0 is blind to RoPE, masks and most attention "
        "faults; use a longer prompt"
    )
    report["notes"] = [note, "L\u00f6we\n" + "x" * 200] * 9
    return report


def with_many_origins(report):
    """Every point of layers 2 and 3 is an origin too, and each shares a bracket."""
    first = (report["verdict"]["origins"] or [None])[0]
    if first is None:
        return report
    for point in report["points"]:
        if point["layer"] in (2, 3):
            point["status"] = "diverged"
    points = [p for p in report["points"] if p["status"] == "diverged"]
    report["verdict"]["origins"] = [
        {**copy.deepcopy(first), "layer": p["layer"], "stage": p["stage"], "point": p["point"],
         "bracket": ["L02-attn_norm", "L02-qkv_matmul", p["point"]]}
        for p in points
    ]  # fmt: skip
    return report


def with_failed_self_tests(report):
    for test in report["self_test"]:
        test.update(passed=False, detail="something went wrong " * 20)
    report["verdict"].update(
        status="INCONCLUSIVE", summary="INCONCLUSIVE: the self-test failed: " + "wrong " * 200
    )
    return report


def with_broken_rungs(report):
    report["ladder"]["config"][7].update(status="broken", model={"kind": "a|b", "factor": "inf"})
    report["ladder"]["weights"][3].update(status="broken", reason="missing in the GGUF")
    report["verdict"]["rung"] = "config"
    return report


def with_later_rungs(report):
    """Rungs and contracts that this version does not write."""
    report["ladder"]["tokens"] = {"status": "agree", "model": [1, 2], "oracle": [1, 2]}
    report["ladder"]["logits"] = {"argmax": "same", "kl": 1e-9, "top": ["a|b", "\n"]}
    report["ladder"]["decode"] = [{"step": 1, "status": "broken", "rel_l2": "nan"}]
    report["ladder"]["path"] = {}
    report["contracts"] = [
        {"contract": "c.yaml", "id": "FALSIFY-X-001", "rule": "a < b", "declared": "DISCHARGED",
         "outcome": "failed", "supported": "FALSIFIED", "detail": "<script>alert(1)</script>"}
    ]  # fmt: skip
    return report


def with_odd_texts(report):
    odd = "a|b\n`c` <img src=x onerror=alert(1)> \udcff\x00 \U0001f600 @someone"
    report["model"]["source"] = report["oracle"]["source"] = odd
    report["run"]["command"] = f"pytest '--aprt-prompt={odd}'"
    report["notes"] = [odd]
    for prompt in report["run"]["prompts"]:
        prompt["text"] = odd
    for point in report["points"]:
        point["reason"] = odd
    for origin in report["verdict"]["origins"]:
        origin["hint"] = odd
    report["verdict"]["summary"] = f"{report['verdict']['status']}: {odd}"
    return report


def _all_nan(value, number):
    if isinstance(value, dict):
        return {k: _all_nan(v, number) for k, v in value.items()}
    if isinstance(value, list):
        return [_all_nan(v, number) for v in value]
    return number if isinstance(value, float) else value


def with_no_number(number):
    """Every number that may be non-finite is."""

    def change(report):
        for key in ("points", "verdict", "ladder"):
            kept = [p["threshold"] for p in report["points"]]
            report[key] = _all_nan(report[key], number)
            for point, threshold in zip(report["points"], kept, strict=True):
                point["threshold"] = threshold
        return report

    return change


SHAPES = {
    "as-it-is": lambda r: r,
    "notes": with_notes,
    "many-origins": with_many_origins,
    "28-layers": lambda r: of_layers(r, 28),
    "80-layers": lambda r: of_layers(r, 80),
    "200-layers": lambda r: of_layers(r, 200),
    "200-layers-and-all": lambda r: with_notes(
        with_many_origins(with_failed_self_tests(of_layers(r, 200)))
    ),
    "failed-self-tests": with_failed_self_tests,
    "broken-rungs": with_broken_rungs,
    "later-rungs": with_later_rungs,
    "odd-texts": with_odd_texts,
    "nan": with_no_number("nan"),
    "inf": with_no_number("inf"),
    "-inf": with_no_number("-inf"),
    "one-point": lambda r: {**r, "points": r["points"][:1]},
    "no-points": lambda r: {**r, "points": []},
}
