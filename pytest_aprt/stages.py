"""The stages of a forward pass: names, order, shapes and parents, as one table.

Data only. A stage in a layer is a point (``L07-attn_norm``); whole-model stages are points by
their bare name (``lm_head``). Names and shapes are those of ``apr trace --save-tensor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pytest_aprt.errors import SettingsError

Kind = Literal[
    "lookup", "norm", "matmul", "add", "rope", "scores", "softmax", "mix", "gate", "topk"
]
"""What a stage computes; decides how its rounding behaves."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One named capture point.

    ``axes`` label the dimensions of the stage's *view*, in which heads are an axis of their own:
    ``q_post_rope`` is stored as (T, nq*D) and viewed as (token, head, channel). ``slices`` are the
    axes along which the worst slice is sought; ``part`` means Q, K and V apart.
    ``parents`` are stages of the same layer, or ``tokens`` (the token ids), ``layer_input`` (the
    previous layer's output, or the embedding) and ``qkv`` (``qkv_bias`` where the architecture
    has one, else ``qkv_matmul``). ``tensors`` are the weights it reads, by their Hugging Face names
    (within the layer for per-layer stages); a family may lack some (biases, QK-norm).
    """

    name: str
    shape: tuple[str, ...]
    axes: tuple[str, ...]
    slices: tuple[str, ...]
    kind: Kind
    parents: tuple[str, ...]
    what: str
    tensors: tuple[str, ...] = ()
    per_layer: bool = True
    first_layer_only: bool = False
    needs: str | None = None  # the Architecture field that must be true for the stage to exist
    last_token: bool = False
    index_payload: bool = False


_TOKENS_CHANNELS = ("token", "channel")
_HEADS = ("token", "head", "channel")

_ROWS = (
    Stage(
        name="embedding",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="lookup",
        parents=("tokens",),
        tensors=("model.embed_tokens.weight",),
        what="token embedding, after scaling where the architecture scales",
        first_layer_only=True,
    ),
    Stage(
        name="attn_norm",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="norm",
        parents=("layer_input",),
        tensors=("input_layernorm.weight",),
        what="input norm",
    ),
    Stage(
        name="qkv_matmul",
        shape=("T", "(nq+2*nkv)*D"),
        axes=_TOKENS_CHANNELS,
        slices=("token", "channel", "part"),
        kind="matmul",
        parents=("attn_norm",),
        tensors=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        what="Q, K and V projections concatenated per position, before bias",
    ),
    Stage(
        name="qkv_bias",
        shape=("T", "(nq+2*nkv)*D"),
        axes=_TOKENS_CHANNELS,
        slices=("token", "channel", "part"),
        kind="add",
        parents=("qkv_matmul",),
        tensors=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        what="the same after bias",
        needs="qkv_bias",
    ),
    Stage(
        name="q_post_rope",
        shape=("T", "nq*D"),
        axes=_HEADS,
        slices=("token", "head"),
        kind="rope",
        parents=("qkv",),
        tensors=("self_attn.q_norm.weight",),
        what="Q after QK-norm (if any) and RoPE",
    ),
    Stage(
        name="k_post_rope",
        shape=("T", "nkv*D"),
        axes=_HEADS,
        slices=("token", "head"),
        kind="rope",
        parents=("qkv",),
        tensors=("self_attn.k_norm.weight",),
        what="K after QK-norm (if any) and RoPE",
    ),
    Stage(
        name="attn_scores",
        shape=("nq", "T", "T"),
        axes=("head", "token", "key"),
        slices=("head", "token"),
        kind="scores",
        parents=("q_post_rope", "k_post_rope"),
        what="scaled scores, before mask; only j <= i counts",
    ),
    Stage(
        name="attn_softmax",
        shape=("nq", "T", "T"),
        axes=("head", "token", "key"),
        slices=("head", "token"),
        kind="softmax",
        parents=("attn_scores",),
        what="attention probabilities; j > i is 0",
    ),
    Stage(
        name="attention",
        shape=("T", "nq*D"),
        axes=_HEADS,
        slices=("token", "head"),
        kind="mix",
        parents=("attn_softmax", "qkv"),
        what="probabilities @ V, heads concatenated, before the O projection",
    ),
    Stage(
        name="attn_out",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="matmul",
        parents=("attention",),
        tensors=("self_attn.o_proj.weight",),
        what="after the O projection",
    ),
    Stage(
        name="post_attn_residual",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="add",
        parents=("layer_input", "attn_out"),
        what="hidden state after the attention residual",
    ),
    Stage(
        name="ffn_norm",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="norm",
        parents=("post_attn_residual",),
        tensors=("post_attention_layernorm.weight",),
        what="norm before the FFN",
    ),
    Stage(
        name="ffn_gate",
        shape=("T", "I"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="matmul",
        parents=("ffn_norm",),
        tensors=("mlp.gate_proj.weight",),
        what="gate projection",
    ),
    Stage(
        name="ffn_up",
        shape=("T", "I"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="matmul",
        parents=("ffn_norm",),
        tensors=("mlp.up_proj.weight",),
        what="up projection",
    ),
    Stage(
        name="ffn_silu",
        shape=("T", "I"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="gate",
        parents=("ffn_gate",),
        what="act(gate)",
    ),
    Stage(
        name="ffn_swigl",
        shape=("T", "I"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="gate",
        parents=("ffn_silu", "ffn_up"),
        what="act(gate) * up",
    ),
    Stage(
        name="ffn_out",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="matmul",
        parents=("ffn_swigl",),
        tensors=("mlp.down_proj.weight",),
        what="after the down projection",
    ),
    Stage(
        name="post_ffn_residual",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="add",
        parents=("post_attn_residual", "ffn_out"),
        what="layer output",
    ),
    Stage(
        name="moe_router",
        shape=("k",),
        axes=("expert",),
        slices=(),
        kind="topk",
        parents=("ffn_norm",),
        what="weights of the chosen experts, last token",
        needs="moe",
        last_token=True,
    ),
    Stage(
        name="moe_router_indices",
        shape=("k",),
        axes=("expert",),
        slices=(),
        kind="topk",
        parents=("ffn_norm",),
        what="indices of the chosen experts, last token; compared by equality",
        needs="moe",
        last_token=True,
        index_payload=True,
    ),
    Stage(
        name="moe_ffn_out",
        shape=("H",),
        axes=("channel",),
        slices=(),
        kind="matmul",
        parents=("ffn_norm",),
        what="output of the experts, last token",
        needs="moe",
        last_token=True,
    ),
    Stage(
        name="final_norm",
        shape=("T", "H"),
        axes=_TOKENS_CHANNELS,
        slices=_TOKENS_CHANNELS,
        kind="norm",
        parents=("layer_input",),
        tensors=("model.norm.weight",),
        what="final norm",
        per_layer=False,
    ),
    Stage(
        name="lm_head",
        shape=("V",),
        axes=("channel",),
        slices=("channel",),
        kind="matmul",
        parents=("final_norm",),
        tensors=("lm_head.weight",),
        what="logits of the last token",
        per_layer=False,
        last_token=True,
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _ROWS}
"""Every stage by name, in computation order."""

ALIASES = {"layer_output": "post_ffn_residual"}
"""Names that other tools use for a stage of the table."""


def stage_named(text: str) -> Stage:
    """Return the stage that ``text`` names; case and surrounding space do not matter.

    Raises:
        SettingsError: the name is empty or unknown; the message lists the known ones.
    """
    name = text.strip().lower()
    stage = STAGES.get(ALIASES.get(name, name))
    if stage is None:
        known = ", ".join(STAGES)
        raise SettingsError(f"stage {text.strip()!r} is unknown: expected 'all' or one of {known}")
    return stage


def stages_named(text: str) -> list[Stage]:
    """Return the stages of a comma-separated list, in computation order; ``all`` selects all.

    Raises:
        SettingsError: an empty or unknown name.
    """
    names = text.split(",")
    if [name.strip().lower() for name in names] == ["all"]:
        return list(STAGES.values())
    chosen = {stage_named(name).name for name in names}
    return [stage for stage in STAGES.values() if stage.name in chosen]


def point_id(layer: int | None, stage: str) -> str:
    """Return the id of a point: ``L07-attn_norm``, or the bare stage for the whole model."""
    return stage if layer is None else f"L{layer:02d}-{stage}"


@dataclass(frozen=True)
class Point:
    """A stage in a layer; ``layer`` is None for whole-model stages."""

    layer: int | None
    stage: str

    def __str__(self) -> str:
        return point_id(self.layer, self.stage)


class StageGraph:
    """The points of one model in computation order, and which feeds which.

    Args:
        n_layers: number of decoder layers.
        present: names of the per-layer and whole-model stages that the architecture has.
    """

    def __init__(self, n_layers: int, present: Iterable[str]) -> None:
        self.n_layers = n_layers
        names = set(present)
        self.stages = [stage for stage in STAGES.values() if stage.name in names]
        self.points: list[Point] = [
            Point(layer, stage.name) for layer in range(n_layers) for stage in self.of_layer(layer)
        ]
        self.points += [Point(None, s.name) for s in self.stages if not s.per_layer]
        self._order = {point: index for index, point in enumerate(self.points)}
        self._ancestors: dict[Point, frozenset[Point]] = {}
        for point in self.points:
            parents = self.parents(point)
            above = [self._ancestors[parent] for parent in parents]
            self._ancestors[point] = frozenset(parents).union(*above)

    def of_layer(self, layer: int | None) -> list[Stage]:
        """Return the stages of one layer (None: of the whole model), in computation order."""
        if layer is None:
            return [stage for stage in self.stages if not stage.per_layer]
        return [s for s in self.stages if s.per_layer and not (s.first_layer_only and layer)]

    def order(self, point: Point) -> int:
        """Return the point's place in computation order."""
        return self._order[point]

    def parents(self, point: Point) -> list[Point]:
        """Return the points whose values the stage reads; empty for the embedding."""
        found = []
        for parent in STAGES[point.stage].parents:
            if parent == "tokens":
                continue
            if parent == "layer_input":
                found.append(self.layer_input(point.layer))
            elif parent == "qkv":
                found.append(Point(point.layer, self.qkv))
            else:
                found.append(Point(point.layer, parent))
        return found

    @property
    def qkv(self) -> str:
        """Name of the stage from which Q, K and V are read."""
        names = {stage.name for stage in self.stages}
        return "qkv_bias" if "qkv_bias" in names else "qkv_matmul"

    def layer_input(self, layer: int | None) -> Point:
        """Return the point that enters the layer (None: that enters the final norm)."""
        before = (self.n_layers if layer is None else layer) - 1
        return Point(0, "embedding") if before < 0 else Point(before, "post_ffn_residual")

    def ancestors(self, point: Point) -> frozenset[Point]:
        """Return every point that lies upstream of this one."""
        return self._ancestors[point]
