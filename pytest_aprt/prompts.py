"""Prompt sets by name. Data only.

``short`` is varied: a question, code, digits, scripts and punctuation. ``long`` is 128 tokens, so
that attention windows and far positions are exercised; prose and code take turns, so that both
are among them whatever the tokenizer.
"""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """A text of which the first ``tokens`` tokens are run; None runs them all."""

    text: str
    tokens: int | None = None


_LONG = """\
A model that was converted by hand ran for weeks with one wrong number.
def rope(x, base=10000.0):
    half = x.shape[-1] // 2
Nobody saw it: the first words of every answer were right, and the rest read like a tired writer.
    angles = positions[:, None] * base ** (-arange(half) / half)
    first, second = x[..., :half], x[..., half:]
Only when someone compared the tensors, layer by layer, did the fault show where it was born.
    return concat([first * cos(angles) - second * sin(angles),
                   second * cos(angles) + first * sin(angles)], axis=-1)

"Which layer?" she asked. "The third," he said, "and only the queries: 0.553 where 3e-7 is usual."
for layer, (ours, theirs) in enumerate(zip(model.layers, oracle.layers, strict=True)):
    error = norm(ours - theirs) / norm(theirs)
    if error > 1e-5:
        raise SystemExit(f"layer {layer}: {error:.1e}")

So they changed one line, ran the tests again, and went home; it was the 29th of February, 23:59.
SELECT prompt, count(*) AS runs FROM results WHERE verdict <> 'PARITY' GROUP BY prompt LIMIT 10;
The next morning the answers were long, and they were good until the very last word of the page.
"""

PROMPT_SETS = {
    "short": (
        Cut("What is 2+2?"),
        Cut("def fibonacci(n):\n    return"),
        Cut("The capital of France is"),
        Cut("3.14159265358979, 2.71828182845905, 1.41421356237310"),
        Cut("Grüße aus Zürich, 東京 и Москва! ¿Qué tal? 🙂"),
    ),
    "long": (Cut(_LONG, tokens=128),),
}
