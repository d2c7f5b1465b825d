"""The oracle: transformers' own modules, streamed one layer at a time, every stage captured.

The same runner is the oracle (the checkpoint's weights) and the shadow (the model's dequantised
weights). The model's own ``forward`` prepares masks and rotary embeddings: it runs once with
layers that only note what they are handed, so that no family's glue is written again here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM
from pytest_aprt.capture import LayerStages
from pytest_aprt.errors import ArchitectureError
from pytest_aprt.matrices import Matrix
from pytest_aprt.strips import Strips, each, rows, stripped, too_large
from pytest_aprt.taps import attribute, eager_attention, put_rotated, tapped
from pytest_aprt.weights import Layer, WeightSource, logits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = "aprt_capture"
"""Name under which the capturing attention is registered with transformers."""


@dataclass(frozen=True)
class Prelude:
    """What the model's forward hands to its layers for one prompt.

    ``hidden`` is the embedding (1, T, H); ``calls`` holds each layer's keyword arguments, among
    them ``attention_mask`` (additive, (1, 1, T, T)) and ``position_embeddings`` (cos, sin).
    """

    hidden: torch.Tensor
    calls: list[dict[str, Any]]


class TransformersRunner:
    """A causal language model of transformers, on weights that are read layer by layer.

    Args:
        config: the oracle's configuration; it is copied.
        weights: tensors by Hugging Face names, of ``dtype``.
        dtype: in which the modules compute; the oracle's is float32.

    Raises:
        ArchitectureError: transformers has no causal language model for the configuration.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: WeightSource,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoModelForCausalLM

        _register_attention()
        self.config = copy.deepcopy(config)
        self._weights = weights
        try:
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation=ATTENTION
                )
        except (ValueError, KeyError) as error:
            raise ArchitectureError(f"transformers cannot build the oracle: {error}") from error
        self.stages: dict[str, torch.Tensor] = {}
        """Those of the layer in progress, so far: others may multiply by its weights with it."""
        _fill_buffers(self._model)
        self._model.eval().to(dtype)
        self._base = self._model.model
        # Half precision must not reach the rotary tables.
        self._base.rotary_emb = type(self._base.rotary_emb)(config=self.config)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._base.layers)

    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Yield every stage of every layer, then of the whole model.

        Args:
            tokens: token ids, shorter than the context.
        """
        prelude = self.prelude(tokens)
        hidden = prelude.hidden
        for index in range(self.n_layers):
            stages = self.stages = {"embedding": hidden[0]} if index == 0 else {}
            hidden = self.run_layer(index, hidden, prelude, stages)
            yield LayerStages(index, {name: value.detach() for name, value in stages.items()})
        normed = self._final_norm(hidden)
        stages = self.stages = {"final_norm": normed[0]}
        stages["lm_head"] = logits(self._weights, normed[0], self.config.vocab_size, keep=1)[0]
        yield LayerStages(None, stages)

    def prelude(self, tokens: Sequence[int]) -> Prelude:
        """Run everything before the layers: embedding, masks, rotary embeddings."""
        used = sorted(set(tokens))
        embedding = self._base.embed_tokens
        calls: list[dict[str, Any]] = []
        entered: list[torch.Tensor] = []

        def note(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            entered.append(hidden_states)
            calls.append(kwargs)
            return hidden_states

        rows = self._weights.rows(EMBEDDING, used)
        place = {token: index for index, token in enumerate(used)}
        ids = torch.tensor([[place[token] for token in tokens]])
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # Only the rows in use are read; ids are renumbered to them.
            stack.enter_context(attribute(embedding, "weight", nn.Parameter(rows)))
            stack.enter_context(attribute(embedding, "padding_idx", None))
            for layer in self._base.layers:
                stack.enter_context(_forward_replaced(layer, note))
            stack.enter_context(_forward_replaced(self._base.norm, lambda hidden: hidden))
            self._base(input_ids=ids, use_cache=False)
        return Prelude(entered[0], calls)

    def run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        prelude: Prelude,
        stages: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Run one layer on (1, T, H) and return its output; ``stages`` is filled unless None.

        With ``stages`` None the layer runs unobserved, with transformers' own eager attention.
        """
        layer = self._base.layers[index]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            weights = self._weights.layer(index)
            matrices = weights.matrices if isinstance(weights, Layer) else {}
            held = {name: weights[name] for name in weights if name not in matrices}
            stack.enter_context(_assigned(layer, held, matrices))
            if stages is None:
                stack.enter_context(attribute(self.config, "_attn_implementation", "eager"))
            else:
                stack.enter_context(tapped(layer, stages, _product))
            returned = layer(hidden, **prelude.calls[index])
        output: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        if stages is not None:
            stages["post_ffn_residual"] = output[0]
        return output

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        with (
            torch.no_grad(),
            _assigned(self._base.norm, {"weight": self._weights.tensor(FINAL_NORM)}, {}),
        ):
            normed: torch.Tensor = self._base.norm(hidden)
            return normed


