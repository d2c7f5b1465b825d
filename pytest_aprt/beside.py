"""What needs no weights, in a process of its own: the oracle's tokenizer, the drawing of a report.

All of it is work of the interpreter, and a core is idle while this process imports transformers,
and while it runs the tests. With a vocabulary of 152,000 tokens the tokenizer is loaded in 0.4 s
and the tokens rung takes 0.5; matplotlib is imported in 0.35 and a report of 28 layers drawn in
0.25.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_aprt.cores import available_cores
from pytest_aprt.errors import EngineError
from pytest_aprt.pair import Headers, tokenizer_of
from pytest_aprt.process import Child
from pytest_aprt.rungs import Row

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.report import Report
    from pytest_aprt.settings import Settings
    from pytest_aprt.sides import Sides

LARGE = 50_000
"""Tokens of a vocabulary from which a process is started. With 152,000 it spares 0.7 to 1 s,
and the drawing 0.5 more, which is the one size that was measured; what the process does for a
vocabulary takes time in proportion."""

_T = TypeVar("_T")


class Beside:
    """The process, if there is one. Whatever it does not answer is done in this one instead."""

    def __init__(self, child: Child | None = None) -> None:
        self._child = child
        self._begun: list[Any] | None = None  # what is awaited: a method, and its argument

    def tokenizer(self, folder: Path) -> Any:
        """Return what stands in for a folder's tokenizer; None without a process."""
        return _Tokenizer(self, folder) if self._child is not None else None

    def judge(self, prompts: Sequence[str]) -> None:
        """Begin with the tokens rung, with the user's prompts; its ``rows`` are asked for later."""
        self._begin("rows", list(prompts))

    def rows(self, pair: Pair, prompts: Sequence[str]) -> list[Row]:
        """Return the tokens rung."""

        def here() -> list[Any]:
            from pytest_aprt.rungs.tokens import token_rows

            return [asdict(row) for row in token_rows(replace(pair, lent_tokenizer=None), prompts)]

        return [Row(**row) for row in self._end("rows", list(prompts), here)]

    def draw(self, folder: Path) -> None:
        """Begin to draw the report.json that lies in a folder; ``drawn`` waits for it."""
        self._begin("draw", str(folder))

    def drawn(self, report: Report, folder: Path) -> None:
        """Return when what is drawn of a report lies in the folder.

        Raises:
            SettingsError: it cannot be written there.
        """
        from pytest_aprt.render import files

        self._end("draw", str(folder), lambda: files.draw(report, folder))

    def ask(self, method: str, *given: Any, **named: Any) -> Any:
        """Return what a method of the tokenizer returns.

        Raises:
            EngineError: there is no answer.
        """
        if self._begun is not None:
            raise EngineError("the process is busy with another answer")
        self._send(method, *given, **named)
        return self._answer()

    def _begin(self, *request: Any) -> None:
        with suppress(EngineError):
            self._send(*request)
            self._begun = [*request]

    def _end(self, method: str, given: Any, here: Callable[[], _T]) -> _T:
        """Return the answer to what was begun, else what ``here`` returns."""
        if self._begun == [method, given]:
            with suppress(EngineError):
                answer: _T = self._answer()
                return answer
        return here()

    def _send(self, method: str, *given: Any, **named: Any) -> None:
        if self._child is None:
            raise EngineError("there is no process")
        self._child.send(json.dumps([method, given, named]))

    def _answer(self) -> Any:
        child, self._child, self._begun = self._child, None, None
        assert child is not None
        try:
            (answer,) = json.loads(child.line())
        except (ValueError, TypeError) as error:
            raise EngineError(f"no answer: {error}") from error
        self._child = child  # who answers is asked again
        return answer


class _Tokenizer:
    """Stands in for a tokenizer, which is loaded in this process only where the other one fails."""

    def __init__(self, beside: Beside, folder: Path) -> None:
        self._beside, self._folder = beside, folder

    def __call__(self, text: str) -> Any:
        return self._either("__call__", text)

    def decode(self, ids: Sequence[int], **options: bool) -> Any:
        return self._either("decode", ids, **options)

    def convert_ids_to_tokens(self, token: int) -> Any:
        return self._either("convert_ids_to_tokens", token)

    def _either(self, method: str, *given: Any, **named: Any) -> Any:
        try:
            return self._beside.ask(method, *given, **named)
        except EngineError:
            return getattr(self._own, method)(*given, **named)

    @cached_property
    def _own(self) -> Any:
        return tokenizer_of(self._folder)


@contextmanager
def started(headers: Headers | Sides, settings: Settings) -> Iterator[Beside]:
    """Start the process, where that pays, and yield what asks it."""
    with ExitStack() as stack:
        child = None
        if _pays(headers, settings):
            request = json.dumps([settings.weights, settings.oracle, settings.report is not None])
            with suppress(OSError):
                child = stack.enter_context(Child("the process beside", __name__, request))
        yield Beside(child)


def _pays(headers: Headers | Sides, settings: Settings) -> bool:
    is_idle = available_cores() > 1 and settings.threads != 1
    is_early = "transformers" not in sys.modules
    if not isinstance(headers, Headers) or headers.model.kind != "gguf":
        return False
    return is_idle and is_early and headers.model.facts.vocab >= LARGE


def draw(folder: str) -> None:
    """Draw the report.json that lies in a folder."""
    from pytest_aprt import report
    from pytest_aprt.render import files

    files.draw(report.read(Path(folder, "report.json")), Path(folder))


def main() -> None:
    """Open a pair, and answer what is asked of tokenizer and report, line by line, to the end."""
    gc.disable()  # what is made here stays until then, and is made in two thirds of the time
    weights, oracle, draws = json.loads(sys.stdin.readline())
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        from pytest_aprt.buffers import give_back
        from pytest_aprt.pair import open_headers, open_pair
        from pytest_aprt.rungs.tokens import token_rows

        pair = open_pair(open_headers(weights, oracle))
        tokenizer = pair.tokenizer
        methods: dict[str, Callable[..., Any]] = {
            "__call__": lambda text: {"input_ids": list(tokenizer(text)["input_ids"])},
            "decode": tokenizer.decode,
            "convert_ids_to_tokens": tokenizer.convert_ids_to_tokens,
            "rows": lambda prompts: [asdict(row) for row in token_rows(pair, prompts)],
            "draw": draw,
        }
        for line in sys.stdin:
            method, given, named = json.loads(line)
            print(json.dumps([methods[method](*given, **named)]), file=out, flush=True)
            if method == "draw":  # nothing is asked after it, and the tests may take long
                break
            give_back()  # 60 MB of the rung's
            if draws and method == "rows":  # the models run now, and the report is still to come
                from pytest_aprt.render import html  # noqa: F401
    os._exit(0)  # to tidy up what was never collected takes 0.4 s, for which the run would wait


if __name__ == "__main__":
    main()
