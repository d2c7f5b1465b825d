"""What a model's own files say that its layers are handed: masks and rotary tables.

For runs in which no configuration of transformers exists; else that is asked (``oracle.Prelude``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pytest_aprt.architectures import Architecture
from pytest_aprt.errors import ArchitectureError
from pytest_aprt.facts import Facts
from pytest_aprt.forward import causal_mask, rope_angles
from pytest_aprt.oracle import Prelude

_KINDS = ("none", "divisors", "linear", "yarn")


def prelude_of(facts: Facts, architecture: Architecture, tokens: Sequence[int]) -> Prelude:
    """Return what every layer is handed for a prompt; the embedding is left empty.

    Raises:
        ArchitectureError: RoPE is scaled in a way that is not known here.
    """
    kind, count = facts.rope_scaling.kind, len(tokens)
    if kind not in _KINDS:
        raise ArchitectureError(
            f"RoPE scaling {kind!r} is not known without the oracle's own code: expected one of "
            f"{', '.join(_KINDS)}, or the Hugging Face model as oracle"
        )
    angles, stretch = rope_angles(facts, count)

    def table(function: Callable[[Tensor], Tensor]) -> Tensor:
        values = (function(angles) * stretch).float()
        if architecture.rotated_pairs == "half":
            return torch.cat([values, values], dim=-1)[None]
        return values.repeat_interleave(2, dim=-1)[None]

    tables = table(torch.cos), table(torch.sin)
    calls = [
        {
            "attention_mask": causal_mask(count, window)[None, None],
            "position_embeddings": tables,
        }
        for window in facts.windows
    ]
    return Prelude(torch.empty(0), calls)
