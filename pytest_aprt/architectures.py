"""The architectures that can be judged: one row each, facts only.

A row names the tensors on both sides and states every numerical behaviour as a field of its own.
No field has a default, so that a forgotten fact is a TypeError at import; no code tests a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pytest_aprt.errors import ArchitectureError
from pytest_aprt.stages import STAGES, StageGraph

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What distinguishes one family of decoders from another.

    ``layer_tensors`` maps the Hugging Face name within a layer to the GGUF name within a block
    (``blk.<N>.`` is put before it); ``model_tensors`` maps whole-model names. ``parameter_tensors``
    are GGUF tensors that stand for metadata and have no partner in the checkpoint.
    """

    name: str  # general.architecture of the GGUF
    model_types: tuple[str, ...]  # model_type of config.json
    layer_tensors: Mapping[str, str]
    model_tensors: Mapping[str, str]
    parameter_tensors: tuple[str, ...]
    qkv_bias: bool  # biases on Q, K and V
    qk_norm: bool  # RMSNorm over head_dim of Q and K before RoPE
    rotated_pairs: Literal["half", "adjacent"]  # channels i and i+D/2, or 2i and 2i+1, in HF order
    permuted_qk: bool  # the GGUF stores rows of Q and K interleaved for adjacent pairs
    activation: Activation  # config.json's hidden_act; GGUF carries no key for it
    norm_offset: float  # added to the checkpoint's norm weights; the GGUF stores the sum
    scaled_embedding: bool  # the token embedding is multiplied by sqrt(hidden)
    moe: bool
    source: str

    def layer_tensor(self, layer: int, suffix: str) -> str:
        """Return the GGUF name of a layer's tensor, given its Hugging Face name in the layer."""
        return f"blk.{layer}.{self.layer_tensors[suffix]}"

    def embedding_scale(self, hidden: int) -> float:
        """Return the factor on the token embedding of ``hidden`` channels."""
        return math.sqrt(hidden) if self.scaled_embedding else 1.0

    def graph(self, n_layers: int) -> StageGraph:
        """Return the graph of the points that a model of this family has."""
        present = [s.name for s in STAGES.values() if s.needs is None or getattr(self, s.needs)]
        return StageGraph(n_layers, present)


_DECODER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_QKV_BIASES = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
_QK_NORMS = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
ROPE_DIVISORS = "rope_freqs.weight"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_MODEL_TENSORS = {
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
}

_ROWS = (
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        layer_tensors=_DECODER_TENSORS | _QKV_BIASES,
        model_tensors=_MODEL_TENSORS,
        parameter_tensors=(),
        qkv_bias=True,
        qk_norm=False,
        rotated_pairs="half",
        permuted_qk=False,
        activation="silu",
        norm_offset=0.0,
        scaled_embedding=False,
        moe=False,
        source="transformers models/qwen2/modeling_qwen2.py; llama.cpp src/models/qwen2.cpp",
    ),
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        layer_tensors=_DECODER_TENSORS,
        model_tensors=_MODEL_TENSORS,
        parameter_tensors=(ROPE_DIVISORS,),
        qkv_bias=False,
        qk_norm=False,
        rotated_pairs="half",
        permuted_qk=True,
        activation="silu",
        norm_offset=0.0,
        scaled_embedding=False,
        moe=False,
        source="transformers models/llama/modeling_llama.py, models/mistral/modeling_mistral.py; "
        "llama.cpp src/models/llama.cpp, conversion/llama.py (permute)",
    ),
    Architecture(
        name="qwen3",
        model_types=("qwen3",),
        layer_tensors=_DECODER_TENSORS | _QK_NORMS,
        model_tensors=_MODEL_TENSORS,
        parameter_tensors=(),
        qkv_bias=False,
        qk_norm=True,
        rotated_pairs="half",
        permuted_qk=False,
        activation="silu",
        norm_offset=0.0,
        scaled_embedding=False,
        moe=False,
        source="transformers models/qwen3/modeling_qwen3.py; llama.cpp src/models/qwen3.cpp",
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}
"""Every architecture by the name that GGUF files give it."""


def architecture_of(gguf_name: str | None, model_type: str | None) -> Architecture:
    """Return the row that fits the GGUF's architecture and ``model_type``; None fits any.

    Raises:
        ArchitectureError: no such row, or the two sides are of different families.
    """
    if gguf_name is None:
        for row in ARCHITECTURES.values():
            if model_type in row.model_types:
                return row
        known = ", ".join(t for row in ARCHITECTURES.values() for t in row.model_types)
        raise ArchitectureError(
            f"config.json says model_type {model_type!r}, which is unknown: expected one of {known}"
        )
    found = ARCHITECTURES.get(gguf_name)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(
            f"model architecture {gguf_name!r} is unknown: expected one of {known}"
        )
    if model_type is not None and model_type not in found.model_types:
        raise ArchitectureError(
            f"model and oracle are of different families: the model is {gguf_name!r}, the "
            f"oracle's config.json says model_type {model_type!r}, expected "
            f"{' or '.join(map(repr, found.model_types))}; give the oracle the model was made from"
        )
    return found
