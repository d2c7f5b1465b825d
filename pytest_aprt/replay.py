"""The replay: each stage recomputed from the model's own captured inputs of that stage.

Written apart from ``forward.py``, in float64 except for the large matmuls (float32), with the
shadow's weights; masks and rotary tables are those that transformers prepared. Beside its value
every stage has its *response*: how far the value moves when each input moves by one ulp. That is
what decides how much rounding is normal (a softmax over scores of 500 amplifies, a norm not).
An arithmetic's roundings are emulated: of a product's operands, and of what is kept. Every run
replays transformers' own stages as well (self-test), so a fault in here is no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pytest_aprt.architectures import EMBEDDING, FINAL_NORM, HEAD, Architecture
from pytest_aprt.arithmetic import EXACT, FLOAT32_ULP, GGML_INPUTS, Arithmetic
from pytest_aprt.cores import available_cores
from pytest_aprt.facts import Facts
from pytest_aprt.rounding import ROUNDINGS, Rounded, kept_as
from pytest_aprt.stages import STAGES
from pytest_aprt.strips import Strips, each, mapped, ranges, rows, too_large
from pytest_aprt.weights import WeightSource, logits, pieces, row_chunks, times

ANGLE_ULPS = 0.25
"""Rotary angles are position times frequency, a float32 that is an input too and grows with the
position. This is its share in the response; tests/test_faults.py runs 512 tokens."""

PROBES = 8
"""Responses are root mean squares over at least so many random sign patterns: with fewer, a
single token's channel may look insensitive by chance (chi-squared, 8 degrees of freedom)."""


DOUBT_SIGMAS = 3.0
"""Doubtful roundings go either way independently, so their effects are added in quadrature; this
many times that is allowed. tests/faults/score.py bridges whole layers of 8-bit engines."""


@dataclass(frozen=True)
class Input:
    """A parent's value, float64, how far each element moves in a probe, and how far it may be off.

    Where the value was captured ``off`` is None, and ``moved`` too: it moves by one ulp.
    """

    value: Tensor
    moved: Tensor | None = None
    off: Tensor | None = None

    @property
    def move(self) -> Tensor:
        """How far each element moves in a probe: as large as the value, and seldom needed."""
        if self.moved is not None:
            return self.moved
        return mapped(lambda x: x.abs() * FLOAT32_ULP, self.value)

    def part(self, change: Callable[[Tensor], Tensor]) -> Input:
        """Return a part of it, or the same in another layout."""
        parts = (None if part is None else change(part) for part in (self.moved, self.off))
        return Input(change(self.value), *parts)


def captured_input(value: Tensor) -> Input:
    """Return an input that was captured."""
    return Input(mapped(Tensor.double, value))


def replayed_input(reference: Reference, tolerance: float) -> Input:
    """Return an input that was itself replayed: it moves by its rounding and by its response."""

    def moved(value: Tensor, response: Tensor, doubt: Tensor | None = None) -> Tensor:
        move = torch.hypot(value.abs() * FLOAT32_ULP, response)
        return move if doubt is None else torch.hypot(move, doubt * (FLOAT32_ULP / tolerance))

    doubts = () if reference.doubt is None else (reference.doubt,)
    move = mapped(moved, reference.value, reference.response, *doubts)
    return Input(reference.value, move, mapped(lambda x: x * (tolerance / FLOAT32_ULP), move))


@dataclass(frozen=True)
class Reference:
    """What a stage should be, float64, and what computes its response to one-ulp changes.

    ``doubt`` is how far each element may be off because an operand lies on the edge between two
    roundings; None where nothing does.
    """

    value: Tensor
    respond: Callable[[], Tensor]
    doubt: Tensor | None = None

    @property
    def response(self) -> Tensor:
        """The response, float64: several times as dear as the value, and seldom needed.

        Kept once it is computed, without the lock of a cached_property: strips of one response
        are responses themselves, computed by several threads.
        """
        if "_response" not in self.__dict__:
            self.__dict__["_response"] = self.respond()
        found: Tensor = self.__dict__["_response"]
        return found


