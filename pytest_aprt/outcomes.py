"""Which tests a run consists of, and what each one's outcome is: read from the report alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_aprt.checkpoints import HEADS
from pytest_aprt.facts import FACTS
from pytest_aprt.rungs import LOGITS, PATH, ROW_STATUSES, TOKENS, decode_names
from pytest_aprt.stages import Point
from pytest_aprt.statuses import SELF_TESTS, VERDICTS

if TYPE_CHECKING:
    from pytest_aprt.pair import Headers
    from pytest_aprt.report import Report

GATE = "gate"
_UNKNOWN = "not judged: it needs the model's weights and the oracle's Hugging Face folder"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a test reports: passed, failed, skipped or xfailed, the text, and its numbers.

    ``reason`` is a few words where the text is long.
    """

    outcome: str
    text: str = ""
    reason: str = ""
    properties: dict[str, Any] = field(default_factory=dict)


def test_names(headers: Headers | None, points: Iterable[Point], decode_steps: int) -> list[str]:
    """Return the names of all tests in the order of the ladder, from headers alone.

    Args:
        headers: of model and oracle; None where `total` alone is measured.
        points: to judge.
        decode_steps: how many steps are decoded.
    """
    names = [f"selftest-{name}" for name in SELF_TESTS]
    names += [f"tokens-{name}" for name in TOKENS]
    names += [f"config-{name}" for name in FACTS]
    names += [f"weights-{name}" for name in _tensor_names(headers)] if headers else []
    names += [str(point) for point in points]
    names += [f"logits-{name}" for name in LOGITS]
    names += [f"decode-{name}" for name in decode_names(decode_steps)]
    names += [f"path-{name}" for name in PATH]
    return [*names, GATE]


def _tensor_names(headers: Headers) -> list[str]:
    model, parameters = headers.model, headers.architecture.parameter_tensors
    expected = [
        model.stored(layer, suffix)
        for layer in range(headers.graph.n_layers)
        for suffix in headers.architecture.layer_tensors
    ]
    if not headers.oracle.config.get("tie_word_embeddings", False):
        expected.append(model.head)
    names = dict.fromkeys([*expected, *model.tensors])
    return [name for name in names if name not in parameters]


def outcome_of(report: Report, name: str) -> Outcome:
    """Return the outcome of the test ``name``; with a baseline, what is known does not fail."""
    found = _outcome_of(report, name)
    if found.outcome == "failed" and name in report.get("baseline", {}).get("known", ()):
        reason = f"known: the baseline fails likewise; {found.text.splitlines()[0]}"
        return replace(found, outcome="xfailed", reason=reason)
    return found


def _outcome_of(report: Report, name: str) -> Outcome:
    kind, dash, rest = name.partition("-")
    if name == GATE:
        return _gate(report)
    if dash and kind in _RUNGS:
        return _RUNGS[kind](report, rest)
    return _point(report, name)


def _gate(report: Report) -> Outcome:
    verdict = report["verdict"]
    passed, text = VERDICTS[verdict["status"]], verdict["summary"]
    baseline = report.get("baseline")
    if baseline is not None and verdict["status"] == "DIVERGED":
        worse = baseline["worse"]
        passed = not worse
        text = f"worse than the baseline: {', '.join(worse[:4])}; {text}" if worse else text
    return Outcome(
        outcome="passed" if passed else "failed",
        text=text,
        properties={"verdict": verdict["status"], "rung": verdict["rung"] or ""},
    )


def _self_test(report: Report, name: str) -> Outcome:
    test = next((t for t in report["self_test"] if t["name"] == name), None)
    if test is None:
        return Outcome(outcome="skipped", text=f"self-test {name}: {_UNKNOWN}")
    return Outcome(
        outcome="passed" if test["passed"] else "failed",
        text=f"self-test {name}: {test['detail']}",
    )


def _config(report: Report, name: str) -> Outcome:
    fact = next((f for f in report["ladder"]["config"] if f["name"] == name), None)
    if fact is None:
        return Outcome(outcome="skipped", text=f"config {name}: {_UNKNOWN}")
    text = (
        f"config {name}: {fact['model']} in the model ({fact['key']}), {fact['oracle']} in the "
        f"oracle ({fact['config']})"
    )
    if fact["reason"]:
        text = f"config {name} {fact['reason']}"
    properties = {"model": str(fact["model"]), "oracle": str(fact["oracle"])}
    failed = fact["status"] == "broken"
    return Outcome(outcome="failed" if failed else "passed", text=text, properties=properties)


def _weights(report: Report, name: str) -> Outcome:
    tensor = next((t for t in report["ladder"]["weights"] if t["name"] == name), None)
    if tensor is None:
        if name in HEADS:
            return Outcome(outcome="passed", text="tied: judged as the embedding")
        return Outcome(outcome="skipped", text=f"the run ended before {name} was read")
    return Outcome(
        outcome="failed" if tensor["status"] == "broken" else "passed",
        text=f"weights {name}: {tensor['reason']}",
        properties={"rel_l2": tensor["rel_l2"], "bound": tensor["bound"], "type": tensor["type"]},
    )


def _point(report: Report, name: str) -> Outcome:
    from pytest_aprt.render import failure

    point = next(p for p in report["points"] if p["point"] == name)
    properties: dict[str, Any] = {"status": point["status"]}
    for error in ("total", "weights", "engine", "local"):
        metrics = point[error]
        if metrics is not None:
            properties[f"{error}_cosine"] = metrics["cosine"]
            properties[f"{error}_rel_l2"] = metrics["rel_l2"]
    text = point["reason"]
    if point["outcome"] == "failed" or point["status"] == "inherited":
        text = failure.render(report, point)
    return Outcome(
        outcome=point["outcome"], text=text, reason=point["reason"], properties=properties
    )


def _row(rung: str) -> Callable[[Report, str], Outcome]:
    """Return what tells the outcome of a row of ``rung``."""

    def outcome(report: Report, name: str) -> Outcome:
        rows: Any = report["ladder"][rung]  # type: ignore[literal-required]
        row = next(r for r in rows if r["name"] == name)
        return Outcome(
            outcome=ROW_STATUSES[row["status"]],
            text=f"{rung} {name}: {row['reason'] or row['status']}",
            reason=row["reason"],
            properties={key: value for key, value in row.items() if isinstance(value, _SCALARS)},
        )

    return outcome


_SCALARS = (bool, int, float, str)
_RUNGS: dict[str, Callable[[Report, str], Outcome]] = {
    "selftest": _self_test,
    **{rung: _row(rung) for rung in ("tokens", "logits", "decode", "path")},
    "config": _config,
    "weights": _weights,
}
