"""Broken captures: the engine is right and what it hands over is not. No verdict may come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import TOKENS, Changed, builtin, checked, quiet, settings_on, verdict_of, written

from pytest_aprt.dump import kept_in
from pytest_aprt.errors import SourceError
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.pair import Pair, open_headers
from pytest_aprt.readings import Prompt
from pytest_aprt.run import run
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


# --- dumps that are not what they should be -------------------------------------------------------


def another_prompts(pair: Pair, folder: Path) -> Path:
    return written(builtin(pair), folder, (*TOKENS[:3], 13, *TOKENS[4:]))


def a_longer_prompts(pair: Pair, folder: Path) -> Path:
    return written(builtin(pair), folder, (*TOKENS, 5, 6))


def of_the_oracle(pair: Pair, folder: Path) -> Path:
    return written(TransformersRunner(pair.config, pair.oracle_weights), folder)


def moved(to: str, source: str) -> Callable[[Pair, Path], Path]:
    """A dump in which one stage holds another's values."""

    def change(layer: int | None, stages: dict[str, Any]) -> dict[str, Any]:
        return stages if layer is None else stages | {to: stages[source]}

    return lambda pair, folder: written(Changed(builtin(pair), change), folder)


def with_stale_files(pair: Pair, folder: Path) -> Path:
    """A dump of ours in which a file of an earlier run lies."""
    prompt = Prompt(text="", tokens=TOKENS)
    keep = kept_in(folder, [prompt], {"model": {}}, lambda side, index, layers: layers)
    for _ in keep("model", 0, checked(pair, builtin(pair)).layers(TOKENS)):
        pass
    stale = written(builtin(pair), folder / "stale", TOKENS[::-1]) / "layer-1" / "ffn_up.bin"
    return stale.replace(folder / "model" / "layer-1" / "ffn_up.bin").parent.parent


@dataclass(frozen=True, kw_only=True)
class BrokenDump:
    """How a dump is written, and words of the reason that must be given."""

    write: Callable[[Pair, Path], Path]
    says: str
    needs_bias: bool = False


BROKEN_DUMPS = {
    "another-prompts-dump": BrokenDump(
        write=another_prompts, says="row 3 of its embedding is that of token 13, the prompt has 12"
    ),
    "a-longer-prompts-dump": BrokenDump(write=a_longer_prompts, says="holds 9 rows"),
    "stale-files": BrokenDump(write=with_stale_files, says="found another file"),
    "swapped-sides": BrokenDump(write=of_the_oracle, says="it is a dump of the oracle"),
    "matmul-after-bias": BrokenDump(
        write=moved("qkv_matmul", "qkv_bias"), says="after the bias", needs_bias=True
    ),
    "bias-before-bias": BrokenDump(
        write=moved("qkv_bias", "qkv_matmul"), says="before the bias", needs_bias=True
    ),
}


def broken_dump(pair: Pair, name: str, folder: Path) -> str:
    """Return what a run on such a dump says, prefixed by INCONCLUSIVE, or the error it gives."""
    settings = settings_on(pair, BROKEN_DUMPS[name].write(pair, folder))
    headers = open_headers(str(settings.weights), settings.oracle)
    try:
        return run(headers, settings, None, quiet)["verdict"]["summary"]
    except SourceError as error:
        return f"error: {error}"
