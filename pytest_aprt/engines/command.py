"""Any program that writes APRT dumps, run once for each prompt."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_aprt.capture import CheckedEngine, LayerStages
from pytest_aprt.dump import DumpRunner
from pytest_aprt.dump_checks import CheckedDump
from pytest_aprt.engines.command_line import OF_THE_PROMPT, CommandLine
from pytest_aprt.errors import CaptureError, EngineError, SettingsError, SourceError
from pytest_aprt.options import DEFAULT_ENGINE_TIMEOUT_S
from pytest_aprt.process import ending, finished, tail

if TYPE_CHECKING:
    from pytest_aprt.pair import Pair
    from pytest_aprt.readings import Prompt
    from pytest_aprt.sides import Sides


class Command:
    """Runs a program for every prompt and reads the dump that it writes.

    Args:
        line: the program, its arguments and their placeholders.
        values: of all placeholders but those of the prompt and ``out``.
        pair: both sides, by which the dump is checked.
        prompts: those that ``layers`` may be asked for.
        timeout_s: how long the program may take for one prompt.

    Raises:
        SettingsError: a placeholder has no value here.
    """

    def __init__(
        self,
        line: CommandLine,
        values: Mapping[str, str],
        pair: Pair | Sides,
        prompts: Sequence[Prompt],
        timeout_s: float = DEFAULT_ENGINE_TIMEOUT_S,
    ) -> None:
        self._line, self._values, self._pair, self._timeout_s = line, values, pair, timeout_s
        self._texts = {prompt.tokens: prompt.text for prompt in prompts}
        self.details: dict[str, Any] = {"command": line.text}
        used = line.placeholders
        for name in used:
            if name not in (*values, *OF_THE_PROMPT, "out"):
                raise SettingsError(
                    f"{line.flag}: {{{name}}} is not known in this run: {_WHY[name]}"
                )
        if "prompt" in used and not all(self._texts.values()):
            raise SettingsError(
                f"{line.flag} has {{prompt}}, but token ids were given: expected --aprt-prompt, or "
                "{tokens} in the command"
            )
        if len(self._texts) > 1 and not set(used) & set(OF_THE_PROMPT):
            raise SettingsError(
                f"{line.flag} tells the program no prompt, and {len(self._texts)} are to be run: "
                "expected {prompt} or {tokens} in it, or one prompt, the one that the program "
                "always runs"
            )

    def layers(self, tokens: Sequence[int]) -> Iterator[LayerStages]:
        """Run the program and yield what its dump holds.

        Raises:
            EngineError: it does not start, fails, takes too long, or writes no dump.
            SourceError: a file of the dump is damaged.
            CaptureError: the dump is another prompt's, or no capture of this model.
        """
        with tempfile.TemporaryDirectory(prefix="aprt-", ignore_cleanup_errors=True) as folder:
            dump = self._dumped(tuple(tokens), folder)
            checked = self._checked(dump, tokens)
            yield from checked.layers(tokens)
            self.notes = list(getattr(checked, "notes", ()))

    def _dumped(self, tokens: tuple[int, ...], folder: str) -> DumpRunner:
        arguments = self._line.filled(
            {
                **self._values,
                "out": folder,
                "tokens": ",".join(map(str, tokens)),
                "prompt": self._texts.get(tokens, ""),
            }
        )
        name = arguments[0]
        try:
            code, output = finished(arguments, self._timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"{name} was stopped after {self._timeout_s:g} s: {tail(str(error.output))}; "
                "--aprt-engine-timeout gives it longer"
            ) from None
        except (OSError, ValueError) as error:  # a NUL in an argument
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"{name} cannot be started: {reason}") from error
        if code:
            raise EngineError(
                f"{name} {ending(code)}: {tail(output)} (run as {shlex.join(arguments)})"
            )
        try:
            return DumpRunner.open(folder)
        except SourceError as error:
            raise EngineError(
                f"{name} ended well, but wrote no dump to {{out}}: {error} (what it printed: "
                f"{tail(output)})"
            ) from error

    def _checked(self, dump: DumpRunner, tokens: Sequence[int]) -> CheckedEngine:
        name = self._line.arguments[0]
        if not dump.has_manifest:
            return CheckedDump(dump, self._pair, name)
        ran = [list(dumped) for _, dumped in dump.prompts]
        if list(tokens) not in ran:
            raise CaptureError(
                f"{name} ran the tokens {ran[0]!s:.200}, as its dump says, expected "
                f"{list(tokens)!s:.200}: hand them over with {{tokens}}",
                test="tokens",
            )
        return CheckedEngine(dump, self._pair.graph, self._pair.oracle_facts, name)


_WHY = {
    "weights": "expected --aprt-weights",
    "oracle": "the oracle is a dump, expected a Hugging Face model",
}


def values_of(pair: Pair | Sides, model: str, weights: str | None) -> dict[str, str]:
    """Return what the placeholders stand for, as far as it is the same for all prompts.

    Args:
        pair: both sides.
        model: what ``--aprt-model`` names.
        weights: path of the GGUF behind the model, if there is one.
    """
    values = {
        "model": model,
        "stages": ",".join(stage.name for stage in pair.graph.stages),
        "layers": f"0..{pair.graph.n_layers}",
    }
    if weights is not None:
        values["weights"] = weights
    if pair.oracle is not None:
        values["oracle"] = str(pair.oracle.path)
    return values
