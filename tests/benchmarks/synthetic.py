"""Makes a pair of a real model's shape from random weights: a Q4_K_M GGUF and its checkpoint.

    python tests/benchmarks/synthetic.py --shape 7b --out DIR

Every matrix is quantised by llama.cpp's own quantiser (extra ``llamacpp``) to the type that its
Q4_K_M recipe gives it; the vocabulary is of full size, with its merges. The layers repeat two
distinct ones, as quantising takes longest; rates do not depend on it. A 7b pair takes 20 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from quant_bounds import library
from safetensors.torch import save_file

DISTINCT = 2
SPREAD = 0.02  # standard deviation of a weight, that of transformers' own initialisation


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    # Qwen2.5-0.5B, -7B; half its depth; and two that a test can afford
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, True),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, False),
    "7b-half": Shape(3584, 14, 28, 4, 18944, 152064, False),
    "mid": Shape(2048, 4, 16, 2, 5632, 32000, False),
    "tiny": Shape(256, 2, 4, 2, 512, 8192, False),
}


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: which layers' V and down projections Q4_K_M gives Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(name: str, layer: int, shape: Shape, columns: int) -> str:
    """The type that llama.cpp's Q4_K_M gives a matrix; rows that no super-block fits fall back."""
    wide = "output." in name or (
        ("attn_v" in name or "ffn_down" in name) and more_bits(layer, shape.layers)
    )
    if columns % 256:
        return "Q8_0" if wide else "Q5_0"
    return "Q6_K" if wide else "Q4_K"


class Quantiser:
    """llama.cpp's, over several threads: ctypes lets go of the interpreter."""

    def __init__(self) -> None:
        self._lib = library()
        self._pool = ThreadPoolExecutor()

    def __call__(self, weights: np.ndarray, kind: str) -> np.ndarray:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        rows, columns = weights.shape
        out = np.empty((rows, columns // values * size), np.uint8)
        step = -(-rows // 8)

        def part(start: int) -> None:
            n = min(step, rows - start)
            self._lib.ggml_quantize_chunk(
                GGMLQuantizationType[kind].value, weights[start:].ctypes.data,
                out[start:].ctypes.data, 0, n, columns, None,
            )  # fmt: skip

        list(self._pool.map(part, range(0, rows, step)))
        return out


def make(shape: Shape, folder: Path) -> None:
    """Write ``folder/model.gguf`` and ``folder/hf``; what is there is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    hf = folder / "hf"
    hf.mkdir(parents=True)
    quantise = Quantiser()
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "qwen2", use_temp_file=False)
    tokens, merges = vocabulary(shape.vocab)
    metadata(writer, shape, tokens, merges)
    (hf / "config.json").write_text(json.dumps(config(shape)))
    tokenizer(hf, tokens, merges)

    h, i, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim
    sizes = {
        ("attn_q", "self_attn.q_proj"): (h, h), ("attn_k", "self_attn.k_proj"): (kv, h),
        ("attn_v", "self_attn.v_proj"): (kv, h), ("attn_output", "self_attn.o_proj"): (h, h),
        ("ffn_gate", "mlp.gate_proj"): (i, h), ("ffn_up", "mlp.up_proj"): (i, h),
        ("ffn_down", "mlp.down_proj"): (h, i),
    }  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    packed: dict[tuple[str, int, str], np.ndarray] = {}
    plain: dict[tuple[str, int], torch.Tensor] = {}
    index: dict[str, str] = {}
    shards = shape.layers + 1
    for layer in range(shape.layers):
        which = layer % DISTINCT
        tensors: dict[str, torch.Tensor] = {}
        for (short, long), size in sizes.items():
            if (long, which) not in plain:
                plain[long, which] = torch.empty(size).normal_(0, SPREAD, generator=rng).bfloat16()
            kind = type_of(short, layer, shape, size[1])
            if (long, which, kind) not in packed:
                packed[long, which, kind] = quantise(plain[long, which].float().numpy(), kind)
            tensors[f"model.layers.{layer}.{long}.weight"] = plain[long, which]
            add(writer, f"blk.{layer}.{short}.weight", packed[long, which, kind], kind)
            if short in ("attn_q", "attn_k", "attn_v"):
                bias = torch.empty(size[0]).normal_(0, 0.1, generator=rng).bfloat16()
                tensors[f"model.layers.{layer}.{long}.bias"] = bias
                writer.add_tensor(f"blk.{layer}.{short}.bias", bias.float().numpy())
        for short, long in (("attn_norm", "input_layernorm"),
                            ("ffn_norm", "post_attention_layernorm")):  # fmt: skip
            norm = torch.empty(h).normal_(1, 0.1, generator=rng).bfloat16()
            tensors[f"model.layers.{layer}.{long}.weight"] = norm
            writer.add_tensor(f"blk.{layer}.{short}.weight", norm.float().numpy())
        index |= save(hf, layer + 1, shards, tensors)
    last = {"model.norm.weight": torch.ones(h).bfloat16()}
    writer.add_tensor("output_norm.weight", np.ones(h, np.float32))
    unit = torch.empty(shape.vocab // 8, h).normal_(0, SPREAD, generator=rng).bfloat16()
    for short, long in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        if long == "lm_head" and shape.tied:
            continue
        kind = type_of(f"{short}.", 0, shape, h)
        last[f"{long}.weight"] = unit.repeat(8, 1)
        add(writer, f"{short}.weight", np.tile(quantise(unit.float().numpy(), kind), (8, 1)), kind)
    index |= save(hf, shards, shards, last)
    listed = {"metadata": {}, "weight_map": index}
    (hf / "model.safetensors.index.json").write_text(json.dumps(listed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, packed: np.ndarray, kind: str) -> None:
    writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType[kind])


def save(folder: Path, number: int, count: int, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    name = f"model-{number:05d}-of-{count:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return dict.fromkeys(tensors, name)


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tokens and merges of a byte-level BPE of ``size`` tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    seen, merges = set(tokens), []
    letters = [t for t in tokens if t.isalpha() and t.isascii()]
    left = 0
    while len(tokens) < size - 2:  # each token is lengthened by every letter in turn
        for letter in letters:
            new = tokens[left] + letter
            if new not in seen and len(tokens) < size - 2:
                seen.add(new)
                merges.append((tokens[left], letter))
                tokens.append(new)
        left += 1
    return [*tokens, "<|endoftext|>", "<|im_end|>"], merges


def tokenizer(folder: Path, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges)
    found = Tokenizer(bpe)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(t, special=True) for t in tokens[-2:]])
    PreTrainedTokenizerFast(tokenizer_object=found, eos_token=tokens[-2]).save_pretrained(folder)


def metadata(
    writer: gguf.GGUFWriter, shape: Shape, tokens: list[str], merges: list[tuple[str, str]]
) -> None:
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(False)


def config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate, "vocab_size": shape.vocab,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": shape.tied, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "eos_token_id": shape.vocab - 2,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    make(SHAPES[asked.shape], asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
