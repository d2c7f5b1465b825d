"""transformers, live: a model that is loaded whole and run as its users load and run it.

Hooks show what its modules compute, one decoder layer after the other: the forward pass is
suspended while a layer is looked at, so that no more than one is kept. Nothing is computed for the
sake of showing it; what is not computed apart stays missing.
"""

from __future__ import annotations

import contextvars
import importlib.util
import io
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytest_aprt.capture import LayerStages
from pytest_aprt.checkpoints import Checkpoint, GgufCheckpoint
from pytest_aprt.engines.devices import require_device
from pytest_aprt.errors import EngineError, SettingsError
from pytest_aprt.taps import attribute, eager_attention, put_rotated, tapped

EAGER = "aprt_observed"
"""Name under which the observed eager attention is registered with transformers."""

_PROFILES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Transformers:
    """Runs a GGUF or a Hugging Face model by ``from_pretrained``.

    The traced path has eager attention, which computes scores and probabilities apart; the
    production path has what transformers chooses. An option ``attn_implementation`` is for both.

    Args:
        checkpoint: the model's files.
        options: further arguments of ``from_pretrained``, as text; JSON where it is some.
        device: where it runs, as torch names it.

    Raises:
        SettingsError: there is no such device, or what loads a GGUF is not installed.
        EngineError: transformers does not load the model.
    """

    def __init__(
        self, checkpoint: Checkpoint, options: Mapping[str, str], device: str = "cpu"
    ) -> None:
        require_device(device)
        self._options = {name: _value(text) for name, text in options.items()}
        self._device = device
        self.model = _loaded(checkpoint, self._options, device)
        self._config, self._base = self.model.config, self.model.model
        self._production = str(self._config._attn_implementation)
        self._traced = self._production if "attn_implementation" in self._options else "eager"
        self.details: dict[str, Any] = {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "traced attention": self._traced,
            "production attention": self._production,
            **{name: str(value) for name, value in self._options.items()},
        }

    @property
    def arithmetic(self) -> str | None:
        """The profile of the dtype in which the model computes; None for any other."""
        declared = _PROFILES.get(self.model.dtype)
        uses_tf32 = self.model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return "tf32" if declared == "float32" and uses_tf32 else declared

    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Run the prompt as a generation begins and yield every stage that is computed.

        Raises:
            EngineError: transformers fails.
        """
        yield from self._observed(partial(self._forward, tokens))

    def decode(self, tokens: Sequence[int], forced: Sequence[int]) -> Iterator[list[LayerStages]]:
        """Yield the stages of each forced token, which follow the prompt through the KV cache."""
        cache = None
        for batch in (tokens, *([token] for token in forced)):
            outputs: list[Any] = []
            layers = list(self._observed(partial(self._forward, batch, outputs, cache)))
            cache = outputs[0].past_key_values
            if batch is not tokens:
                yield layers

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits (V,) of the first token that ``generate`` chooses by."""
        ids = self._ids(tokens)
        with torch.no_grad(), self._guarded():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        logits: Tensor = found.logits[0][0].float().cpu()
        return logits

    def variants(self, tokens: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Yield each way in which generation differs, and the logits (V,) with it alone."""
        changes: dict[str, tuple[str, dict[str, Any]]] = {
            "the head on the last position alone": (self._traced, {"logits_to_keep": 1})
        }
        if self._production != self._traced:
            changes[f"{self._production} attention"] = (self._production, {})
        for change, (attention, arguments) in changes.items():
            with attribute(self._config, "_attn_implementation", attention):
                yield change, self._forward(tokens, **arguments).logits[0, -1].float().cpu()

    def _forward(
        self,
        tokens: Sequence[int],
        outputs: list[Any] | None = None,
        cache: Any = None,
        **arguments: Any,
    ) -> Any:
        with torch.no_grad(), self._guarded():
            found = self.model(
                input_ids=self._ids(tokens), past_key_values=cache, use_cache=True, **arguments
            )
        if outputs is not None:
            outputs.append(found)
        return found

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._base.embed_tokens.weight.device)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except GreenletExit:
            raise
        except Exception as error:
            raise EngineError(f"transformers failed on {self._device}: {_told(error)}") from error

    def _observed(self, run: Callable[[], Any]) -> Iterator[LayerStages]:
        """Yield each layer's stages while ``run`` waits in that layer's hook."""
        lane = greenlet(partial(self._hooked, run))
        lane.gr_context = contextvars.copy_context()
        try:
            while True:
                lane.parent = getcurrent()
                with torch.no_grad():  # a state of the thread, which the other side shares
                    captured = lane.switch()
                yield captured
                if captured.layer is None:
                    return
        finally:
            if not lane.dead:
                lane.parent = getcurrent()
                with torch.no_grad():
                    lane.throw(GreenletExit)

    def _hooked(self, run: Callable[[], Any]) -> LayerStages:
        """Run with hooks, hand over every layer, and return the stages of the whole model."""
        whole: dict[str, Tensor] = {}

        def keep(name: str, row: slice | int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                whole[name] = output[0, row]

            return hook

        def hand_over(index: int, stages: dict[str, Tensor]) -> Callable[..., None]:
            def hook(
                module: nn.Module, inputs: tuple[Any, ...], given: Mapping[str, Any], output: Any
            ) -> None:
                if index == 0:
                    entered = inputs[0] if inputs else given["hidden_states"]
                    stages["embedding"] = entered[0]
                stages["post_ffn_residual"] = (output[0] if isinstance(output, tuple) else output)[
                    0
                ]
                captured = LayerStages(index, _on_cpu(stages))
                stages.clear()
                getcurrent().parent.switch(captured)

            return hook

        with ExitStack() as stack:
            for index, layer in enumerate(self._base.layers):
                stages: dict[str, Tensor] = {}
                stack.enter_context(tapped(layer, stages))
                hook = layer.register_forward_hook(hand_over(index, stages), with_kwargs=True)
                stack.callback(hook.remove)
            for module, name, row in (
                (self._base.norm, "final_norm", slice(None)),
                (self.model.get_output_embeddings(), "lm_head", -1),
            ):
                stack.callback(module.register_forward_hook(keep(name, row)).remove)
            stack.enter_context(self._seen_attention())
            run()
        return LayerStages(None, _on_cpu(whole))

    def _seen_attention(self) -> AbstractContextManager[None]:
        """Let the attention that is traced show what goes in and what comes between."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self._traced == "eager":
            AttentionInterface.register(EAGER, _eager)
            # Without a mask of the same name, transformers hands the attention no mask at all.
            AttentionMaskInterface.register(EAGER, eager_mask)
            return attribute(self._config, "_attn_implementation", EAGER)
        return _replaced(ALL_ATTENTION_FUNCTIONS, self._traced)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **given: Any
) -> tuple[Tensor, Tensor]:
    """Run the family's own eager attention and keep what its softmax is handed and returns."""
    function = eager_attention(module)
    stages: dict[str, Tensor] = module.aprt_stages  # type: ignore[assignment]
    put_rotated(stages, query, key)
    with _Softmax() as seen:
        output, probabilities = function(module, query, key, *rest, **given)
    if seen.scores is not None:
        stages["attn_scores"] = seen.scores[0]  # (nq, T, T); the masked half does not count
    stages["attn_softmax"] = probabilities[0]  # (nq, T, T)
    return output, probabilities


