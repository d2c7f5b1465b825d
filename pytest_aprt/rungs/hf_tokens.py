"""The tokens rung of two Hugging Face models: each brings its tokenizer, and both are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_aprt.rungs import TOKENS, Row, judged

_ONE = "both are tokenizers of transformers: what they make of texts is compared"


def pair_rows(model: Any, oracle: Any, texts: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return the tokens rung.

    Args:
        model: the model's tokenizer.
        oracle: the oracle's.
        texts: the prompts of each test that has some.
    """
    rows = {name: Row(name=name, status="unavailable", reason=_ONE) for name in TOKENS}
    ours, theirs = model.get_vocab(), oracle.get_vocab()
    rows["vocabulary"] = _vocabulary(ours, theirs)
    for name, attribute in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        rows[name] = _ids(name, getattr(model, attribute), getattr(oracle, attribute))
    for name, prompts in texts.items():
        rows[name] = _prompts(name, prompts, model, oracle)
    return list(rows.values())


def _vocabulary(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Row:
    wrong = sorted(
        text for text in ours.keys() | theirs.keys() if ours.get(text) != theirs.get(text)
    )
    reason = ""
    if wrong:
        a, b = (str(side.get(wrong[0], "none")) for side in (ours, theirs))
        reason = (
            f"differs in {len(wrong)} tokens, first {wrong[0]!r}: id {a} in the model, {b} in the "
            "oracle"
        )
    return judged("vocabulary", reason, model=len(ours), oracle=len(theirs))


def _ids(name: str, ours: int | None, theirs: int | None) -> Row:
    """A chat model ends where its base does not, which changes no prompt."""
    if ours == theirs:
        return judged(name, model=ours, oracle=theirs)
    return Row(
        name=name,
        status="differs",
        reason=f"is {ours} in the model, {theirs} in the oracle; no prompt shows it",
        figures={"model": ours, "oracle": theirs},
    )


def _prompts(name: str, texts: Sequence[str], model: Any, oracle: Any) -> Row:
    if not texts:
        return Row(name=name, status="unavailable", reason="no text was given, only token ids"
                   if name == "user" else "the oracle has no such token")  # fmt: skip
    for text in texts:
        ours, theirs = (list(side(text)["input_ids"]) for side in (model, oracle))
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            shorter = min(len(ours), len(theirs))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            a, b = (str(side[at]) if at < len(side) else "the end" for side in (ours, theirs))
            reason = (
                f"prompt {text!r:.60} differs at token {at}: {a} in the model, {b} in the oracle"
            )
            return judged(name, reason, prompt=text, position=at, model=ours, oracle=theirs)
    return judged(name, prompts=len(texts))
