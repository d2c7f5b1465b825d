"""The logits rung: what the model would say next, against shadow and oracle.

At the last position the model's own logits are judged; over all positions the head is applied to
each run's final norm, streamed, so that the logits of a long prompt are never held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_aprt.architectures import HEAD
from pytest_aprt.errors import AprtError
from pytest_aprt.matrices import together
from pytest_aprt.positions import first_of
from pytest_aprt.rungs import LOGITS, Row, unavailable
from pytest_aprt.weights import row_chunks

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Finals
    from pytest_aprt.sides import Sides

NEAR_TIE = 0.06
"""Largest gap, relative to the reference's highest logit, at which a flip is put down to rounding.

Twice the largest seen on healthy engines: 0.031 (8-bit inputs, float16, bfloat16, tf32; 512
positions of each of 3 fixture pairs; ``tests/benchmarks/near_ties.py``). The field's loosest probe
takes 0.15.
"""

SIDES = ("model", "shadow", "oracle")
ERRORS = {
    # error: what it compares, the second is the reference
    "total": ("model", "oracle"),
    "weights": ("shadow", "oracle"),
    "engine": ("model", "shadow"),
}
_TOP = 5
_PART = 2048  # columns whose logits are widened to float64 at a time


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Logits of one side against a reference, per position: tensors of length T.

    ``gap`` is how far the reference puts its own favourite above the side's, relative to the
    favourite's logit; 0 where both agree.
    """

    same: Tensor
    gap: Tensor
    overlap: Tensor  # of the top 5, 0 to 1
    in_order: Tensor  # whether the top 5 are the same in the same order
    kl: Tensor  # nats, reference || side
    probability: Tensor  # that the side gives the reference's favourite
    reference_probability: Tensor
    margin: Tensor  # of the side's favourite over its second, in logits

    def figures(self) -> dict[str, Any]:
        """Return the means over the positions, and the worst gap."""
        return {
            "argmax_same": float(self.same.double().mean()),
            "top5_overlap": float(self.overlap.mean()),
            "top5_in_order": float(self.in_order.double().mean()),
            "kl": float(self.kl.mean()),
            "kl_worst": float(self.kl.max()),
            "p_of_reference_token": float(self.probability.mean()),
            "p_reference": float(self.reference_probability.mean()),
            "margin": float(self.margin.mean()),
            "worst_gap": float(self.gap.max()),
        }


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Three runs' logits summed up: each one's favourites (T,), and every error.

    ``top`` has each side's highest tokens at the last position with their probabilities.
    """

    favourites: Mapping[str, Tensor]
    top: Mapping[str, list[tuple[int, float]]]
    finite: Mapping[str, bool]
    errors: Mapping[str, Comparison]


class Summary:
    """Takes the logits of all sides a range of the vocabulary at a time."""

    def __init__(self, positions: int) -> None:
        def full(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full((*shape, positions), value, dtype=torch.float64)

        self._peak = {side: full(value=-math.inf) for side in SIDES}
        self._mass = {side: full() for side in SIDES}  # sum of exp(logit - peak)
        self._cross = {name: full() for name in ERRORS}  # sum of exp(ref - peak) * (ref - side)
        self._ids = {side: torch.zeros(positions, 0, dtype=torch.int64) for side in SIDES}
        self._values = {side: torch.zeros(positions, 0, len(SIDES), dtype=torch.float64)
                        for side in SIDES}  # fmt: skip
        self._finite = dict.fromkeys(SIDES, True)
        self._seen = 0

    def add(self, logits: Mapping[str, Tensor]) -> None:
        """Take the next columns of every side's logits: (T, C) each, the same C."""
        columns = next(iter(logits.values())).shape[1]
        for start in range(0, columns, _PART):
            self._add({s: t[:, start : start + _PART].double() for s, t in logits.items()})

    def _add(self, logits: Mapping[str, Tensor]) -> None:
        for side, part in logits.items():
            self._finite[side] &= bool(torch.isfinite(part).all())
        for name, (side, reference) in ERRORS.items():
            old, part = self._peak[reference], logits[reference]
            peak = old.maximum(part.max(-1).values)
            terms = (part - peak[:, None]).exp() * (part - logits[side])
            self._cross[name] = self._cross[name] * (old - peak).exp() + terms.sum(-1)
        together = torch.stack([logits[side] for side in SIDES], dim=-1)  # (T, C, sides)
        for number, side in enumerate(SIDES):
            old, part = self._peak[side], logits[side]
            peak = old.maximum(part.max(-1).values)
            self._mass[side] *= (old - peak).exp()
            self._mass[side] += (part - peak[:, None]).exp().sum(-1)
            self._peak[side] = peak
            top = part.topk(min(_TOP, part.shape[1]), dim=-1).indices
            ids = torch.cat([self._ids[side], top + self._seen], dim=1)
            found = together.gather(1, top[..., None].expand(-1, -1, len(SIDES)))
            values = torch.cat([self._values[side], found], dim=1)
            best = values[..., number].topk(min(_TOP, values.shape[1]), dim=-1).indices
            self._ids[side] = ids.gather(1, best)
            self._values[side] = values.gather(1, best[..., None].expand(-1, -1, len(SIDES)))
        self._seen += together.shape[1]

    def result(self) -> Logits:
        """Return what all columns together say."""
        return Logits(
            favourites={side: self._ids[side][:, 0] for side in SIDES},
            top={side: self._top(side) for side in SIDES},
            finite=dict(self._finite),
            errors={name: self._comparison(name) for name in ERRORS},
        )

    def _top(self, side: str) -> list[tuple[int, float]]:
        log_mass = self._peak[side][-1] + self._mass[side][-1].log()
        chances = (self._values[side][-1, :, SIDES.index(side)] - log_mass).exp()
        return list(zip(self._ids[side][-1].tolist(), chances.tolist(), strict=True))

    def _comparison(self, name: str) -> Comparison:
        side, reference = ERRORS[name]
        at = SIDES.index(side), SIDES.index(reference)
        ours, theirs = self._ids[side], self._ids[reference]
        own, favourite = self._values[side], self._values[reference][:, 0]
        log_mass = {s: self._peak[s] + self._mass[s].log() for s in SIDES}
        behind = favourite[:, at[1]] - own[:, 0, at[1]]
        kl = self._cross[name] / self._mass[reference] - log_mass[reference] + log_mass[side]
        return Comparison(
            same=ours[:, 0] == theirs[:, 0],
            gap=behind / favourite[:, at[1]].abs().clamp(min=1e-30),
            overlap=(ours[..., None] == theirs[:, None]).any(-1).double().mean(-1),
            in_order=(ours == theirs).all(-1),
            kl=kl.clamp(min=0),
            probability=(favourite[:, at[0]] - log_mass[side]).exp(),
            reference_probability=(favourite[:, at[1]] - log_mass[reference]).exp(),
            margin=own[:, 0, at[0]] - own[:, min(1, own.shape[1] - 1), at[0]],
        )