def _fill_buffers(model: Any) -> None:
    """Give the buffers that were made on the meta device their values, as transformers does.

    One that transformers does not know how to fill stays NaN, which the self-test finds.
    """
    with torch.no_grad():
        for module in model.modules():
            absent = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
            for name, buffer in absent.items():
                setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
            if absent:
                model._init_weights(module)


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, _attention)
    # Without a mask of the same name, transformers hands the attention no mask at all.
    AttentionMaskInterface.register(ATTENTION, eager_mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run the family's own eager attention and keep what goes in and what comes between.

    ``query`` is (1, nq, T, D), ``key`` and ``value`` (1, nkv, T, D), both after RoPE. Of a long
    prompt it is handed some queries at a time.
    """
    attention = eager_attention(module)
    shape = (query.shape[1], query.shape[2], key.shape[2])
    shared = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (1, nq, T, D)

    def score(queries: range) -> torch.Tensor:
        return (rows(query, queries) @ shared.transpose(2, 3) * scaling)[0]

    if not too_large(shape):
        output, probabilities = attention(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        softmax = probabilities[0]
    else:
        ungrouped = _Ungrouped(module)
        values = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

        def attend(queries: range, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask = None if attention_mask is None else rows(attention_mask, queries)
            found: tuple[torch.Tensor, torch.Tensor] = attention(
                ungrouped, rows(query, queries), shared, values, mask, scaling=scaling, **kwargs
            )
            return found

        nothing = values[..., :0]  # where the probabilities alone are asked for
        softmax = Strips(shape, lambda q: attend(q, nothing)[1][0], query.dtype)
        output = torch.cat(each(shape, lambda q: attend(q, values)[0]), dim=1)
    stages = getattr(module, "aprt_stages", None)
    if stages is not None:
        put_rotated(stages, query, key)
        stages["attn_scores"] = stripped(shape, score, query.dtype)  # (nq, T, T)
        stages["attn_softmax"] = softmax  # (nq, T, T)
    return output, None


class _Ungrouped:
    """An attention module whose K and V are shared out among the heads already, once for all."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _product(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor | None = getattr(module, "aprt_product", None)  # of a matrix not held
    if product is None:
        product = nn.functional.linear(x, module.weight)  # type: ignore[arg-type]
    return product


@contextmanager
def _assigned(
    module: nn.Module, tensors: dict[str, torch.Tensor], matrices: Mapping[str, Matrix]
) -> Iterator[None]:
    """Give a meta module real weights, without a copy, and take them away again.

    Linear modules whose weight is one of ``matrices`` multiply by it piece by piece instead.
    """
    absent = {
        name: torch.empty(matrix.rows, matrix.columns, device="meta")
        for name, matrix in matrices.items()
    }
    try:
        module.load_state_dict({**tensors, **absent}, assign=True)
    except RuntimeError as error:
        problems = " ".join(str(error).split()).partition(": ")[2]
        raise ArchitectureError(
            f"transformers' {type(module).__name__} does not take the tensors that the table of "
            f"architectures gives it: {problems}"
        ) from error
    with ExitStack() as stack:
        stack.callback(module.to, "meta")
        for name, matrix in matrices.items():
            linear = module.get_submodule(name.rpartition(".")[0])
            stack.enter_context(_forward_replaced(linear, partial(_linear, linear, matrix)))
            stack.callback(setattr, linear, "aprt_product", None)
        yield


def _linear(module: nn.Module, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    module.aprt_product = product = matrix.times(x)
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    return product if bias is None else product + bias


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # shadows the class's method
    try:
        yield
    finally:
        del module.forward