class _Softmax(TorchFunctionMode):
    """Keeps what the last softmax was handed."""

    scores: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as it is."""
        if func is nn.functional.softmax:
            self.scores = args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _replaced(functions: Any, name: str) -> Iterator[None]:
    """Let an attention function of transformers' registry show Q and K while it is used."""
    inner = functions[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **given: Any) -> Any:
        stages: dict[str, Tensor] | None = getattr(module, "aprt_stages", None)
        if stages is not None:
            put_rotated(stages, query, key)
        return inner(module, query, key, *rest, **given)

    functions[name] = attention
    try:
        yield
    finally:
        functions[name] = inner


def _on_cpu(stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", torch.float32) for name, x in stages.items()}


def _loaded(checkpoint: Checkpoint, options: Mapping[str, Any], device: str) -> Any:
    """Return the model on its device, ready to run."""
    from transformers import AutoModelForCausalLM

    path, arguments = checkpoint.path, dict(options)
    if isinstance(checkpoint, GgufCheckpoint):
        if importlib.util.find_spec("accelerate") is None:
            raise SettingsError(
                "--aprt-engine=transformers needs accelerate to load a GGUF, which is not "
                "installed: pip install 'pytest-aprt[transformers]'"
            )
        if not sees_gguf():
            raise SettingsError(
                f"transformers {version('transformers')} does not see the gguf package on Python "
                f"{platform.python_version()}, without which it loads no GGUF: install a newer one"
            )
        if len(checkpoint.file.parts) > 1:
            raise SettingsError(
                f"{path}: transformers loads no split GGUF: merge it with llama-gguf-split --merge"
            )
        path, arguments["gguf_file"] = path.parent, path.name
    quantised = "quantization_config" in options or getattr(checkpoint, "quantisation", None)
    if quantised and device != "cpu":
        arguments.setdefault("device_map", {"": device})
    with _quiet():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, output_loading_info=True, **arguments
            )
            if "device_map" not in arguments:
                model = model.to(device)
        except Exception as error:
            raise EngineError(
                f"transformers does not load {checkpoint.path}: {_told(error)}"
            ) from error
    missing = sorted(name for name in loading["missing_keys"] if not name.endswith(".bias"))
    if missing:
        raise EngineError(
            f"transformers loads {checkpoint.path} without {missing[0]} and {len(missing) - 1} "
            "further tensors, which it fills with random numbers: fetch or convert the model anew"
        )
    return model.eval()


def sees_gguf() -> bool:
    """Return whether transformers finds the gguf package: 5.0 does not on Python 3.10."""
    from transformers.utils import import_utils

    try:
        return bool(import_utils.is_gguf_available())
    except ValueError:  # of packaging: it takes gguf's version to be "N/A"
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from showing how it loads; what goes wrong is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # one of its progress bars knows no switch
            yield
    finally:
        logging.set_verbosity(verbosity)


def _told(error: Exception) -> str:
    """Return the first sentence of an error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _value(text: str) -> Any:
    """Return what an option is set to: what JSON makes of it, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
