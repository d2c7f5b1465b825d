"""Faults outside the layers, each on its rung of the ladder and named after a kind of real bug."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from faults.files import GONE

Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FileFault:
    """A GGUF with something wrong in it; ``found`` are the tests that must break, and no others.

    Of the tokens rung ``found`` leaves out the prompts: some of them must break too if
    ``in_prompts``, and none may if not. ``metadata`` and ``tensors`` take the healthy file and
    return what to change in it.
    """

    name: str
    rung: str
    found: frozenset[str]
    like: str
    says: str = ""  # what the reason must hold
    family: str = "qwen2"
    in_prompts: bool = True
    metadata: Callable[[Metadata], Metadata] = lambda old: {}
    tensors: Callable[[Any], Mapping[str, Any]] = lambda file: {}


def key(name: str, value: Any) -> Callable[[Metadata], Metadata]:
    return lambda old: {f"tokenizer.ggml.{name}": value}


def listed(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Metadata], Metadata]:
    def changes(old: Metadata) -> Metadata:
        values = list(old[f"tokenizer.ggml.{name}"])
        change(values)
        return {f"tokenizer.ggml.{name}": values}

    return changes


def put(place: int, value: Any) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[place] = value

    return change


def swap(a: int, b: int) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[a], values[b] = values[b], values[a]

    return change


def shortened(values: list[Any]) -> None:
    del values[-1]


def tests(*names: str) -> frozenset[str]:
    return frozenset(names)


TOKEN_FAULTS = (
    FileFault(name="merges-swapped", rung="tokens", like="merges sorted anew by a converter",
              metadata=listed("merges", swap(4, 300)), says="number 4",
              found=tests("merges")),
    FileFault(name="merges-cut-short", rung="tokens", like="a limit of 700 merges",
              metadata=listed("merges", lambda m: m.__delitem__(slice(500, None))),
              says="are 500 in the model, 765 in the oracle",
              found=tests("merges")),
    FileFault(name="two-tokens-swapped", rung="tokens", like="a vocabulary sorted by text",
              metadata=listed("tokens", swap(33, 64)), says="token 33 is 'a'",
              found=tests("texts")),
    FileFault(name="token-misspelled", rung="tokens", like="an escape of the converter",
              metadata=listed("tokens", put(1000, "Ġxx")), says="'Ġxx' in the model",
              found=tests("texts"), in_prompts=False),
    FileFault(name="control-token-is-normal", rung="tokens", like="llama.cpp issue: <|im_end|> cut",
              metadata=listed("token_type", put(1023, 1)), says="'<|im_end|>' of type 1",
              found=tests("types")),
    FileFault(name="word-is-control", rung="tokens", like="a type that was copied from another id",
              metadata=listed("token_type", put(68, 3)), says="'e' of type 3",
              found=tests("types")),
    FileFault(name="other-pre-tokenizer", rung="tokens", like="digits split by threes",
              metadata=key("pre", "llama-bpe"), says="is 'llama-bpe' in the model",
              found=tests("pre_tokenizer"), in_prompts=False),
    FileFault(name="pre-tokenizer-missing", rung="tokens",
              like="llama.cpp's warning: missing pre-tokenizer type",
              metadata=key("pre", GONE), says="is missing in the model",
              found=tests("pre_tokenizer")),
    FileFault(name="bos-added", rung="tokens", like="a BOS before every prompt, or two",
              metadata=lambda old: {"tokenizer.ggml.add_bos_token": True,
                                    "tokenizer.ggml.bos_token_id": 1021},
              says="is 1021 in the model, not stated in the oracle",
              found=tests("bos", "add_bos")),
    FileFault(name="bos-forgotten", rung="tokens", like="add_bos_token lost in conversion",
              family="llama", metadata=key("add_bos_token", False),
              says="no BOS before a prompt in the model", found=tests("add_bos")),
    FileFault(name="bos-of-another-model", rung="tokens", like="special ids of the base model",
              family="llama", metadata=key("bos_token_id", 1023), says="is 1023 in the model",
              found=tests("bos")),
    FileFault(name="eos-of-another-model", rung="tokens", like="generation that never ends",
              metadata=key("eos_token_id", 1022), says="is 1022 in the model", found=tests("eos"),
              in_prompts=False),
    FileFault(name="vocabulary-cut-short", rung="tokens", like="padding rows cut by a converter",
              metadata=lambda old: {**listed("tokens", shortened)(old),
                                    **listed("token_type", shortened)(old)},
              says="has 1023 tokens in the model", found=tests("vocabulary")),
)  # fmt: skip


# --- weights --------------------------------------------------------------------------------------


def tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The tensor's dequantised values changed, and quantised anew."""
    return lambda file: {name: change(file.tensor(name).copy())}