@dataclass(frozen=True)
class Context:
    """What a layer's replay needs besides captured stages.

    ``call`` holds what transformers hands to the layer: ``attention_mask`` and
    ``position_embeddings``. For whole-model stages it is empty. ``types`` gives the GGUF type of
    every weight of the layer, and of the head. ``arithmetic`` is how the stage was computed.
    ``first`` is the first position that is recomputed; the inputs' rows begin there, those of K
    and V that attention reads at position 0.
    """

    facts: Facts
    architecture: Architecture
    weights: Mapping[str, Tensor]
    call: Mapping[str, Any]
    source: WeightSource
    tokens: tuple[int, ...]
    types: Mapping[str, str]
    arithmetic: Arithmetic = EXACT
    first: int = 0

    def rounded(self, operand: str, x: Input, weight_type: str = "") -> Rounded:
        """Round an operand as the arithmetic does.

        Args:
            operand: a field of Arithmetic, such as ``inputs``.
            x: the operand.
            weight_type: GGUF type of the weight that it meets.

        Raises:
            UnfitError: the rounding's blocks do not fit the shape.
        """
        name = getattr(self.arithmetic, operand)
        if name == "ggml":
            name = GGML_INPUTS.get(weight_type, "none")
        rounded = ROUNDINGS[name](x.value.float(), None if x.off is None else x.off.float())
        if rounded is None:
            raise UnfitError(name)
        return rounded


class UnfitError(Exception):
    """A rounding's blocks do not fit the shape, so no engine computes the stage that way."""


Inputs = list[Tensor]
_Function = Callable[[Context, Inputs], Tensor]


def replay(stage: str, context: Context, inputs: Sequence[Input]) -> Reference:
    """Recompute ``stage`` from the values of its parents, in the order that STAGES gives them.

    Args:
        stage: name of the stage.
        context: weights, facts and what transformers handed to the layer.
        inputs: the parents, shaped as STAGES says.

    Raises:
        UnfitError: the arithmetic's blocks do not fit the inputs' shapes.
    """
    if STAGES[stage].last_token:
        inputs = [i.part(lambda x: x[-1:]) for i in inputs]
    if stage in _CUT and (shape := _shape_in_strips(stage, context, inputs)):
        return _in_strips(stage, context, inputs, shape)
    reference = _replay(stage, context, inputs)
    if STAGES[stage].last_token:
        doubt = None if reference.doubt is None else reference.doubt[0]
        whole = reference
        reference = Reference(whole.value[0], lambda: whole.response[0], doubt)
    return replace(reference, value=kept_as(reference.value, context.arithmetic.storage))


# Of these stages a query's row depends on no other query: which inputs are cut to the queries.
_CUT = {
    "attn_scores": (True, False),
    "attn_softmax": (True,),
    "attention": (True, False),
}


def _shape_in_strips(
    stage: str, context: Context, inputs: Sequence[Input]
) -> tuple[int, ...] | None:
    """Return heads, queries and keys where they are too many for one strip."""
    first = inputs[0].value
    if stage != "attn_scores":
        return tuple(first.shape) if isinstance(first, Strips) else None
    shape = (context.facts.heads, len(first), len(inputs[1].value))
    return shape if too_large(shape) else None


def _in_strips(
    stage: str, context: Context, inputs: Sequence[Input], shape: tuple[int, ...]
) -> Reference:
    cut = list(zip(inputs, _CUT[stage], strict=True))

    def replayed(queries: range) -> Reference:
        own = [i.part(partial(rows, queries=queries)) if c else i for i, c in cut]
        some = replace(context, first=context.first + queries.start)
        found = _replay(stage, some, own)
        return replace(found, value=kept_as(found.value, context.arithmetic.storage))

    if stage == "attention":  # (queries, channels): no larger than other stages
        parts = [(part.value, part.doubt) for part in each(shape, replayed)]
        doubts = [doubt for _, doubt in parts if doubt is not None]
        return Reference(
            torch.cat([value for value, _ in parts]),
            lambda: torch.cat(each(shape, lambda q: replayed(q).response)),
            torch.cat(doubts) if doubts else None,
        )
    latest = lru_cache(maxsize=available_cores())(replayed)  # value, response and doubt in turn

    def doubt(queries: range) -> Tensor:
        found = latest(queries).doubt
        assert found is not None  # it is of all strips or of none
        return found

    def stage_of(make: Callable[[range], Tensor]) -> Strips:
        return Strips(shape, make, torch.float64)

    doubtful = latest(ranges(shape)[0]).doubt is not None
    return Reference(
        stage_of(lambda q: latest(q).value),
        lambda: stage_of(lambda q: latest(q).response),
        stage_of(doubt) if doubtful else None,
    )


