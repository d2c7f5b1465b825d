"""The kinds of ``check:`` that a falsifier can be bound to, as one table.

A row says what a check needs and which settings it has; the check itself is imported when it
runs, so that contracts can be listed and validated without numpy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple

from pytest_aprt.contracts.checks import settings as s
from pytest_aprt.contracts.checks.settings import REQUIRED, Setting, read_settings
from pytest_aprt.contracts.lines import as_plain
from pytest_aprt.contracts.subject import Bound, Finding, Subject

Needs = Literal["nothing", "report", "captures", "model"]

ERRORS = ("total", "weights", "engine", "local")
METRICS = ("cosine", "rel_l2", "slope", "norm_ratio", "max_abs", "rms", "sqnr_db")
CHANGES = ("roll", "scale", "negate", "zero")


class Check(NamedTuple):
    """One kind: ``module.function(subject, **settings)`` returns a Finding."""

    module: str
    needs: Needs
    settings: Mapping[str, Setting]
    what: str


_POINTS = {
    "stages": Setting(s.stages, None),
    "layers": Setting(s.layers, None),
    "error": Setting(s.one_of(*ERRORS), "total"),
}
_BOUNDS = {"at_least": Setting(s.number), "at_most": Setting(s.number)}
_PLANT = {
    "plant": Setting(s.text, REQUIRED),
    "layer": Setting(lambda v: s.layers(v)(1 << 31)[0], 0),
    "change": Setting(s.one_of(*CHANGES), "roll"),
}

CHECKS = {
    "stage_metric": Check("points", "report", {
        **_POINTS, **_BOUNDS, "metric": Setting(s.one_of(*METRICS), REQUIRED),
        "quantile": Setting(s.share),
    }, "a metric of the chosen points is within bounds; with a quantile, that of all values is"),
    "stage_cosine": Check("points", "report", {
        **_POINTS, **_BOUNDS, "quantile": Setting(s.share),
    }, "the cosine of the chosen points is within bounds"),
    "stage_ratio": Check("ratios", "captures", {
        "stages": Setting(s.stages), "layers": Setting(s.layers),
        "statistic": Setting(s.one_of("std", "rms", "max_abs"), "std"),
        "within": Setting(s.span, REQUIRED),
    }, "a statistic of the model's stages over that of the oracle's is within bounds"),
    "verdict": Check("points", "report", {
        "is": Setting(s.some_of("PARITY", "QUANTISATION_NOISE", "DIVERGED", "INCONCLUSIVE"),
                      REQUIRED),
    }, "the run's verdict is one of these"),
    "rung": Check("points", "report", {
        "name": Setting(s.one_of("tokens", "config", "weights", "logits", "decode", "path"),
                        REQUIRED),
    }, "no row of a rung of the ladder is broken, or follows from what is broken"),
    "report_bound": Check("points", "report", {
        **_BOUNDS, "path": Setting(s.text, REQUIRED),
    }, "a number of report.json is within bounds, such as run.peak_rss_bytes"),
    "everything_judged": Check("points", "report", {
        "at_least": Setting(s.count, 1), "fused": Setting(s.stages),
    }, "every point of the model was compared, on every prompt, and the self-test passed; stages "
       "that engines fuse with the next one may be missing, which is then judged across them"),
    "single_transition": Check("transitions", "model", {
        "stages": Setting(s.sequence, REQUIRED), "threshold": Setting(s.number, 0.999),
        "error": Setting(s.one_of(*ERRORS), "total"), **_PLANT, "plant": Setting(s.text),
    }, "exactly one adjacent pair of the sequence straddles the threshold; with plant, on an "
       "engine with a fault in that stage, and there"),
    "fault_found": Check("transitions", "model", _PLANT,
        "a fault planted in a stage is the first divergence, and there is no other origin"),
    "no_false_alarm": Check("transitions", "model", {},
        "a second engine without a fault, on the model's weights, has no origin"),
    "argmax_parity": Check("logits", "captures", {
        "near_tie": Setting(s.number, 0.0),
    }, "model and oracle predict the same token on every prompt, near ties aside"),
    "near_tie": Check("logits", "captures", {
        "margin": Setting(s.number, REQUIRED),
    }, "tokens flip only where the oracle's own logits lie closer than the margin"),
    "multi_step_parity": Check("decoding", "model", {
        "steps": Setting(s.count, REQUIRED), "at_least": Setting(s.number, 0.999),
        "against": Setting(s.one_of("oracle", "shadow"), "oracle"),
        "near_tie": Setting(s.number, 0.0),
    }, "the logits agree after every one of the steps, each teacher-forced, not after one alone"),
    "determinism": Check("dumps", "model", {
        "stages": Setting(s.stages), "layers": Setting(s.layers),
    }, "two captures of one prompt are byte-identical"),
    "header_format": Check("dumps", "nothing", {},
        "files are APRT, layer, count and float32, of exactly 12 + 4n bytes; liars are refused"),
    "stage_files": Check("dumps", "model", {
        "stages": Setting(s.stages, REQUIRED), "layers": Setting(s.layers),
    }, "a capture of some stages and layers writes exactly their files"),
    "nan_preservation": Check("dumps", "nothing", {},
        "NaN payloads, infinities and -0.0 survive a file bit for bit"),
    "capture_is_additive": Check("dumps", "model", {},
        "the logits are the same bits whether all stages are captured or they alone"),
    "diff_semantics": Check("diffs", "nothing", {
        "stages": Setting(s.stages, ["ffn_gate"]),
    }, "equal files differ by nothing, a planted difference is found where it is, and files of "
       "other layers or counts are refused"),
    "stage_order": Check("own", "nothing", {
        "stages": Setting(s.sequence, REQUIRED),
    }, "the stages are known by these names in any case, in this order of computation"),
    "contract_validates": Check("own", "nothing", {
        "paths": Setting(s.texts),
    }, "the contract itself, or those named, have no error"),
    "command_line": Check("own", "nothing", {
        "command": Setting(s.text, REQUIRED), "options": Setting(s.texts, REQUIRED),
    }, "a command of aprt has these options"),
    "trace_command": Check("own", "captures", {
        "stages": Setting(s.stages, REQUIRED), "layers": Setting(s.layers),
    }, "aprt trace writes exactly these stages of the model, as the run's own capture has them"),
    "pytest": Check("outside", "nothing", {
        "node": Setting(s.text, REQUIRED), "timeout_s": Setting(s.number, 600.0),
    }, "a pytest node passes in a run of its own"),
}  # fmt: skip


def problem_with(check: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a ``check:`` mapping, None if nothing is."""
    kind = check.get("kind")
    if kind not in CHECKS:
        return f"check kind {kind!r} is unknown: expected one of {', '.join(CHECKS)}"
    settings = CHECKS[kind].settings
    if settings.keys() >= _BOUNDS.keys() and not check.keys() & _BOUNDS.keys():
        return f"check {kind}: expected a bound, at_least or at_most"
    try:
        read_settings(check, settings)
    except ValueError as error:
        return f"check {kind}: {error}"
    return None


def bound_check(check: Mapping[str, Any]) -> Bound:
    """Return the check that a mapping binds to; the mapping must be valid."""
    kind = check["kind"]
    row = CHECKS[kind]
    given = read_settings(check, row.settings)

    def evaluate(subject: Subject) -> Finding:
        module = import_module(f"{__name__}.{row.module}")
        finding: Finding = getattr(module, kind)(subject, **_keywords(given))
        return finding

    return Bound("check", row.needs, evaluate, json.dumps(as_plain(check), sort_keys=True))


def _keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"among" if name == "is" else name: value for name, value in given.items()}
