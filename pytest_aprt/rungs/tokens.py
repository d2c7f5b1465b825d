"""The tokens rung: the tokenizer that the GGUF embeds against the oracle's.

The runs themselves are given the oracle's ids. What breaks here does not show in any stage: the
model's users get other tokens than those that were judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_aprt.checkpoints import GgufCheckpoint
from pytest_aprt.errors import SourceError
from pytest_aprt.pair import tokenizer_of
from pytest_aprt.rungs import TOKENS, Row, judged, unavailable
from pytest_aprt.rungs.hf_tokens import pair_rows
from pytest_aprt.rungs.tokenizer import (
    BYTE_LEVEL,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufTokenizer,
)
from pytest_aprt.sources._files import json_object

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair

PROMPTS = {
    # name of the test: texts
    "prose": (
        "The quick brown fox jumps over the lazy dog.",
        "It's what they'd said: \"we'll see\" - and SHE'S gone, isn't she?",
        "Grüße aus Zürich; naïve café, señor, Ångström.",
    ),
    "code": (
        "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x)]  # ok?\n",
        "for(int i=0;i<n;++i){a[i]*=b[i]>>2;}\t// done\n",
        "SELECT * FROM t WHERE id=42 AND name<>'x';",
    ),
    "digits": ("3.14159265358979 and 1,234,567", "2024-02-29T23:59:60Z 0x7fff", "12345678901234"),
    "spaces": ("a  b   c    d", "  leading", "trailing  ", "tab\tand \t mixed", " "),
    "newlines": ("a\nb\n\nc\n\n\n\nd", "windows\r\nline\r\n", "\n\n  indented\n", "end \n"),
    "emoji": ("🙂", "family 👨‍👩‍👧‍👦, flag 🇨🇭, skin 👍🏽!", "coffee ☕️ → ✓ €5"),
    "scripts": (
        "東京都に住んでいます。",
        "今天天气很好，我们去公园吧！",
        "Привет, как дела?",
        "مرحبا بالعالم",
        "안녕하세요 세계",
        "नमस्ते दुनिया",
    ),
}
"""Built-in prompts. All are in Unicode's form NFC: whether a tokenizer composes text first, which
the GGUF format cannot say, is shown by the user's own prompts only."""

_PADDING = re.compile(r"\[PAD\d+\]")  # older converters call these user-defined
_SPECIAL_TOKENS = 4  # of the oracle's, put into the prompt of the test "special"


def token_rows(pair: Pair, prompts: Sequence[str]) -> list[Row]:
    """Return the tokens rung.

    Args:
        pair: the opened model and oracle.
        prompts: the user's.
    """
    try:
        oracle = pair.tokenizer
        if not isinstance(pair.model, GgufCheckpoint):
            texts = {**PROMPTS, "special": special_prompts(oracle), "user": tuple(prompts)}
            return pair_rows(tokenizer_of(pair.model.path), oracle, texts)
    except SourceError as error:
        return unavailable(TOKENS, str(error))
    model = GgufTokenizer(pair.model.file.metadata)
    if not model.kind:
        return unavailable(TOKENS, "the GGUF holds no tokenizer (tokenizer.ggml.tokens)")
    sides = _Sides(model, oracle, pair.model_facts.vocab, end_tokens(pair))
    rows = [judge(sides) for judge in _JUDGES]
    texts = {**PROMPTS, "special": special_prompts(oracle), "user": tuple(prompts)}
    return rows + [sides.prompt_row(name, each) for name, each in texts.items()]


def end_tokens(pair: Pair) -> frozenset[int]:
    """Return the ids at which the oracle stops generating, whichever of its files says so."""
    path = pair.oracle.path / "generation_config.json"
    stated = [pair.tokenizer.eos_token_id, getattr(pair.config, "eos_token_id", None)]
    if path.is_file():
        stated.append(json_object(path).get("eos_token_id"))
    flat = [n for each in stated for n in (each if isinstance(each, list) else [each])]
    return frozenset(n for n in flat if isinstance(n, int))


def special_prompts(oracle: Any) -> tuple[str, ...]:
    """Return texts that hold the oracle's own added tokens."""
    marks = [str(token) for token in oracle.added_tokens_decoder.values()][:_SPECIAL_TOKENS]
    return tuple(f"a{mark}b {mark}\n{mark}" for mark in marks)


