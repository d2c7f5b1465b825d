"""Ratios of a statistic of the model's stages to that of the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pytest_aprt.contracts.checks.points import chosen, plain
from pytest_aprt.contracts.checks.settings import Layers
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject

STATISTICS: dict[str, Callable[[Any], Any]] = {
    "std": np.std,
    "rms": lambda x: np.sqrt(np.mean(x * x)),
    "max_abs": lambda x: np.max(np.abs(x)),
}


def stage_ratio(
    subject: Subject,
    *,
    stages: list[str] | None,
    layers: Layers | None,
    statistic: str,
    within: tuple[float, float],
) -> Finding:
    """Bound the ratio at every chosen point that is shown, on every prompt, in float64."""
    report, of = subject.report, STATISTICS[statistic]
    ratios: list[tuple[float, str, int]] = []
    for prompt in range(len(report["run"]["prompts"])):
        model, oracle = subject.captures("model", prompt), subject.captures("oracle", prompt)
        for point in chosen(report, stages, layers):
            name = point["point"]
            if name not in model or name not in oracle:
                if stages is None and point["status"] == "missing":
                    continue
                raise BlockedError(f"the model shows nothing of {name}")
            a, b = model[name].astype(np.float64), oracle[name].astype(np.float64)
            if point["stage"] == "attn_scores":  # engines fill the masked half as they like
                seen = np.tril(np.ones(a.shape[-2:], bool))
                a, b = a[..., seen], b[..., seen]
            with np.errstate(all="ignore"):
                ratios.append((float(of(a) / of(b)), name, prompt))
    if not ratios:
        raise BlockedError("the model shows nothing of the chosen layers")
    low, high = within
    broken = [r for r in ratios if not low <= r[0] <= high]
    with np.errstate(all="ignore"):
        worst = max(broken or ratios, key=lambda r: abs(float(np.log(r[0]))) if r[0] > 0 else 1e9)
    detail = (
        f"{statistic} of the model over the oracle's is {worst[0]:.6g} at {worst[1]} "
        f"(prompt {worst[2]}), expected {low:g} to {high:g}; {len(broken)} of {len(ratios)} "
        "values break the bound"
    )
    values = {"worst": plain(worst[0]), "point": worst[1], "values": len(ratios),
              "broken": len(broken)}  # fmt: skip
    return Finding(held=not broken, detail=detail, values=values)
