"""Parity after every one of several greedy steps, each teacher-forced by the reference's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.contracts.checks.logits import flip
from pytest_aprt.contracts.checks.points import plain
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject


def multi_step_parity(
    subject: Subject, *, steps: int, at_least: float, against: str, near_tie: float
) -> Finding:
    """Extend every prompt by the reference's own tokens; compare the logits at each length.

    The model runs the whole extended prompt at every step, without a cache.
    """
    from pytest_aprt.matrices import compute_threads
    from pytest_aprt.oracle import TransformersRunner

    pair, engine, prompts = subject.model.opened
    if subject.report["model"]["kind"] == "dump":
        raise BlockedError("a dump holds one prompt and cannot be run on longer ones")
    weights = pair.oracle_weights if against == "oracle" else pair.model_weights
    reference = TransformersRunner(pair.config, weights)
    cosines: list[float] = []
    flips: list[str] = []
    with compute_threads():
        for index, prompt in enumerate(prompts):
            tokens = list(prompt.tokens)
            for step in range(steps):
                if len(tokens) > pair.oracle_facts.context:
                    raise BlockedError(f"prompt {index} is too long for {steps} steps")
                truth, found = _head(reference, tokens), _head(engine, tokens)
                cosines.append(_cosine(found, truth))
                f = flip(found, truth)
                if f.is_flip and not f.tied(near_tie):
                    flips.append(f"prompt {index} step {step}: {f.model} instead of {f.oracle}")
                tokens.append(f.oracle)
    worst = int(np.argmin(cosines))
    broken = sum(1 for c in cosines if not c >= at_least)
    detail = (
        f"lowest cosine over {steps} steps is {cosines[worst]:.6g} at step {worst % steps} of "
        f"prompt {worst // steps}, expected at least {at_least:g}; {broken} of {len(cosines)} "
        f"steps below, {len(flips)} tokens differ"
    )
    if flips:
        detail += f": {'; '.join(flips[:3])}"
    values = {"cosines": [plain(c) for c in cosines], "flips": len(flips), "steps": steps}
    return Finding(held=not broken and not flips, detail=detail, values=values)


def _head(runner: object, tokens: Sequence[int]) -> NDArray[np.float32]:
    for _, stages in runner.layers(tokens):  # type: ignore[attr-defined]
        if "lm_head" in stages:
            logits: NDArray[np.float32] = stages["lm_head"].numpy()
            return logits
    raise BlockedError("the model shows nothing of lm_head")


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else float("nan")