class _Sides:
    def __init__(
        self, model: GgufTokenizer, oracle: Any, n_embeddings: int, ends: frozenset[int]
    ) -> None:
        self.model, self.oracle = model, oracle
        self.n_embeddings, self.ends = n_embeddings, ends
        self.backend = getattr(oracle, "backend_tokenizer", None)

    @cached_property
    def oracle_texts(self) -> dict[int, str]:
        """Text of every token of the oracle by id."""
        return {number: text for text, number in self.oracle.get_vocab().items()}

    @cached_property
    def added(self) -> dict[int, Any]:
        """The oracle's tokens that are matched as a whole before a text is split."""
        return dict(self.oracle.added_tokens_decoder)

    @cached_property
    def oracle_merges(self) -> list[tuple[str, str]] | None:
        """The oracle's merges, without parsing its vocabulary once more; None if it has none."""
        if self.backend is None or type(self.backend.model).__name__ != "BPE":
            return None
        state: bytes = self.backend.model.__getstate__()
        start = state.find(b'"merges":[')
        if start < 0:
            return None
        merges, _ = json.JSONDecoder().raw_decode(state[start + len(b'"merges":') :].decode())
        return [tuple(m if isinstance(m, list) else m.split(" ", 1)) for m in merges]

    def of_model(self, number: int) -> str:
        """Return a token of the model in the oracle's spelling of blanks."""
        text = self.model.texts[number]
        return text if number in self.added else text.replace(" ", "▁")

    def prompt_row(self, name: str, texts: Sequence[str]) -> Row:
        """Compare the ids of texts; the first that differs is named."""
        if self.model.unfit:
            return Row(name=name, status="unavailable", reason=self.model.unfit)
        if not texts:
            return Row(name=name, status="unavailable", reason="no text was given, only token ids"
                       if name == "user" else "the oracle has no such token")  # fmt: skip
        for text in texts:
            model, oracle = self.model.encode(text), list(self.oracle(text)["input_ids"])
            if model != oracle:
                at, reason = self._difference(text, model, oracle)
                return judged(name, reason, prompt=text, position=at, model=model, oracle=oracle)
        return judged(name, prompts=len(texts))

    def _difference(self, text: str, model: list[int], oracle: list[int]) -> tuple[int, str]:
        at = next((i for i, (a, b) in enumerate(zip(model, oracle, strict=False)) if a != b),
                  min(len(model), len(oracle)))  # fmt: skip
        reason = (
            f"prompt {text!r:.60} differs at token {at}: {self._token(model, at)} in the model, "
            f"{self._token(oracle, at)} in the oracle"
        )
        normalizer = self.backend.normalizer if self.backend is not None else None
        if normalizer is not None and normalizer.normalize_str(text) not in (text, f"▁{text}"):
            composed = normalizer.normalize_str(text)
            if "▁" not in composed and self.model.encode(composed) == oracle:
                reason += "; the oracle normalises the text before, which GGUF cannot say"
        return at, reason

    def _token(self, ids: list[int], at: int) -> str:
        if at >= len(ids):
            return "the end"
        known = 0 <= ids[at] < len(self.model.texts)
        return f"{ids[at]} {self.model.texts[ids[at]]!r}" if known else str(ids[at])


def _vocabulary(s: _Sides) -> Row:
    model, beyond = len(s.model.texts), max(s.oracle_texts, default=-1) + 1
    reason = ""
    if model < beyond:
        reason = f"has {model} tokens in the model, ids up to {beyond - 1} in the oracle"
    elif model != s.n_embeddings:
        reason = f"has {model} tokens in the model, {s.n_embeddings} rows in its token embedding"
    figures = {"model": model, "oracle": len(s.oracle_texts), "embeddings": s.n_embeddings}
    return judged("vocabulary", reason, **figures)


def _texts(s: _Sides) -> Row:
    """Every token of the oracle must be spelled alike; what else the model has must be unused."""
    both = [n for n in s.oracle_texts if n < len(s.model.texts)]
    wrong = sorted(n for n in both if s.of_model(n) != s.oracle_texts[n])
    if wrong:
        said = (
            f"{s.model.texts[wrong[0]]!r} in the model, {s.oracle_texts[wrong[0]]!r} in the oracle"
        )
        return _tokens_row("texts", wrong, said)
    used = [n for n, kind in enumerate(s.model.types) if kind not in (UNUSED, CONTROL)]
    extra = [n for n in used
             if n not in s.oracle_texts and not _PADDING.fullmatch(s.model.texts[n])]  # fmt: skip
    if extra:
        said = f"{s.model.texts[extra[0]]!r} in the model and unknown to the oracle"
        return _tokens_row("texts", extra, said)
    return judged("texts")


def _types(s: _Sides) -> Row:
    """What the oracle matches as a whole must be control or user-defined, and nothing else may."""
    whole = (CONTROL, USER_DEFINED, UNKNOWN)
    both = [n for n in s.oracle_texts if n < len(s.model.types)]
    wrong = sorted(n for n in both if (s.model.types[n] in whole) != (n in s.added))
    if not wrong:
        return judged("types")
    first = wrong[0]
    splits = ("the model", "the oracle") if first in s.added else ("the oracle", "the model")
    return _tokens_row(
        "types",
        wrong,
        f"{s.model.texts[first]!r} of type {s.model.types[first]}: text that holds it is split "
        f"in {splits[0]} and matched as a whole in {splits[1]}",
    )


