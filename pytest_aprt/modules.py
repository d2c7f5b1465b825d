"""An engine out of a PyTorch module and a map from the names of its modules to stages.

Nothing here imports torch before an engine runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from pytest_aprt.errors import CaptureError, SettingsError
from pytest_aprt.stages import STAGES, Stage, point_id, stage_named

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYER = "{layer}"
"""What stands for the number of a layer in the name of a module."""

Shows = Union[str, Mapping[str, str]]  # noqa: UP007 - evaluated at run time on Python 3.10
"""The stage that a module puts out, or ``{"input": stage, "output": stage}``, or one of the two."""

_DTYPES = ("float32", "float16", "bfloat16")


def from_module(
    model: nn.Module,
    stages: Mapping[str, Shows],
    *,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    arithmetic: str | None = None,
) -> ModuleEngine:
    """Return an engine that runs a PyTorch module and shows what its parts take in and put out.

    Args:
        model: takes token ids (1, T), int64; it may be on any device.
        stages: names of modules, as ``named_modules`` gives them with ``{layer}`` for the number of
            a layer, and what they show. Several modules that show one stage, such as three
            projections for ``qkv_matmul``, are put side by side in this order.
        forward: runs ``model`` on the ids, if that is not ``model(ids)``.
        arithmetic: the profile in which it computes; by default that of its first parameter.

    Raises:
        SettingsError: there is no such module or stage, or a stage of every layer is shown by a
            module without ``{layer}``, or the other way round.
    """
    modules = dict(model.named_modules())
    taps = [
        tap
        for name, shows in stages.items()
        for side, stage in _shown(name, shows)
        for tap in _taps(name, side, stage, modules)
    ]
    return ModuleEngine(model, modules, taps, forward, arithmetic)


class _Tap(NamedTuple):
    module: str
    side: str  # input or output
    layer: int | None
    stage: str


class ModuleEngine:
    """An engine of one's own: see ``from_module``."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        taps: Sequence[_Tap],
        forward: Callable[[nn.Module, Tensor], Any] | None,
        arithmetic: str | None,
    ) -> None:
        self._model, self._modules, self._taps, self._forward = model, modules, taps, forward
        dtype = next((str(p.dtype) for p in model.parameters()), "").removeprefix("torch.")
        self.arithmetic = arithmetic or (dtype if dtype in _DTYPES else None)

    def layers(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        """Run the module once and yield what was seen, layer after layer.

        Raises:
            CaptureError: a module did not run, ran twice, or handed on something else than a
                tensor.
        """
        import torch

        seen: dict[_Tap, Tensor] = {}
        handles = [
            self._modules[tap.module].register_forward_hook(_keeper(tap, seen), with_kwargs=True)
            for tap in self._taps
        ]
        try:
            device = next((p.device for p in self._model.parameters()), None)
            ids = torch.tensor([list(tokens)], device=device)
            with torch.no_grad():
                self._forward(self._model, ids) if self._forward else self._model(ids)
        finally:
            for handle in handles:
                handle.remove()
        for tap in self._taps:
            if tap not in seen:
                raise CaptureError(
                    f"module {tap.module} did not run, so that {point_id(tap.layer, tap.stage)} "
                    "was not seen: expected each module of the map to run once in a forward pass"
                )
        numbers = sorted({tap.layer for tap in self._taps if tap.layer is not None})
        for layer in [*numbers, None]:
            parts: dict[str, list[Tensor]] = {}
            for tap in self._taps:
                if tap.layer == layer:
                    parts.setdefault(tap.stage, []).append(seen[tap])
            yield layer, {stage: torch.cat(found, dim=-1) for stage, found in parts.items()}


def _keeper(tap: _Tap, seen: dict[_Tap, Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], given: Any, output: Any) -> None:
        import torch

        if tap in seen:
            raise CaptureError(
                f"module {tap.module} ran twice in one forward pass: expected once, with all tokens"
            )
        value = next(iter([*inputs, *given.values()]), None) if tap.side == "input" else output
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"the {tap.side} of module {tap.module} is {type(value).__name__}: expected a "
                f"tensor, for {point_id(tap.layer, tap.stage)}"
            )
        value = value.detach()
        if STAGES[tap.stage].last_token and value.dim() > 1:
            value = value[..., -1, :]
        seen[tap] = value.to("cpu", torch.float32, copy=True)

    return keep


def _shown(name: str, shows: Shows) -> Iterator[tuple[str, Stage]]:
    """Yield which side of a module shows which stage."""
    if isinstance(shows, str):
        shows = {"output": shows}
    for side, stage in shows.items():
        if side not in ("input", "output"):
            raise SettingsError(
                f"from_module: {name} has no {side!r}: expected input or output, each with a stage"
            )
        yield side, stage_named(stage)


def _taps(name: str, side: str, stage: Stage, modules: Mapping[str, nn.Module]) -> Iterator[_Tap]:
    of_layers = stage.per_layer and not stage.first_layer_only
    if (LAYER in name) != of_layers:
        wrong = (
            f"expected {LAYER} in the name, as in model.layers.{LAYER}.mlp, since every layer has "
            if of_layers
            else f"expected a name without {LAYER}, since the model has but one "
        )
        raise SettingsError(f"from_module: {name} shows {stage.name}: {wrong}{stage.name}")
    if not of_layers:
        layer = 0 if stage.first_layer_only else None
        yield _Tap(_found(name, modules), side, layer, stage.name)
        return
    _found(name.replace(LAYER, "0"), modules)
    layer = 0
    while name.replace(LAYER, str(layer)) in modules:
        yield _Tap(name.replace(LAYER, str(layer)), side, layer, stage.name)
        layer += 1


def _found(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.0)
        raise SettingsError(
            f"from_module: the model has no module {name}: expected a name that named_modules "
            f"gives, such as {', '.join(filter(None, near))}"
        )
    return name
