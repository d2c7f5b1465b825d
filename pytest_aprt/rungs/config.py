"""The config rung: every numerical fact, as the files of both sides state it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_aprt.checkpoints import Checkpoint, HfCheckpoint
from pytest_aprt.facts import FACTS, Fact, Facts, agree

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair


@dataclass(frozen=True, kw_only=True)
class FactRow:
    """One fact as both sides state it. ``broken`` where a difference changes this run's result.

    ``default`` and ``oracle_default`` say whose default a value is that the side's files do not
    state, and are empty where they do. A difference matters to prompts ``beyond`` so many tokens;
    infinity if to none.
    """

    name: str
    model: Any
    oracle: Any
    key: str
    config: str
    agree: bool
    broken: bool
    feeds: tuple[str, ...]
    default: str = ""
    oracle_default: str = ""
    beyond: float = 0

    @property
    def model_states(self) -> bool:
        """Whether the model's files hold the key."""
        return not self.default

    @property
    def oracle_states(self) -> bool:
        """Whether the oracle's files hold the key."""
        return not self.oracle_default

    @property
    def reason(self) -> str:
        """What both sides say, and for which prompts it matters; empty where they agree."""
        if self.agree:
            return ""
        ours = f"{self.model} in the model"
        theirs = f"{self.oracle} in the oracle"
        if self.default:
            ours += f" ({self.default})"
        if self.oracle_default:
            theirs += f" ({self.oracle_default})"
        said = f"is {ours}, {theirs}"
        if math.isinf(self.beyond):
            return f"{said}; it changes no result"
        return f"{said}; it matters beyond {self.beyond:.0f} tokens" if self.beyond > 1 else said


def fact_rows(pair: Pair, tokens: int) -> list[FactRow]:
    """Return the config rung for prompts of at most ``tokens``."""
    oracle = HfCheckpoint(pair.oracle, pair.architecture)
    return _rows((pair.model, pair.model_facts), (oracle, pair.oracle_facts), tokens)


def engine_fact_rows(model: Checkpoint, oracle: Checkpoint, tokens: int) -> list[FactRow]:
    """Return the config rung of what two engines run."""
    return _rows((model, model.facts), (oracle, oracle.facts), tokens)


def _rows(
    model: tuple[Checkpoint, Facts], oracle: tuple[Checkpoint, Facts], tokens: int
) -> list[FactRow]:
    rows = []
    for fact in FACTS.values():
        a, b = getattr(model[1], fact.field), getattr(oracle[1], fact.field)
        same = agree(a, b)
        rows.append(
            FactRow(
                name=fact.name,
                model=a,
                oracle=b,
                key=model[0].key(fact),
                config=oracle[0].key(fact),
                agree=same,
                broken=not same and fact.matters(model[1], oracle[1], tokens),
                feeds=fact.feeds,
                default=_default(model[0], fact),
                oracle_default=_default(oracle[0], fact),
                beyond=fact.beyond(model[1], oracle[1]),
            )
        )
    return rows


def _default(checkpoint: Checkpoint, fact: Fact) -> str:
    """Return whose default a fact is; empty where the files state it."""
    stated = checkpoint.states(fact)
    return "" if stated else checkpoint.defaults.format(key=checkpoint.key(fact))
