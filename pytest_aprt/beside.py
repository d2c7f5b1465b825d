"""The tokens rung in a process of its own, while this one imports torch and runs the models.

It needs no weights. Of a vocabulary of 152,000 tokens it takes 1.3 s, nearly all in the
interpreter, while a core is idle for the 2.7 s in which this process imports transformers.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from pytest_aprt.cores import available_cores
from pytest_aprt.errors import EngineError
from pytest_aprt.pair import Headers
from pytest_aprt.process import Child
from pytest_aprt.rungs import Row

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.rungs.tokens import TokenRows
    from pytest_aprt.settings import Settings
    from pytest_aprt.sides import Sides

LARGE = 50_000
"""Tokens of a vocabulary from which a process is started. With 152,000 it spares 0.3 to 0.9 s of a
run of 6 to 14 s; the rung takes time in proportion, so that with a third little is left to spare.
"""


@contextmanager
def tokens_beside(headers: Headers | Sides, settings: Settings) -> Iterator[TokenRows]:
    """Begin with the rung, where that pays, and yield what returns its rows.

    Whatever keeps the process from an answer, the rung is judged in this one instead.
    """
    with ExitStack() as stack:
        child = None
        if _pays(headers, settings):
            request = base64.b64encode(pickle.dumps(settings)).decode()
            with suppress(OSError):
                child = stack.enter_context(Child("the tokens rung", __name__, request))
        yield partial(_rows, child)


def _pays(headers: Headers | Sides, settings: Settings) -> bool:
    is_idle = available_cores() > 1 and settings.threads != 1
    is_early = "transformers" not in sys.modules
    if not isinstance(headers, Headers) or headers.model.kind != "gguf":
        return False
    return is_idle and is_early and headers.model.facts.vocab >= LARGE


def _rows(child: Child | None, pair: Pair, prompts: Sequence[str]) -> list[Row]:
    if child is not None:
        with suppress(EngineError, ValueError):
            answer = json.loads(child.line())
            if answer["prompts"] == list(prompts):
                return [Row(**row) for row in answer["rows"]]
    from pytest_aprt.rungs.tokens import token_rows

    return token_rows(pair, prompts)


def main() -> None:
    """Answer one request."""
    settings: Settings = pickle.loads(base64.b64decode(sys.stdin.readline()))
    with redirect_stdout(sys.stderr):
        from pytest_aprt.pair import open_headers, open_pair
        from pytest_aprt.run import prompts_of
        from pytest_aprt.rungs.tokens import token_rows

        assert settings.weights is not None
        pair = open_pair(open_headers(settings.weights, settings.oracle))
        prompts = [prompt.text for prompt in prompts_of(settings, pair) if prompt.text]
        rows = [asdict(row) for row in token_rows(pair, prompts)]
    print(json.dumps({"prompts": prompts, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
