"""The path rung: the engine's production path against the traced path that was judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_aprt.errors import blame
from pytest_aprt.rungs import PATH, Row, unavailable
from pytest_aprt.rungs.logits import NEAR_TIE

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Finals
    from pytest_aprt.sides import Sides

_VERDICT = "differ: the traced path is not the path that users run"


def path_rows(
    pair: Pair | Sides, engine: Any, finals: Sequence[Finals], cosine: float
) -> list[Row]:
    """Return the path rung, on the prompt where it is worst.

    Args:
        pair: the opened model and oracle.
        engine: the engine under test, as ``measure_pair`` was given it.
        finals: what the traced path gave.
        cosine: threshold on the logits.
    """
    raw = getattr(engine, "raw", engine)
    production = getattr(raw, "logits", None)
    if not callable(production):
        return unavailable(PATH, "the engine has no production path of its own: logits(tokens)")
    if not finals or any("lm_head" not in f.model for f in finals):
        return unavailable(PATH, "the traced path exposes no lm_head")
    exact = bool(getattr(raw, "bit_exact", False))
    rows = [_row(pair, raw, f, number, exact, cosine) for number, f in enumerate(finals)]
    return [next((row for row in rows if row.broken), rows[0])]


def _row(
    pair: Pair | Sides, raw: Any, finals: Finals, number: int, exact: bool, cosine: float
) -> Row:
    name, tokens, vocab = PATH[0], list(finals.prompt.tokens), pair.oracle_facts.vocab
    try:
        found = torch.as_tensor(raw.logits(tokens)).detach().to("cpu", torch.float32)
    except Exception as error:
        return Row(name=name, status="broken", reason=f"cannot be had: it raised {blame(error)}")
    if found.shape not in ((vocab,), (len(tokens), vocab)):
        said = f"cannot be had: of shape {tuple(found.shape)}, expected ({vocab},) or "
        return Row(name=name, status="broken", reason=f"{said}({len(tokens)}, {vocab})")
    users = found.reshape(-1, vocab)[-1]
    traced = finals.model["lm_head"]
    figures = {"prompt": number, "bit_exact": exact, "changes": _changes(raw, tokens, traced)}
    return _compared(name, users, traced, figures, exact, cosine)


def _changes(raw: Any, tokens: list[int], traced: Tensor) -> dict[str, float]:
    """Return how far each setting of the production path alone moves the logits (relative L2)."""
    variants = getattr(raw, "variants", None)
    if not callable(variants):
        return {}
    return {
        change: _apart(torch.as_tensor(logits).float(), traced)
        for change, logits in variants(tokens)
    }


def _apart(a: Tensor, b: Tensor) -> float:
    norm = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / (norm or 1.0)


def _compared(
    name: str, users: Tensor, traced: Tensor, figures: dict[str, Any], exact: bool, cosine: float
) -> Row:
    a, b = users.double(), traced.double()
    norms = float(a.norm()), float(b.norm())
    figures |= {
        "same_bits": torch.equal(users, traced),
        "rel_l2": _apart(users, traced),
        "cosine": float(a @ b) / ((norms[0] * norms[1]) or 1.0),
        "users_token": int(a.argmax()),
        "traced_token": int(b.argmax()),
    }
    gap = float(b.max() - b[figures["users_token"]]) / (abs(float(b.max())) or 1.0)
    status, why = "pass", ""
    if exact and not figures["same_bits"]:
        why = f"the engine promises the same bits, rel_l2 is {figures['rel_l2']:.1e}"
    elif not gap <= NEAR_TIE:
        why = f"token {figures['users_token']} there, {figures['traced_token']} where it is traced"
    elif not figures["cosine"] >= cosine:
        why = f"cosine {figures['cosine']:.6f}, threshold {cosine}"
    elif gap > 0:
        status = "near-tie"
    reason = f"{_VERDICT} ({why})" if why else _said(figures["changes"])
    if status == "near-tie":
        reason = f"flip between near-tied tokens, relative gap {gap:.2g}: rounding decides"
    return Row(name=name, status="broken" if why else status, reason=reason, figures=figures)


def _said(changes: dict[str, float]) -> str:
    told = ", ".join(f"{change} {distance:.1e}" for change, distance in changes.items())
    return f"relative L2 of the logits by {told}" if told else ""