def _replay(stage: str, context: Context, inputs: Sequence[Input]) -> Reference:
    if stage in LINEAR:
        return _linear(LINEAR[stage], context, inputs[0])
    reference = _responsive(stage, context, inputs)
    rounds = (context.arithmetic.queries, context.arithmetic.cache) != ("none", "none")
    if stage not in _PRODUCTS or not rounds:
        return reference
    value, doubt = _PRODUCTS[stage](context, inputs)
    return replace(reference, value=value, doubt=doubt)


def _responsive(stage: str, context: Context, read: Sequence[Input]) -> Reference:
    function, inputs = _FUNCTIONS[stage], [i.value for i in read]
    value = function(context, inputs)

    def respond() -> Tensor:
        square = torch.zeros_like(value)
        if not inputs:
            return square
        moves, probes = [i.move for i in read], _probes(inputs[0])
        for probe in range(probes):
            moved = [
                x + move * _signs(x, seed=probe * 8 + i)
                for i, (x, move) in enumerate(zip(inputs, moves, strict=True))
            ]
            square += (function(context, moved) - value).square()
        if stage in _ROTARY:
            turned = _turned(stage, context, inputs, angle_error=ANGLE_ULPS * FLOAT32_ULP)
            square += probes * (turned - value).square()
        return (square / probes).sqrt()

    return Reference(value, respond)


def _linear(tensors: tuple[str, ...], context: Context, x: Input) -> Reference:
    values: list[Tensor] = []
    doubts: list[Tensor | None] = []
    for name in tensors:
        inputs = context.rounded("inputs", x, context.types.get(name, ""))
        exact_sums = inputs.doubt is None and inputs.sums is None
        if exact_sums and context.arithmetic.weights == "none":
            values.append(_times(context, name, inputs.value).double())
            doubts.append(None)
            continue
        for weight in _weight_chunks(context, name):
            operand = context.rounded("weights", captured_input(weight)).value
            value = (inputs.value @ operand.T).double()
            if inputs.sums is not None:
                value = value + inputs.sums.value.double() @ _minima(inputs, operand).T
            values.append(value)
            doubts.append(_doubt(inputs, operand))
    doubt = None
    if any(d is not None for d in doubts):
        pairs = zip(doubts, values, strict=True)
        doubt = torch.cat([torch.zeros_like(v) if d is None else d for d, v in pairs], dim=-1)
    return Reference(torch.cat(values, dim=-1), partial(_moved, tensors, context, x), doubt)


def _moved(tensors: tuple[str, ...], context: Context, x: Input) -> Tensor:
    """Return the response of a product with weights; its probes are stacked along the tokens."""
    ulps = x.move / FLOAT32_ULP  # keeps the products far from the smallest float32
    probes = [ulps * _signs(ulps, seed=i) for i in range(_probes(x.value))]
    moved = torch.cat([_times(context, n, torch.cat(probes).float()).double() for n in tensors], -1)
    return torch.stack(moved.split(len(ulps))).square().mean(0).sqrt() * FLOAT32_ULP


def _times(context: Context, name: str, x: Tensor) -> Tensor:
    if name == HEAD:
        return logits(context.source, x, context.facts.vocab)
    return times(context.weights, name, x)


def _weight_chunks(context: Context, name: str) -> Iterator[Tensor]:
    if name != HEAD:
        yield from pieces(context.weights, name)
        return
    for some in row_chunks(context.facts.vocab):
        yield context.source.rows(HEAD, some)


def _doubt(inputs: Rounded, weight: Tensor) -> Tensor | None:
    """Return how far a product may be off because of doubtful inputs."""
    if inputs.doubt is None:
        return None
    columns = inputs.doubt.any(0).nonzero()[:, 0]
    unsure = inputs.sums is not None and inputs.sums.doubt is not None and inputs.sums.doubt.any()
    if not len(columns) and not unsure:
        return None
    squares = inputs.doubt[:, columns].square() @ weight[:, columns].square().T
    if inputs.sums is not None and inputs.sums.doubt is not None:
        squares += inputs.sums.doubt.square() @ _minima(inputs, weight).square().T.float()
    return DOUBT_SIGMAS * squares.sqrt().double()