@torch.no_grad()
def logit_rows(pair: Pair, finals: Sequence[Finals]) -> list[Row]:
    """Return the logits rung, each test on the prompt where it is worst."""
    if not finals:
        return unavailable(LOGITS, "the run ended before the head")
    rows = []
    for name, stage, judge in (("last", "lm_head", at_last), ("all", "final_norm", at_all)):
        if any(stage not in f.model for f in finals):
            rows += unavailable([name], f"the model's side does not expose {stage}")
            continue
        if any(first_of({stage: f.model[stage]}, len(f.prompt.tokens)) for f in finals):
            rows += unavailable([name], "the model's side shows the last position alone")
            continue
        found = [row_of(name, judge(pair, f), number, pair) for number, f in enumerate(finals)]
        rows.append(max(found, key=lambda row: (SEVERITY.index(row.status),
                                                row.figures["total"]["kl"])))  # fmt: skip
    return rows


def total_rows(sides: Sides, finals: Sequence[Finals]) -> list[Row]:
    """Return the logits rung where there is no shadow: a flip may be the weights' or the engine's.

    Args:
        sides: whose tokenizer shows the highest tokens.
        finals: both sides' whole-model stages.
    """
    last, every = LOGITS
    head = unavailable([every], "without the model's weights there is no head to apply")
    if not finals:
        return unavailable(LOGITS, "the run ended before the head")
    for side in ("model", "oracle"):
        if any("lm_head" not in getattr(f, side) for f in finals):
            return [*unavailable([last], f"the {side}'s side does not expose lm_head"), *head]
    found = [_total_row(last, f, number, sides) for number, f in enumerate(finals)]
    order = ("pass", "near-tie", "unavailable")
    return [max(found, key=lambda row: order.index(row.status)), *head]


