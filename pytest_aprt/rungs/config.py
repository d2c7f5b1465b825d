"""The config rung: every numerical fact, GGUF metadata against config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_aprt.architectures import ROPE_DIVISORS
from pytest_aprt.facts import FACTS, agree

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair


@dataclass(frozen=True, kw_only=True)
class FactRow:
    """One fact as both sides state it. ``broken`` where a difference changes this run's result.

    ``model_states`` and ``oracle_states`` are false where the file does not hold the key, so that
    the value is the default that llama.cpp, or transformers, takes. A difference matters to prompts
    ``beyond`` so many tokens; infinity if to none.
    """

    name: str
    model: Any
    oracle: Any
    key: str
    config: str
    agree: bool
    broken: bool
    feeds: tuple[str, ...]
    model_states: bool = True
    oracle_states: bool = True
    beyond: float = 0

    @property
    def reason(self) -> str:
        """What both sides say, and for which prompts it matters; empty where they agree."""
        if self.agree:
            return ""
        ours = f"{self.model} in the model"
        theirs = f"{self.oracle} in the oracle"
        if not self.model_states:
            ours += f" (the GGUF has no {self.key}: llama.cpp's default)"
        if not self.oracle_states:
            theirs += f" (config.json has no {self.config}: transformers' default)"
        said = f"is {ours}, {theirs}"
        if math.isinf(self.beyond):
            return f"{said}; it changes no result"
        return f"{said}; it matters beyond {self.beyond:.0f} tokens" if self.beyond > 1 else said


def fact_rows(pair: Pair, tokens: int) -> list[FactRow]:
    """Return the config rung for prompts of at most ``tokens``."""
    model, oracle = pair.model_facts, pair.oracle_facts
    rows = []
    for fact in FACTS.values():
        a, b = getattr(model, fact.field), getattr(oracle, fact.field)
        same = agree(a, b)
        rows.append(
            FactRow(
                name=fact.name,
                model=a,
                oracle=b,
                key=fact.key,
                config=fact.config,
                agree=same,
                broken=not same and fact.matters(model, oracle, tokens),
                feeds=fact.feeds,
                model_states=_is_stated(pair, fact.key),
                oracle_states=_is_configured(pair, fact.config),
                beyond=fact.beyond(model, oracle),
            )
        )
    return rows


def _is_stated(pair: Pair, key: str) -> bool:
    """Return whether the GGUF holds a key, or a group of keys, or a tensor that stands for it."""
    full = f"{pair.architecture.name}.{key}"
    stated = key in pair.gguf.metadata or key in pair.gguf.tensors
    if key == "rope.scaling":
        stated |= ROPE_DIVISORS in pair.gguf.tensors
    return stated or any(k == full or k.startswith(f"{full}.") for k in pair.gguf.metadata)


def _is_configured(pair: Pair, key: str) -> bool:
    """Return whether config.json holds a key, which may lie among the rope parameters."""
    config = pair.oracle.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return key in config or key in rope or (key == "rope_scaling" and bool(rope))
