"""What can become of a point and of a run, and the self-tests. Data only: results load no torch."""

from __future__ import annotations

STATUSES = {
    # status: outcome of its test
    "missing": "skipped",
    "inconclusive": "skipped",
    "diverged": "failed",
    "inherited": "xfailed",
    "drift": "passed",
    "noise": "passed",
    "pass": "passed",
}

VERDICTS = {
    # verdict: whether the gate lets it pass
    "PARITY": True,
    "QUANTISATION_NOISE": True,
    "DIVERGED": False,
    "INCONCLUSIVE": False,
}

SELF_TESTS = {
    # name: what it makes sure of
    "tokens": "both sides are given the same token ids",
    "capture": "counts, shapes and layers are those of the architecture",
    "layers": "no two layers of the model's capture are identical",
    "repeat": "an oracle layer run twice gives the same bits",
    "hooks": "capture changes no bit of the oracle",
    "replay": "the replay reproduces the oracle's own stages",
    "canary": "one changed value in the model's capture is found, and where it is",
}
OF_TOTALS = ("tokens", "capture", "layers", "canary")
OF_LIVE_ORACLE = ("repeat", "hooks")
OF_ENGINES = ("replay",)
"""The self-tests of a run in which `total` alone is measured; those that run transformers as the
oracle; and those of an oracle that is an engine itself."""
