"""The tokenizer that a GGUF embeds, put together from parts of the tokenizers library.

The file names its parts instead of holding them; the tables say what llama.cpp takes a name for.

Source: llama.cpp src/llama-vocab.cpp (``llama_vocab::impl::load``: defaults of each kind;
``llm_tokenizer_bpe``: split patterns) and its conversion scripts (token types, spelling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of ``tokenizer.ggml.token_type``."""

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Values of ``tokenizer.ggml.model`` that are known."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_FALLBACK = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """What a name in ``tokenizer.ggml.pre`` stands for.

    ``whole_words`` says that a word which is a token is taken as it is, whatever the merges say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False  # where tokenizer.ggml.add_bos_token is absent


SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), Splitting(patterns=(_QWEN2,))
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        Splitting(patterns=(_LLAMA3,), whole_words=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(patterns=(_LLAMA3,))),
    "tekken": Splitting(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-2", "olmo", "jina-es", "jina-de"), Splitting(patterns=(_GPT2,))),
    "default": Splitting(patterns=_FALLBACK),
}


class GgufTokenizer:
    """A GGUF's tokenizer metadata, each part read when it is asked for.

    Args:
        metadata: the GGUF's key-value pairs.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``tokenizer.ggml.<key>``."""
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    @property
    def kind(self) -> str:
        """What kind of tokenizer it is; empty where the file holds none."""
        return str(self.get("model", "")) if "tokenizer.ggml.tokens" in self._metadata else ""

    @property
    def splitting_name(self) -> str:
        """The pre-tokenizer's name; llama.cpp takes ``default`` where the file names none."""
        return str(self.get("pre", "default"))

    @cached_property
    def texts(self) -> list[str]:
        """The text of every token, by id."""
        return [str(text) for text in self.get("tokens", ())]

    @cached_property
    def types(self) -> list[int]:
        """The type of every token, by id; all are normal where the file does not say."""
        types = list(self.get("token_type", ()))
        return types + [NORMAL] * (len(self.texts) - len(types))

    @cached_property
    def merges(self) -> list[tuple[str, str]] | None:
        """The merges in order; None where the file has none."""
        lines = self.get("merges")
        if lines is None:
            return None
        return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]

    @property
    def add_bos(self) -> bool:
        """Whether the BOS token is put before every prompt."""
        splitting = SPLITTINGS.get(self.splitting_name)
        default = self.kind == SENTENCEPIECE or (splitting is not None and splitting.add_bos)
        return bool(self.get("add_bos_token", default))

    @property
    def add_eos(self) -> bool:
        """Whether the EOS token is put behind every prompt."""
        return bool(self.get("add_eos_token", False))

    @property
    def unfit(self) -> str:
        """Why no tokenizer can be put together from the file; empty where one can."""
        if self.kind not in (BYTE_LEVEL, SENTENCEPIECE):
            return f"tokenizer.ggml.model is {self.kind!r}: only gpt2 and llama can be run here"
        if self.kind == BYTE_LEVEL and self.splitting_name not in SPLITTINGS:
            return f"tokenizer.ggml.pre is {self.splitting_name!r}, which is not in the table"
        if self.kind == BYTE_LEVEL and not self.merges:
            return "tokenizer.ggml.merges is missing: no text can be put into tokens"
        return ""

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer; ``unfit`` must be empty. It adds no BOS and no EOS."""
        from tokenizers import AddedToken

        built = self._byte_level() if self.kind == BYTE_LEVEL else self._sentencepiece()
        added = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        found = [
            AddedToken(text, normalized=False, special=added[kind])
            for text, kind in zip(self.texts, self.types, strict=True)
            if kind in added and text
        ]
        built.add_tokens([token for token in found if not token.special])
        built.add_special_tokens([token for token in found if token.special])
        return built

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as llama.cpp gives them, BOS and EOS included."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        before = [self.get("bos_token_id")] if self.add_bos else []
        after = [self.get("eos_token_id")] if self.add_eos else []
        return [*before, *ids, *after]

    def _byte_level(self) -> Tokenizer:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        splitting = SPLITTINGS[self.splitting_name]
        vocabulary = {text: number for number, text in enumerate(self.texts)}
        known = [m for m in self.merges or () if m[0] in vocabulary and m[1] in vocabulary
                 and m[0] + m[1] in vocabulary]  # fmt: skip
        built = Tokenizer(models.BPE(vocabulary, known, ignore_merges=splitting.whole_words))
        built.pre_tokenizer = pre_tokenizers.Sequence([
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        return built

    def _sentencepiece(self) -> Tokenizer:
        from tokenizers import Tokenizer, models, normalizers

        vocabulary = {text: number for number, text in enumerate(self.texts)}
        merges = merges_of(self.texts, self.get("scores", ()), vocabulary)
        unknown = self.texts[int(self.get("unknown_token_id", 0))]
        built = Tokenizer(
            models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        prefix = [normalizers.Prepend("▁")] if self.get("add_space_prefix", True) else []
        built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        return built


def merges_of(
    texts: Sequence[str], scores: Sequence[float], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies: the best score first.

    Whatever two tokens make a third may be merged; SentencePiece takes the pair whose outcome has
    the best score.
    """
    found = []
    for number, (text, score) in enumerate(zip(texts, scores, strict=False)):
        for cut in range(1, len(text)):
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None:
                found.append((-score, number, left, right))
    return [(texts[left], texts[right]) for _, _, left, right in sorted(found)]