def _minima(inputs: Rounded, weight: Tensor) -> Tensor:
    """Return the minimum of each of a weight's blocks, which ggml multiplies by the kept sums."""
    assert inputs.sums is not None
    blocks: Tensor = weight.unflatten(-1, (inputs.sums.value.shape[-1], -1))
    return blocks.amin(-1).double()


def _probes(x: Tensor) -> int:
    return max(1, -(-PROBES // x.shape[-2]))


def _signs(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8).double() * 2 - 1


# One function per stage. T tokens, H hidden, I intermediate, n heads, g kv heads, D head_dim.


def _embedding(c: Context, _: Inputs) -> Tensor:
    rows = c.source.rows(EMBEDDING, c.tokens[c.first :])
    return rows.double() * c.architecture.embedding_scale(c.facts.hidden)  # (T, H)


def _norm(stage: str) -> _Function:
    (weight,) = STAGES[stage].tensors

    def function(c: Context, inputs: Inputs) -> Tensor:
        return _rms(inputs[0], c.weights[weight], c)  # (T, H)

    return function


def _final_norm(c: Context, inputs: Inputs) -> Tensor:
    return _rms(inputs[0], c.source.tensor(FINAL_NORM), c)


def _rms(x: Tensor, gamma: Tensor, c: Context) -> Tensor:
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + c.facts.eps).sqrt() * (gamma.double() + c.architecture.norm_offset)


def _qkv_bias(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] + torch.cat([c.weights[name] for name in STAGES["qkv_bias"].tensors])


def _heads(c: Context, qkv: Tensor, part: int) -> Tensor:
    """Return Q (0), K (1) or V (2) as (T, heads, D)."""
    channels: Tensor = qkv.split(c.facts.qkv_sizes, dim=-1)[part]
    return channels.reshape(channels.shape[0], -1, c.facts.head_dim)


_ROTARY = {"q_post_rope": 0, "k_post_rope": 1}  # which part of qkv is turned


def _rope(stage: str) -> _Function:
    def function(c: Context, inputs: Inputs) -> Tensor:
        return _turned(stage, c, inputs, angle_error=0.0)

    return function


def _turned(stage: str, c: Context, inputs: Inputs, angle_error: float) -> Tensor:
    """Apply QK-norm and RoPE, with every angle larger by the relative ``angle_error``."""
    x = _heads(c, inputs[0], _ROTARY[stage])
    if c.architecture.qk_norm:
        (norm,) = STAGES[stage].tensors
        x = _rms(x, c.weights[norm], c)
    tables: tuple[Tensor, Tensor] = c.call["position_embeddings"]  # (1, T, D) each
    cos, sin = (_of_pairs(table[0, c.first :])[:, None] for table in tables)
    if angle_error:
        angle = angle_error * _angles(c, x.shape[0])[:, None]
        cos, sin = cos - sin * angle, sin + cos * angle
    halves = c.architecture.rotated_pairs == "half"
    first, second = x.chunk(2, dim=-1) if halves else (x[..., ::2], x[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    if halves:
        return torch.cat(turned, dim=-1).flatten(1)  # (T, heads*D)
    return torch.stack(turned, dim=-1).flatten(1)


def _of_pairs(table: Tensor) -> Tensor:
    """Return (T, D/2): transformers' tables hold the value of each pair in both halves."""
    return table.chunk(2, dim=-1)[0].double()


def _angles(c: Context, tokens: int) -> Tensor:
    """Return the unscaled angle of every pair at every position: (T, D/2)."""
    pairs = torch.arange(c.facts.head_dim // 2).double()
    frequency = c.facts.rope_theta ** (-2 * pairs / c.facts.head_dim)
    return torch.outer(torch.arange(c.first, c.first + tokens).double(), frequency)


def _scores(c: Context, inputs: Inputs) -> Tensor:
    q, k = (_by_head(c, x) for x in inputs)
    scores = _of_groups(c, q) @ k.transpose(1, 2) / math.sqrt(c.facts.head_dim)
    return scores.reshape(len(q), -1, k.shape[1])  # (n, T, T)


def _rounded_scores(c: Context, inputs: Sequence[Input]) -> tuple[Tensor, Tensor]:
    q, k = (i.part(lambda x: _by_head(c, x)) for i in inputs)
    keys = c.rounded("cache", k).rearranged(lambda x: _shared(c, x))
    return _rounded_product(c.rounded("queries", q), keys, math.sqrt(c.facts.head_dim))


def _by_head(c: Context, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, c.facts.head_dim).transpose(0, 1)  # (heads, T, D)


def _of_groups(c: Context, x: Tensor) -> Tensor:
    """Lay the heads that read one kv head behind each other: (n, T, X) to (g, n/g*T, X)."""
    return x.reshape(c.facts.kv_heads, -1, x.shape[-1])


def _shared(c: Context, x: Tensor) -> Tensor:
    """Repeat every kv head for the heads that read it."""
    return x.repeat_interleave(c.facts.heads // c.facts.kv_heads, dim=0)


def _rounded_product(a: Rounded, b: Rounded, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return ``a @ b.T / scale`` of (heads, T, X) operands, and how far it may be off."""
    x, y = a.value.double(), b.value.double()
    squares = torch.zeros(*x.shape[:2], y.shape[1], dtype=torch.float64)
    if a.doubt is not None:
        squares += a.doubt.double().square() @ y.square().transpose(1, 2)
    if b.doubt is not None:
        squares += x.square() @ b.doubt.double().square().transpose(1, 2)
    return x @ y.transpose(1, 2) / scale, DOUBT_SIGMAS * squares.sqrt() / scale


def visible(c: Context, queries: slice = slice(None)) -> Tensor:
    """Return which keys each of the queries may see, by transformers' mask: (T, T) bool."""
    mask: Tensor | None = c.call["attention_mask"]
    if mask is None:
        t = len(c.tokens)
        return torch.ones(t, t, dtype=torch.bool).tril()[queries]
    some = mask[0, 0, queries]
    return some if some.dtype == torch.bool else some == 0


def _softmax(c: Context, inputs: Inputs) -> Tensor:
    queries = slice(c.first, c.first + inputs[0].shape[1])
    scores = inputs[0].masked_fill(~visible(c, queries), -torch.inf)
    return torch.softmax(scores, dim=-1)  # (n, T, T)


def _attention(c: Context, inputs: Inputs) -> Tensor:
    probabilities, qkv = inputs
    mixed = _of_groups(c, probabilities) @ _heads(c, qkv, 2).transpose(0, 1)
    return mixed.reshape(*probabilities.shape[:2], -1).transpose(0, 1).flatten(1)  # (T, nD)


def _rounded_attention(c: Context, inputs: Sequence[Input]) -> tuple[Tensor, Tensor]:
    probabilities, qkv = inputs
    v = c.rounded("cache", qkv.part(lambda x: _heads(c, x, 2).transpose(0, 1)))
    # Cached values are rounded along their channels, and multiplied along the keys.
    v = v.rearranged(lambda x: _shared(c, x).transpose(1, 2))
    value, doubt = _rounded_product(c.rounded("queries", probabilities), v)
    return value.transpose(0, 1).flatten(1), doubt.transpose(0, 1).flatten(1)


def _sum(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] + inputs[1]


def _activation(c: Context, inputs: Inputs) -> Tensor:
    return _ACTIVATIONS[c.facts.activation](inputs[0])


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def _product(c: Context, inputs: Inputs) -> Tensor:
    return inputs[0] * inputs[1]


LINEAR: dict[str, tuple[str, ...]] = {
    stage: STAGES[stage].tensors
    for stage in ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
}
"""The stages that are a product with weights."""

_PRODUCTS = {"attn_scores": _rounded_scores, "attention": _rounded_attention}
_FUNCTIONS: dict[str, _Function] = {
    "embedding": _embedding,
    "attn_norm": _norm("attn_norm"),
    "qkv_bias": _qkv_bias,
    "q_post_rope": _rope("q_post_rope"),
    "k_post_rope": _rope("k_post_rope"),
    "attn_scores": _scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    "post_attn_residual": _sum,
    "ffn_norm": _norm("ffn_norm"),
    "ffn_silu": _activation,
    "ffn_swigl": _product,
    "post_ffn_residual": _sum,
    "final_norm": _final_norm,
}
