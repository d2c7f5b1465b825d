"""What every runner yields: the captured stages of one layer at a time.

A run is an iterator of ``LayerStages``: layers 0, 1, ... and at last the whole-model stages, with
``layer`` None. Whoever yields such pairs is an engine; nothing has to know who is on the other
side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pytest_aprt.errors import AprtError, CaptureError, blame
from pytest_aprt.facts import Facts
from pytest_aprt.positions import token_axis
from pytest_aprt.stages import STAGES, StageGraph, point_id
from pytest_aprt.strips import Strips, of_array


class LayerStages(NamedTuple):
    """The captured stages of one layer (None: of the whole model), float32, shapes as STAGES."""

    layer: int | None
    stages: Mapping[str, torch.Tensor]


class Engine(Protocol):
    """Anything that runs the model under test.

    ``layers(tokens)`` yields ``(layer, {stage: array})`` in order, at last ``(None, {...})`` for
    ``final_norm`` and ``lm_head``. Arrays are whatever numpy or torch can read as float32, shaped
    as in STAGES, Q and K rows in Hugging Face order. Stages may be left out; they are then
    reported as missing. A stage may hold the last position alone: 1 for the (first) T. An
    attribute ``arithmetic`` may declare the engine's profile.

    Two further methods are optional; a rung of the ladder is unavailable without them.

    ``decode(tokens, forced)`` runs the prompt ``tokens`` and then, with the KV cache, one step for
    each of the ``forced`` tokens, and yields for each step what ``layers`` yields, of the one new
    token: (1, X) where STAGES says (T, X). ``(None, {"lm_head": ...})``, the logits after that
    token, is enough.

    ``logits(tokens)`` is the production path, the one that users run, with nothing captured: the
    logits of the last token (V,) or of all (T, V). An attribute ``bit_exact`` that is true promises
    the very bits of the traced path. ``variants(tokens)`` may yield ``(name, logits)`` for every
    setting in which that path differs from the traced one, with that setting alone.
    """

    def layers(self, tokens: Sequence[int]) -> Iterable[tuple[int | None, Mapping[str, Any]]]:
        """Run the prompt ``tokens`` and yield the stages of each layer."""


class CheckedEngine:
    """A user's engine behind the checks that make its output a capture.

    Args:
        engine: the engine.
        graph: the points of the model.
        facts: the shapes that its stages must have.
        name: what to call it in messages.

    ``raw`` is the engine itself, which may have more to offer: see ``decode`` and ``logits`` of
    ``Engine``.
    """

    def __init__(self, engine: Engine, graph: StageGraph, facts: Facts, name: str) -> None:
        self._engine, self._graph, self._facts, self._name = engine, graph, facts, name
        self.raw = engine
        self.arithmetic: str | None = getattr(engine, "arithmetic", None)

    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Yield every layer once and in order, empty where the engine has nothing.

        Raises:
            CaptureError: the engine is no engine, yields layers out of order, an unknown stage,
                or an array of another shape.
        """
        wanted = iter([*range(self._graph.n_layers), None])
        current = next(wanted)
        for layer, stages in self._pairs(tokens):
            while current != layer:
                if current is None:
                    raise CaptureError(
                        f"{self._name} yielded layer {layer!r} late or beyond the model: expected "
                        f"layers 0 .. {self._graph.n_layers - 1} in order, then None"
                    )
                yield LayerStages(current, {})
                current = next(wanted)
            yield LayerStages(layer, self._checked(layer, stages, len(tokens)))
            try:
                current = next(wanted)
            except StopIteration:
                return
        yield LayerStages(current, {})
        for rest in wanted:
            yield LayerStages(rest, {})

    def _pairs(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
        layers = getattr(self._engine, "layers", None)
        if not callable(layers):
            raise CaptureError(
                f"{self._name} is no engine: expected an object with layers(tokens) that yields "
                f"(layer, {{stage: array}}), found {type(self._engine).__name__}"
            )
        for item in self._guarded(layers, tokens):
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)):
                raise CaptureError(
                    f"{self._name} yielded {type(item).__name__}: expected "
                    "(layer, {stage: array})"
                )
            yield item

    def _guarded(self, layers: Callable[..., Any], tokens: Sequence[int]) -> Iterator[Any]:
        try:
            yield from layers(list(tokens))
        except AprtError:
            raise
        except Exception as error:
            raise CaptureError(f"{self._name} raised {blame(error)}") from error

    def _checked(
        self, layer: int | None, stages: Mapping[str, Any], tokens: int
    ) -> dict[str, torch.Tensor]:
        known = {stage.name: stage for stage in self._graph.of_layer(layer)}
        sizes = self._facts.sizes(tokens)
        checked: dict[str, torch.Tensor] = {}
        for name, value in stages.items():
            if name not in known:
                reason = "has no such stage here" if name in STAGES else "is unknown"
                raise CaptureError(
                    f"{self._name} yielded stage {name!r} in layer {layer}, which {reason}: "
                    f"expected some of {', '.join(known)}"
                )
            if isinstance(value, Strips):
                checked[name] = value
                continue
            try:
                tensor = torch.as_tensor(value).detach().to("cpu", torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CaptureError(
                    f"{self._name}: {point_id(layer, name)} is no array of numbers ({error})"
                ) from error
            shape = tuple(sizes[symbol] for symbol in known[name].shape)
            axis = token_axis(name)
            if axis is not None and tensor.numel() * tokens == math.prod(shape):
                shape = (*shape[:axis], 1, *shape[axis + 1 :])  # of the last position alone
            if tensor.numel() != math.prod(shape):
                raise CaptureError(
                    f"{self._name}: {point_id(layer, name)} has shape {tuple(tensor.shape)}, "
                    f"expected {shape} for {tokens} tokens ({', '.join(known[name].shape)})"
                )
            tensor = tensor.reshape(shape)
            if not isinstance(value, np.memmap):  # an engine may use its memory again
                tensor = tensor.clone()
            checked[name] = of_array(tensor) if tensor.ndim == 3 else tensor
        return checked