def _tokens_row(name: str, wrong: Sequence[int], said: str) -> Row:
    more = len(wrong) - 1
    further = f"; {more} further token{'s' * (more > 1)}" if more else ""
    return judged(name, f"token {wrong[0]} is {said}{further}", first=wrong[0], count=len(wrong))


def _merges(s: _Sides) -> Row:
    model, oracle = s.model.merges, s.oracle_merges
    if oracle is None or (model is None and s.model.kind != BYTE_LEVEL):
        return Row(name="merges", status="unavailable", reason="not both sides hold merges")
    if model is None:
        return judged("merges", f"are missing in the model, the oracle has {len(oracle)}")
    reason = ""
    at = next((i for i, (a, b) in enumerate(zip(model, oracle, strict=False)) if a != b), None)
    if at is not None:
        a, b = " ".join(model[at]), " ".join(oracle[at])
        reason = f"differ at number {at}: {a!r} in the model, {b!r} in the oracle"
    elif len(model) != len(oracle):
        reason = f"are {len(model)} in the model, {len(oracle)} in the oracle"
    return judged("merges", reason, model=len(model), oracle=len(oracle))


def _bos(s: _Sides) -> Row:
    model, oracle = s.model.get("bos_token_id"), s.oracle.bos_token_id
    harmless = "" if s.model.add_bos or _adds(s.oracle)[0] else "no prompt begins with it"
    return _id_row("bos", model, oracle, harmless)


def _eos(s: _Sides) -> Row:
    model, oracle = s.model.get("eos_token_id"), s.oracle.eos_token_id
    harmless = "the oracle stops there too" if model in s.ends else ""
    return _id_row("eos", model, oracle, harmless if s.ends else "the oracle has none")


def _id_row(name: str, model: int | None, oracle: int | None, harmless: str) -> Row:
    reason = "" if model == oracle else f"is {_id(model)} in the model, {_id(oracle)} in the oracle"
    if reason and harmless:
        figures = {"model": model, "oracle": oracle}
        return Row(name=name, status="differs", reason=f"{reason}; {harmless}", figures=figures)
    return judged(name, reason, model=model, oracle=oracle)


def _id(number: int | None) -> str:
    return "not stated" if number is None else str(number)


def _add_bos(s: _Sides) -> Row:
    return _flag_row("add_bos", "BOS before", s.model.add_bos, _adds(s.oracle)[0])


def _add_eos(s: _Sides) -> Row:
    return _flag_row("add_eos", "EOS behind", s.model.add_eos, _adds(s.oracle)[1])


def _flag_row(name: str, what: str, model: bool, oracle: bool) -> Row:
    said = [f"{'' if flag else 'no '}{what} a prompt in the {side}"
            for side, flag in (("model", model), ("oracle", oracle))]  # fmt: skip
    reason = "" if model == oracle else f"differs: {', '.join(said)}"
    return judged(name, reason, model=model, oracle=oracle)


def _adds(oracle: Any) -> tuple[bool, bool]:
    """Return whether the oracle puts BOS before a prompt, and EOS behind it."""
    ids = list(oracle("a")["input_ids"])
    bare = list(oracle("a", add_special_tokens=False)["input_ids"])
    starts = range(len(ids) - len(bare) + 1)
    start = next((i for i in starts if ids[i : i + len(bare)] == bare), 0)
    return start > 0, start + len(bare) < len(ids)


def _pre_tokenizer(s: _Sides) -> Row:
    name, model = "pre_tokenizer", s.model
    theirs = s.backend.pre_tokenizer if s.backend is not None else None
    if model.unfit or model.kind != BYTE_LEVEL or theirs is None:
        reason = model.unfit or "not both sides split a text before they merge"
        return Row(name=name, status="unavailable", reason=reason)
    stated = model.get("pre")
    said = "is missing in the model" if stated is None else f"is {stated!r} in the model"
    for text in (text for texts in PROMPTS.values() for text in texts):
        ours, other = ([word for word, _ in side.pre_tokenize_str(text)]
                       for side in (model.backend.pre_tokenizer, theirs))  # fmt: skip
        if ours != other:
            a, b = next(_differing(ours, other))
            reason = f"{said}: of {text!r:.60} it makes {a!r} where the oracle makes {b!r}"
            return judged(name, reason, model=stated, prompt=text)
    return judged(name, model=stated)


def _differing(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield from ((x, y) for x, y in zip(a, b, strict=False) if x != y)
    yield (a[-1] if a else ""), (b[-1] if b else "")


_JUDGES: tuple[Callable[[_Sides], Row], ...] = (
    _vocabulary, _texts, _types, _merges, _bos, _eos, _add_bos, _add_eos, _pre_tokenizer,
)  # fmt: skip