def raw(name: str, of: str) -> Callable[[Any], Any]:
    """The tensor with another's bytes."""
    return lambda file: {name: (file.raw(of).copy(), file.tensors[of].type)}


def exchanged(a: str, b: str) -> Callable[[Any], Any]:
    return lambda file: {**raw(a, b)(file), **raw(b, a)(file)}


def times(place: Any, factor: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[place] *= factor
        return values

    return change


def in_pairs(heads: int) -> Callable[[Any], Any]:
    """Rows permuted as the conversion of Llama does."""
    return lambda w: w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def in_halves(heads: int) -> Callable[[Any], Any]:
    return lambda w: w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def rows_exchanged(a: int, b: int) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[[a, b]] = values[[b, a]]
        return values

    return change


def weight_fault(name: str, where: str, says: str, like: str, tensors: Any, *more: str,
                 family: str = "qwen2") -> FileFault:  # fmt: skip
    return FileFault(name=name, rung="weights", like=like, says=says, tensors=tensors,
                     family=family, found=tests(where, *more))  # fmt: skip


Q, K, V, OUT = (f"blk.1.attn_{part}.weight" for part in ("q", "k", "v", "output"))
GATE, UP, DOWN = (f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down"))
NORM = "blk.1.attn_norm.weight"

WEIGHT_FAULTS = (
    weight_fault("transposed", OUT, "is transposed", "a square matrix stored in the other order",
                 tensor(OUT, lambda w: w.T)),
    weight_fault("reshaped-transposed", DOWN, "is transposed", "(K, N) read as (N, K)",
                 tensor(DOWN, lambda w: w.T.reshape(w.shape))),
    weight_fault("rope-permuted", Q, "for rotary pairs of neighbours although", "rows permuted for "
                 "a family that rotates halves", tensor(Q, in_pairs(4))),
    weight_fault("rope-bias-permuted", "blk.1.attn_k.bias", "for rotary pairs of neighbours",
                 "the bias permuted with its matrix", tensor("blk.1.attn_k.bias", in_pairs(2))),
    weight_fault("rope-permuted-twice", Q, "neighbours twice", "a converted file converted again",
                 tensor(Q, in_pairs(4)), family="llama"),
    weight_fault("rope-not-permuted", K, "not permuted for rotary pairs", "llama.cpp: permute left "
                 "out for K", tensor(K, in_halves(2)), family="llama"),
    weight_fault("gate-and-up-swapped", GATE, f"is swapped with {UP}", "gate_up split the wrong "
                 "way round", exchanged(GATE, UP), UP),
    weight_fault("layers-swapped", DOWN, "is swapped with blk.2.ffn_down.weight", "layers "
                 "sorted by text: 10 before 2", exchanged(DOWN, "blk.2.ffn_down.weight"),
                 "blk.2.ffn_down.weight"),
    weight_fault("duplicated-layer", UP, "is a duplicate of blk.0.ffn_up.weight", "a shard read "
                 "twice", raw(UP, "blk.0.ffn_up.weight")),
    weight_fault("zeros", V, "is all zeros", "a tensor that was allocated and never read",
                 tensor(V, lambda w: w * 0)),
    weight_fault("constant", NORM, "is 1 everywhere", "a norm left at its initial value",
                 tensor(NORM, lambda w: w * 0 + 1)),
    weight_fault("norm-plus-one", NORM, "offset by one too large: 1 was added", "Gemma's norm "
                 "offset, added to another family", tensor(NORM, lambda w: w + 1)),
    weight_fault("norm-minus-one", "output_norm.weight", "offset by one too small",
                 "the offset taken off in conversion",
                 tensor("output_norm.weight", lambda w: w - 1)),
    weight_fault("scaled", DOWN, "is scaled by 1.29", "a global scale applied twice",
                 tensor(DOWN, lambda w: w * 1.3)),
    weight_fault("sign", "blk.1.attn_q.bias", "has its sign turned", "a bias subtracted",
                 tensor("blk.1.attn_q.bias", lambda w: -w)),
    weight_fault("bad-row", GATE, "rows that are wrong (all zeros): 7 of", "one row never written",
                 tensor(GATE, times(7, 0))),
    weight_fault("bad-block", GATE, "has a bad block: row 9, columns 64 to 95 (1.8", "one block's "
                 "scale", tensor(GATE, times((9, slice(64, 96)), 1.8))),
    weight_fault("zero-block", DOWN, "row 3, columns 32 to 63 (all zeros)", "a block past the end "
                 "of a buffer", tensor(DOWN, times((3, slice(32, 64)), 0))),
    weight_fault("rows-swapped", V, "has its rows 3 and 5 swapped", "an index off in a repack",
                 tensor(V, rows_exchanged(3, 5))),
    weight_fault("rows-rotated", UP, "has its rows permuted", "rows read one further",
                 tensor(UP, lambda w: w[[*range(1, len(w)), 0]])),
    weight_fault("columns-permuted", OUT, "has its columns permuted", "heads in another order",
                 tensor(OUT, lambda w: w[:, [*range(64, 256), *range(64)]])),
    weight_fault("not-finite", DOWN, "non-finite values, the first at [5, 0]", "an "
                 "overflowed scale", tensor(DOWN, times((5, 6), float("inf")))),
    weight_fault("bias-missing", "blk.2.attn_v.bias", "is missing in the model", "biases left out",
                 lambda file: {"blk.2.attn_v.bias": GONE}),
    weight_fault("embedding-row", "token_embd.weight", "rows that are wrong (all zeros): 500 of",
                 "a token that was added and never trained", tensor("token_embd.weight",
                                                                    times(500, 0))),
    weight_fault("other-numbers", V, "holds other numbers: cosine", "another checkpoint",
                 tensor(V, lambda w: w[::-1, ::-1] * 1.1)),
    weight_fault("foreign", "blk.1.attn_sinks.weight", "is no tensor of this architecture",
                 "a tensor that no code reads",
                 lambda file: {"blk.1.attn_sinks.weight": file.tensor("blk.1.attn_q.bias")}),
)  # fmt: skip


# --- config ---------------------------------------------------------------------------------------


def stated(name: str, value: Any) -> Callable[[Metadata], Metadata]:
    return lambda old: {f"{old['general.architecture']}.{name}": value}


CONFIG_FAULTS = (
    FileFault(name="rope-base", rung="config", like="the base of another release",
              metadata=stated("rope.freq_base", 10000.0), found=tests("rope_theta"),
              says="is 10000.0 in the model, 1000000.0 in the oracle"),
    FileFault(name="rope-base-missing", rung="config", like="a key that a converter left out",
              metadata=stated("rope.freq_base", GONE), found=tests("rope_theta"),
              says="the GGUF has no rope.freq_base: llama.cpp's default"),
    FileFault(name="eps", rung="config", like="eps of another family",
              metadata=stated("attention.layer_norm_rms_epsilon", 1e-5), found=tests("norm_eps"),
              says="is 9.99999"),
    FileFault(name="linear-scaling", rung="config", like="a context extension left in the file",
              metadata=lambda old: {"qwen2.rope.scaling.type": "linear",
                                    "qwen2.rope.scaling.factor": 4.0},
              found=tests("rope_scaling"), says="is linear, factor 4 in the model, none"),
    FileFault(name="divisors-missing", rung="config", like="rope_freqs.weight left out",
              family="llama", tensors=lambda file: {"rope_freqs.weight": GONE},
              found=tests("rope_scaling"), says="is none in the model"),
    FileFault(name="window", rung="config", like="a window where the oracle has none",
              metadata=stated("attention.sliding_window", 4), found=tests("sliding_window"),
              says="it matters beyond 4 tokens"),
)  # fmt: skip
