"""The config rung: every numerical fact, GGUF metadata against config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_aprt.facts import FACTS, agree

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair


@dataclass(frozen=True, kw_only=True)
class FactRow:
    """One fact as both sides state it. ``broken`` where a difference changes this run's result."""

    name: str
    model: Any
    oracle: Any
    key: str
    config: str
    agree: bool
    broken: bool
    feeds: tuple[str, ...]

    @property
    def reason(self) -> str:
        """What both sides say."""
        return f"is {self.model} in the model, {self.oracle} in the oracle"


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
            )
        )
    return rows