def _total_row(name: str, finals: Finals, number: int, sides: Sides) -> Row:
    logits = {s: getattr(finals, s)["lm_head"][None] for s in ("model", "oracle")}
    summed = summarised([{**logits, "shadow": logits["oracle"]}])
    total = summed.errors["total"]
    figures: dict[str, Any] = {"prompt": number, "positions": 1, "total": total.figures()}
    figures["top"] = {side: _top_shown(sides, summed.top[side]) for side in logits}
    tokens, gap = [int(summed.favourites[s][0]) for s in logits], float(total.gap[0])
    said = (
        f"flip: token {tokens[0]} in the model, {tokens[1]} in the oracle; relative gap {gap:.2g}"
    )
    if not all(bool(torch.isfinite(t).all()) for t in logits.values()):
        return Row(name=name, status="unavailable", reason="not all logits are finite")
    if bool(total.same.all()):
        return Row(name=name, status="pass", figures=figures)
    if gap <= NEAR_TIE:
        return Row(name=name, status="near-tie", reason=f"{said}: rounding decides",
                   figures=figures)  # fmt: skip
    reason = f"{said}; without a shadow, the weights or the engine may cause it"
    return Row(name=name, status="unavailable", reason=reason, figures=figures)


SEVERITY = ("pass", "noise", "near-tie", "broken")


def at_last(pair: Pair, finals: Finals) -> Logits:
    """Sum up the captured logits of the last position."""
    return summarised([{s: getattr(finals, s)["lm_head"][None] for s in SIDES}])


def at_all(pair: Pair, finals: Finals) -> Logits:
    """Sum up the logits of all positions, the head applied to every run's final norm."""
    if finals.logits.keys() == set(SIDES):
        return summarised([finals.logits])
    return summarised(heads(pair, {s: getattr(finals, s)["final_norm"] for s in SIDES}))


def summarised(parts: Iterable[Mapping[str, Tensor]]) -> Logits:
    """Sum up logits that come as ranges of the vocabulary."""
    summary: Summary | None = None
    for part in parts:
        summary = summary or Summary(len(part["model"]))
        summary.add(part)
    assert summary is not None  # a vocabulary is never empty
    return summary.result()


def heads(pair: Pair, normed: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield ``normed @ head.T`` of every side a range of the vocabulary at a time."""
    model, oracle = (w.matrix(HEAD) for w in (pair.model_weights, pair.oracle_weights))
    for rows in row_chunks(pair.oracle_facts.vocab):
        ours, theirs = model.part(rows), oracle.part(rows)
        products = [
            partial((theirs if side == "oracle" else ours).times, x) for side, x in normed.items()
        ]
        yield dict(zip(normed, together(products), strict=True))


def row_of(name: str, logits: Logits, number: int, pair: Pair) -> Row:
    """Judge logits: flips that neither rounding nor the weights explain break the rung.

    Args:
        name: of the row.
        logits: summed up.
        number: of the prompt.
        pair: whose tokenizer shows the highest tokens.
    """
    figures: dict[str, Any] = {"prompt": number, "positions": len(logits.favourites["model"])}
    figures |= {error: found.figures() for error, found in logits.errors.items()}
    if figures["positions"] == 1:
        figures["top"] = {side: _top_shown(pair, top) for side, top in logits.top.items()}
    status, reason = verdict_of(logits)
    return Row(name=name, status=status, reason=reason, figures=figures)


def _top_shown(pair: Pair | Sides, top: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
    return [{"id": token, "token": _shown(pair, token), "p": p} for token, p in top]


def _shown(pair: Pair | Sides, token: int) -> str | None:
    """Return a token as text; as the vocabulary has it where it is a part of a character."""
    try:
        text = str(pair.tokenizer.decode([token]))
        broken = "\ufffd" in text
        return str(pair.tokenizer.convert_ids_to_tokens(token)) if broken else text
    except AprtError:
        return None


def verdict_of(logits: Logits) -> tuple[str, str]:
    """Return status and reason."""
    if logits.finite["shadow"] and not logits.finite["model"]:
        return "broken", "are not finite, those of the shadow are"
    engine, total = logits.errors["engine"], logits.errors["total"]
    if not bool(engine.same.all()):
        worst = int(engine.gap.nan_to_num(math.inf).argmax())
        gap, tokens = float(engine.gap[worst]), [int(logits.favourites[s][worst]) for s in SIDES]
        flips = int((~engine.same).sum())
        said = (
            f"flip at position {worst}: token {tokens[0]} in the model, {tokens[1]} in the shadow, "
            f"{tokens[2]} in the oracle"
        )
        further = f"; {flips} of {len(engine.same)} positions flip" if flips > 1 else ""
        if not gap <= NEAR_TIE:
            return "broken", f"{said}; relative gap {gap:.3g}, a near-tie is {NEAR_TIE:g}{further}"
        return "near-tie", f"{said}; relative gap {gap:.2g}: rounding decides{further}"
    flips = int((~total.same).sum())
    if flips:
        return "noise", (
            f"{flips} of {len(total.same)} positions flip against the oracle, all of them in the "
            "shadow too: the quantised weights cause it"
        )
    return "pass", ""
