"""llama.cpp, live: every stage of a GGUF's forward pass from the engine that its users run.

The engine runs in a process of its own (``llamacpp_process``); here its tensors are brought to
the shapes and the order of the table of stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pytest_aprt.architectures import Architecture
from pytest_aprt.engines import require
from pytest_aprt.errors import EngineError, SettingsError
from pytest_aprt.facts import Facts
from pytest_aprt.process import Child

Array = NDArray[np.float32]

EXACT: dict[str, int | float] = {
    # field of llama.cpp's parameters: value under which every stage can be seen and compared
    "use_extra_bufts": False,  # no repacking: repacked weights are multiplied otherwise
    "n_threads": 1,
    "n_threads_batch": 1,
    "flash_attn_type": 0,  # flash attention has no scores and no softmax
    "type_k": 0,  # float32 cache
    "type_v": 0,
}
"""Parameters that differ from llama.cpp's defaults, unless an option says otherwise. On the
production path they are as llama.cpp has them."""

CHANGES = {
    # what the production path does otherwise: the parameters of EXACT that are left to llama.cpp
    "weight repacking": ("use_extra_bufts",),
    "several threads": ("n_threads", "n_threads_batch"),
    "flash attention": ("flash_attn_type",),
    "float16 cache": ("type_k", "type_v"),
}

_QUIET = {"GGML_NO_BACKTRACE": "1"}  # else ggml starts a debugger to print where it was
_BY_HEAD = ("q_post_rope", "k_post_rope")  # (tokens, heads, channels)
_CACHES = {0: "float32", 1: "float16", 30: "bfloat16"}  # ggml_type: the profile's name


class LlamaCpp:
    """Runs a GGUF in llama.cpp, in a process of its own for every prompt.

    Args:
        path: the GGUF (the first part of a split one).
        facts: of the GGUF.
        architecture: of the GGUF.
        options: fields of llama.cpp's model and context parameters that are to differ from
            ``EXACT``, as text or as numbers.

    Raises:
        SettingsError: llama-cpp-python is missing, or an option's value is no number.
    """

    def __init__(
        self,
        path: Path,
        facts: Facts,
        architecture: Architecture,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require("llama.cpp")
        self._path, self._facts, self._architecture = path, facts, architecture
        self._given = {name: _value(name, value) for name, value in (options or {}).items()}
        self.parameters = {**EXACT, **self._given}
        self.details: dict[str, Any] = dict(self.parameters)

    @property
    def arithmetic(self) -> str | None:
        """8-bit inputs of quantised matmuls; None where a parameter changes more than is known.

        A quantised cache does: llama.cpp rotates the keys before it rounds them.
        """
        p = self.parameters
        cache = _CACHES.get(int(p["type_k"])) if p["type_k"] == p["type_v"] else None
        if p["flash_attn_type"] and cache in ("float32", "float16"):
            cache = "flash"  # which makes a float32 cache one of float16
        elif p["flash_attn_type"]:
            return None
        if cache is None:
            return None
        return "q8" if cache == "float32" else f"q8,cache={cache}"

    def layers(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, dict[str, Array]]]:
        """Yield every stage that llama.cpp computes; ``ffn_silu`` is fused and stays missing.

        Raises:
            EngineError: llama.cpp does not load the file, fails, or ends before the last layer.
        """
        for _, layers in groupby(self._stages([tokens]), lambda item: item[0]):
            yield from ((layer, stages) for _, layer, stages in layers)

    def decode(
        self, tokens: Sequence[int], forced: Sequence[int]
    ) -> Iterator[list[tuple[int | None, dict[str, Array]]]]:
        """Yield the stages of each forced token, decoded one by one after the prompt."""
        batches = [tokens, *([token] for token in forced)]
        for batch, layers in groupby(self._stages(batches), lambda item: item[0]):
            found = [(layer, stages) for _, layer, stages in layers]
            if batch:
                yield found

    def logits(self, tokens: Sequence[int]) -> Array:
        """Return the logits (V,) of the last token on the production path."""
        return self._unobserved(tokens, self._given)

    def variants(self, tokens: Sequence[int]) -> Iterator[tuple[str, Array]]:
        """Yield each way in which production differs, and the logits (V,) with it alone."""
        for change, names in CHANGES.items():
            if self._given.keys().isdisjoint(names):
                kept = {name: value for name, value in EXACT.items() if name not in names}
                yield change, self._unobserved(tokens, {**kept, **self._given})

    def _unobserved(self, tokens: Sequence[int], parameters: Mapping[str, int | float]) -> Array:
        frames = self._frames([tokens], parameters, observe=False)
        *_, logits = (values for _, values in frames)
        return logits

    def _stages(
        self, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, int | None, dict[str, Array]]]:
        """Yield batch, layer and stages; raises EngineError where layers are out of order."""
        lengths = [len(batch) for batch in batches]
        current: tuple[int, int | None] = (0, 0)
        stages: dict[str, list[Array | None]] = {}
        for about, values in self._frames(batches, self.parameters, observe=True):
            if "stage" not in about:
                continue
            place = about["batch"], about["layer"]
            if place != current:
                if not _follows(current, place):
                    raise EngineError(
                        f"llama.cpp computed {about['stage']} of layer {place[1]} after that of "
                        f"layer {current[1]}: expected one layer after the other"
                    )
                yield *current, self._assembled(stages)
                current, stages = place, {}
            batch = about["batch"]
            self._take(stages, about, values, lengths[batch], sum(lengths[: batch + 1]))
        yield *current, self._assembled(stages)

    def _frames(
        self,
        batches: Sequence[Sequence[int]],
        parameters: Mapping[str, int | float],
        *,
        observe: bool,
    ) -> Iterator[tuple[dict[str, Any], Array]]:
        request = {
            "model": str(self._path),
            "parameters": parameters,
            "batches": [list(map(int, tokens)) for tokens in batches],
            "observe": observe,
        }
        module = "pytest_aprt.engines.llamacpp_process"
        with Child("llama.cpp", module, json.dumps(request), _QUIET) as child:
            while True:
                about = json.loads(child.line())
                if "error" in about:
                    raise EngineError(f"llama.cpp: {about['error']}")
                if "end" in about:
                    self.details |= about["about"]
                    return
                count = math.prod(about["shape"])
                values = np.frombuffer(child.bytes(4 * count), "<f4").reshape(about["shape"])
                yield about, values

    def _take(
        self,
        stages: dict[str, list[Array | None]],
        about: dict[str, Any],
        x: Array,
        tokens: int,
        keys: int,
    ) -> None:
        """Put a tensor of llama.cpp where it belongs, in our layout."""
        name, part = about["stage"], about["part"]
        if name in ("attn_scores", "attn_softmax"):
            x = x[0, :, :, :keys]  # (heads, tokens, keys); the cache is padded
        elif name != "lm_head":
            x = x[0] if name in _BY_HEAD else x[0, 0]
            x = x.reshape(len(x), -1)
            if len(x) != tokens:
                raise EngineError(
                    f"llama.cpp computed {name} for {len(x)} of {tokens} tokens at once: the "
                    "parameters n_batch and n_ubatch must hold the whole prompt"
                )
        if self._architecture.permuted_qk and (part in (0, 1) or name.endswith("_post_rope")):
            x = self._in_hf_order(x)
        parts = stages.setdefault(name, [None] * (1 if part is None else 3))
        parts[part or 0] = x
        if "scale" in about and (scores := stages.get("attn_scores")) and scores[0] is not None:
            stages["attn_scores"] = [scores[0] * np.float32(about["scale"])]

    def _in_hf_order(self, x: Array) -> Array:
        """Undo the order of Q's and K's rows that GGUF files of the family have."""
        pairs = x.reshape(len(x), -1, self._facts.head_dim // 2, 2)
        return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(len(x), -1)

    def _assembled(self, stages: Mapping[str, list[Array | None]]) -> dict[str, Array]:
        """Return the stages of which every part was seen; without the scale, no scores."""
        whole = {}
        for name, parts in stages.items():
            seen = [part for part in parts if part is not None]
            if len(seen) == len(parts):
                whole[name] = seen[0] if len(seen) == 1 else np.concatenate(seen, axis=-1)
        if "attn_softmax" not in whole:
            whole.pop("attn_scores", None)
        return whole


def _follows(current: tuple[int, int | None], place: tuple[int, int | None]) -> bool:
    """Return whether a layer may be computed after another; None comes after the last."""
    a, b = (math.inf if layer is None else layer for _, layer in (current, place))
    return (current[0], a) < (place[0], b)


_WORDS = {"true": 1, "yes": 1, "on": 1, "false": 0, "no": 0, "off": 0}


def _value(name: str, value: Any) -> int | float:
    """Return what a parameter is set to: a number, or a word that stands for one.

    Raises:
        SettingsError: it is neither.
    """
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]
    text = value.strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    if name in ("type_k", "type_v") and text.upper() in GGMLQuantizationType.__members__:
        return int(GGMLQuantizationType[text.upper()])
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise SettingsError(
        f"llama.cpp's parameter {name} cannot be {value!r}: expected a number, on or off"
        + (", or a type such as f16" if name in ("type_k", "type_v") else "")
    )
