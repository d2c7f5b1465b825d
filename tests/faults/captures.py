"""Broken captures: the engine is right and what it hands over is not. No verdict may come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import checked, verdict_of

from pytest_aprt.pair import Pair
from pytest_aprt.testing import NumpyEngine
from pytest_aprt.verdict import Verdict

Layers = list[tuple[int | None, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """What is done to the layers, the self-test that must fail, and words of its reason."""

    change: Callable[[Layers], Iterable[Any]]
    test: str
    says: str


def same_layer_twice(layers: Layers) -> Layers:
    return [*layers[:2], (2, layers[1][1]), *layers[3:]]


def every_layer_the_same(layers: Layers) -> Layers:
    same = {n: v for n, v in layers[1][1].items() if n != "embedding"}
    return [layers[0], *[(i, same) for i in range(1, len(layers) - 1)], layers[-1]]


def changed(layer: int, stage: str, value: Callable[[Any], Any]) -> Callable[[Layers], Layers]:
    def change(layers: Layers) -> Layers:
        stages = layers[layer][1]
        stages[stage] = value(stages.get(stage))
        return layers

    return change


def raises(layers: Layers) -> Iterable[Any]:
    yield layers[0]
    raise RuntimeError("the device is lost")


BROKEN = {
    "same-layer-twice": Broken(change=same_layer_twice, test="layers",
                               says="layers 1 and 2 hold the same bytes"),
    "every-layer-the-same": Broken(change=every_layer_the_same, test="layers",
                                   says="layers 1 and 2 hold the same bytes"),
    "padded": Broken(change=changed(1, "attn_out", lambda v: np.pad(v, ((0, 25), (0, 0)))),
                     test="capture", says="L01-attn_out has shape (32, 256), expected (7, 256)"),
    "another-shape": Broken(change=changed(1, "attn_out", lambda v: v[:, :3]),
                            test="capture", says="L01-attn_out has shape (7, 3)"),
    "out-of-order": Broken(change=lambda layers: [layers[1], layers[0], *layers[2:]],
                           test="capture", says="in order"),
    "layer-too-many": Broken(change=lambda layers: [*layers[:-1], (len(layers) - 1, layers[1][1])],
                             test="capture", says="late or beyond the model"),
    "unknown-stage": Broken(change=changed(0, "attn_outt", lambda v: np.zeros((7, 256))),
                            test="capture", says="'attn_outt' in layer 0, which is unknown"),
    "whole-model-stage-in-a-layer": Broken(change=changed(0, "lm_head", lambda v: np.zeros(1024)),
                                           test="capture", says="has no such stage here"),
    "no-numbers": Broken(change=changed(1, "attn_out", lambda v: ["a"]),
                         test="capture", says="L01-attn_out is no array of numbers"),
    "nothing": Broken(change=lambda layers: [], test="capture", says="nothing could be checked"),
    "raises": Broken(change=raises, test="capture", says="RuntimeError: the device is lost"),
    "no-pairs": Broken(change=lambda layers: [layers[0][1]], test="capture", says="yielded dict"),
}  # fmt: skip


def broken(pair: Pair, name: str) -> Verdict:
    """Run a healthy engine behind a broken capture."""
    engine = NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture)

    class Capture:
        def layers(self, tokens: Sequence[int]) -> Iterable[Any]:
            yield from BROKEN[name].change(list(engine.layers(tokens)))

    return verdict_of(pair, checked(pair, Capture()))
