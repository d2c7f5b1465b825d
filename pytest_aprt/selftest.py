"""The capture's self-test: the first suspect is the instrument.

Each check is one line of ``SELF_TESTS``. A check that fails makes the run inconclusive and says
why; a check that had nothing to look at fails too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_aprt.arithmetic import STORAGE
from pytest_aprt.capture import LayerStages
from pytest_aprt.compare import judge, measure
from pytest_aprt.replay import Reference
from pytest_aprt.stages import Point
from pytest_aprt.statuses import SELF_TESTS
from pytest_aprt.strips import Strips, longest_whole
from pytest_aprt.views import View

if TYPE_CHECKING:
    from pytest_aprt.oracle import TransformersRunner
    from pytest_aprt.readings import PointErrors


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str


class Checks:
    """Collects what the checks see while the runs go by.

    Args:
        vocabulary: how many tokens there are.
        names: the checks that this run can make.
    """

    TOLERANCE = STORAGE["float32"]  # transformers computes in it, whatever the engine does

    def __init__(self, vocabulary: int, names: Sequence[str] = tuple(SELF_TESTS)) -> None:
        self._vocabulary, self._names = vocabulary, names
        self._failures: dict[str, str] = {}
        self._seen: dict[str, int] = dict.fromkeys(SELF_TESTS, 0)
        self._worst_replay: tuple[float, Point] | None = None
        self._layers: dict[tuple[int, bytes], int] = {}

    def fail(self, name: str, reason: str) -> None:
        """Record that a check failed; the first reason stays."""
        self._failures.setdefault(name, reason)

    def tokens(self, tokens: Sequence[int]) -> None:
        """Both sides are handed these very ids; they must be in the vocabulary."""
        self._seen["tokens"] += len(tokens)
        count = self._vocabulary
        beyond = [token for token in tokens if not 0 <= token < count]
        if beyond:
            self.fail("tokens", f"token id {beyond[0]} is outside the vocabulary of {count}")

    def layer(self, prompt: int, captured: LayerStages) -> None:
        """No layer of a prompt may equal another in every stage."""
        self._seen["capture"] += len(captured.stages)
        # A single token's probabilities are all 1 in every layer; and what became NaN stays so.
        told = {n: _told(x) for n, x in sorted(captured.stages.items()) if n != "attn_softmax"}
        finite = {n: x for n, x in told.items() if bool(torch.isfinite(x).any())}
        if captured.layer is None or not told:
            return
        self._seen["layers"] += 1
        if not finite:
            return
        digest = hashlib.sha256()
        for name, tensor in finite.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        twin = self._layers.setdefault((prompt, digest.digest()), captured.layer)
        if twin != captured.layer:
            self.fail("layers", f"layers {twin} and {captured.layer} hold the same bytes in every "
                      "stage: one capture was written twice, or the layer did not run")  # fmt: skip

    def oracle_layer(self, oracle: TransformersRunner, tokens: Sequence[int]) -> None:
        """Run the oracle's first layer again, observed and unobserved.

        As much of the prompt is run as needs no strips.
        """
        prelude = oracle.prelude(tokens[: longest_whole(oracle.config.num_attention_heads)])
        first: dict[str, Tensor] = {}
        again: dict[str, Tensor] = {}
        oracle.run_layer(0, prelude.hidden, prelude, first)
        oracle.run_layer(0, prelude.hidden, prelude, again)
        unobserved = oracle.run_layer(0, prelude.hidden, prelude, None)[0]
        self._seen["repeat"] += len(first)
        self._seen["hooks"] += 1
        for name, value in first.items():
            if not torch.equal(value, again[name]):
                self.fail(
                    "repeat", f"L00-{name} of the oracle differs between two runs of one input"
                )
        if not torch.equal(unobserved, first["post_ffn_residual"]):
            self.fail("hooks", "L00-post_ffn_residual of the oracle differs when it is observed")

    def replay(self, point: Point, shadow: Tensor, reference: Reference, view: View) -> None:
        """Judge transformers' own stage on the model's weights by the replay."""
        worst = judge(shadow, reference, view, self.TOLERANCE)
        if worst is None:
            return
        self._seen["replay"] += 1
        if self._worst_replay is None or worst.excess > self._worst_replay[0]:
            self._worst_replay = (worst.excess, point)
        if worst.excess > 1:
            self.fail("replay", f"{point} of transformers is {worst.rel_l2:.1e} from its replay "
                      f"(tolerance {worst.tolerance:.1e}): this model computes something that the "
                      "table of architectures does not say")  # fmt: skip

    def oracle_engine(self, errors: Sequence[PointErrors]) -> None:
        """Judge the oracle's engine by its own replay: a difference may be its fault."""
        judged = [e for e in errors if e.worst is not None]
        self._seen["replay"] += len(judged)
        wrong = next((e for e in judged if e.worst and e.worst.excess > 1), None)
        if wrong is not None and wrong.worst is not None:
            self.fail("replay", f"{wrong.point} of the oracle's engine is {wrong.worst.rel_l2:.1e} "
                      f"from its replay (tolerance {wrong.worst.tolerance:.1e}): that engine "
                      "has an error of its own; run it as the model to see all")  # fmt: skip

    def canary(self, point: Point, value: Tensor, view: View) -> None:
        """Turn the sign of the largest value in a copy: the comparison must find that element."""
        if self._seen["canary"]:
            return
        if isinstance(value, Strips):
            queries = value.ranges()[-1]
            value, view = value.rows(queries), view.part(queries)
        if not bool(torch.isfinite(value).all()) or not bool(value.any()):
            return
        self._seen["canary"] += 1
        sizes, counted = value.abs(), view.counted(view(value).shape)
        place = int((sizes if counted is None else sizes * counted.reshape(value.shape)).argmax())
        changed = value.clone()
        changed.view(-1)[place] *= -1
        places = torch.unravel_index(torch.tensor(place), view(value).shape)
        expected = {a: view.place(a, int(i)) for a, i in zip(view.stage.axes, places, strict=True)}
        found = measure(changed, value, view).max_abs_at
        original = Reference(value, lambda: torch.zeros_like(value))
        worst = judge(changed, original, view, self.TOLERANCE)
        if worst is None or worst.excess <= 1 or found != expected:
            self.fail(
                "canary", f"a changed element of {point} was not found: the comparison is blind"
            )

    def results(self) -> list[SelfTest]:
        """Return the outcome of every check that the run can make, in the order of SELF_TESTS."""
        return [
            SelfTest(name=name, passed=not self._reason(name), detail=self._reason(name) or what)
            for name, what in self._details().items()
            if name in self._names
        ]

    def _reason(self, name: str) -> str:
        if name in self._failures:
            return self._failures[name]
        return "" if self._seen[name] else f"nothing could be checked ({SELF_TESTS[name]})"

    def _details(self) -> dict[str, str]:
        seen = self._seen
        details = {
            **SELF_TESTS,
            "tokens": f"{SELF_TESTS['tokens']}: {seen['tokens']} ids",
            "capture": f"{SELF_TESTS['capture']}: {seen['capture']} stages",
        }
        if self._worst_replay:
            excess, point = self._worst_replay
            error = excess * self.TOLERANCE.base
            details["replay"] += f": {seen['replay']} points, worst {point} at {error:.0e}"
        return details


def _told(tensor: Tensor) -> Tensor:
    """Return what tells a stage from another layer's: two are equal nowhere, or everywhere."""
    return tensor.rows(tensor.ranges()[-1]) if isinstance(tensor, Strips) else tensor


def failed(tests: Sequence[SelfTest], name: str, reason: str) -> list[SelfTest]:
    """Return the outcomes with the check ``name`` failed, unless it had failed before."""
    return [
        SelfTest(name=name, passed=False, detail=reason) if t.name == name and t.passed else t
        for t in tests
    ]
