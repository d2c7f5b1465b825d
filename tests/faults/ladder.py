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
