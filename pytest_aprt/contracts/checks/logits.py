"""Checks on the logits of the last token, from the captures of both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.contracts.checks.points import plain
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject


class Flip(NamedTuple):
    """Two sides' first tokens, and how far apart the reference's own logits hold them."""

    model: int
    oracle: int
    margin: float
    finite: bool

    @property
    def is_flip(self) -> bool:
        """Whether the two differ."""
        return self.model != self.oracle

    def tied(self, margin: float) -> bool:
        """Whether the reference holds both tokens closer than ``margin``."""
        return self.finite and self.margin < margin


def flip(model: NDArray[np.float32], oracle: NDArray[np.float32]) -> Flip:
    """Compare the first tokens of two (V,) logits."""
    a, b = int(np.argmax(model)), int(np.argmax(oracle))
    finite = bool(np.isfinite(model).all() and np.isfinite(oracle).all())
    return Flip(a, b, float(oracle[b] - oracle[a]), finite)


def _flips(subject: Subject) -> Iterator[Flip]:
    for prompt in range(len(subject.report["run"]["prompts"])):
        model, oracle = subject.captures("model", prompt), subject.captures("oracle", prompt)
        if "lm_head" not in model:
            raise BlockedError("the model shows nothing of lm_head")
        yield flip(model["lm_head"], oracle["lm_head"])


def argmax_parity(subject: Subject, *, near_tie: float) -> Finding:
    """Require the same first token on every prompt."""
    found = list(_flips(subject))
    bad = [
        (i, f) for i, f in enumerate(found) if not f.finite or (f.is_flip and not f.tied(near_tie))
    ]
    detail = f"the same token on {sum(not f.is_flip for f in found)} of {len(found)} prompts"
    for prompt, f in bad[:3]:
        detail += _said(prompt, f)
    values = {"prompts": len(found), "flips": sum(f.is_flip for f in found)}
    return Finding(held=not bad, detail=detail, values=values)


def near_tie(subject: Subject, *, margin: float) -> Finding:
    """Require that every flip is between tokens that the oracle holds close."""
    found = list(_flips(subject))
    flips = [(i, f) for i, f in enumerate(found) if f.is_flip or not f.finite]
    bad = [(i, f) for i, f in flips if not f.tied(margin)]
    detail = f"{len(flips)} of {len(found)} prompts flip, {len(bad)} beyond a margin of {margin:g}"
    for prompt, f in bad[:3]:
        detail += _said(prompt, f)
    largest = max((f.margin for _, f in flips), default=0.0)
    values = {"prompts": len(found), "flips": len(flips), "largest_margin": plain(largest)}
    return Finding(held=not bad, detail=detail, values=values)


def _said(prompt: int, f: Flip) -> str:
    if not f.finite:
        return f"; prompt {prompt}: logits are not finite"
    return f"; prompt {prompt}: {f.model} instead of {f.oracle}, {f.margin:.4g} apart"
