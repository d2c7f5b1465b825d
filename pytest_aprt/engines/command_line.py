"""``--aprt-engine-command``: a program, its arguments, and the placeholders in them.

The text is split as a shell would split it and run without one, so nothing in it is expanded but
the placeholders.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_aprt.errors import SettingsError

FLAG = "--aprt-engine-command"
"""The option, of the model's engine."""

PLACEHOLDERS = {
    # {name}: what stands there when the program runs
    "model": "what --aprt-model names",
    "weights": "the weights that --aprt-weights names",
    "oracle": "folder of the Hugging Face oracle, which has the tokenizer",
    "out": "an empty folder, to which the program writes its dump",
    "stages": "the stages that the model has, as attn_norm,qkv_matmul,...",
    "layers": "its layers, as 0..28 (end exclusive)",
    "tokens": "token ids of the prompt, as 3838,374,220",
    "prompt": "text of the prompt",
}
OF_THE_PROMPT = ("tokens", "prompt")

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class CommandLine:
    """A command with placeholders; ``text`` is what the user wrote as the option ``flag``."""

    text: str
    arguments: tuple[str, ...]
    flag: str = FLAG

    @classmethod
    def parse(cls, text: str, options: Mapping[str, str], flag: str = FLAG) -> CommandLine:
        """Split a command; ``options`` are placeholders of the user's own, already filled in.

        Raises:
            SettingsError: quotes are left open, a placeholder is unknown or has no use, the
                program is not there, or is not told where to write.
        """
        try:
            arguments = tuple(shlex.split(text))
        except ValueError as error:
            raise SettingsError(
                f"{flag}={text} is not valid: {str(error).lower()}; expected a program and its "
                "arguments, quoted as for a shell"
            ) from error
        found = cls(text, arguments, flag)
        known = (*PLACEHOLDERS, *options)
        for name in found.placeholders:
            if name not in known:
                raise SettingsError(
                    f"{flag}={text} is not valid: {{{name}}} is unknown, expected one of "
                    f"{', '.join(f'{{{name}}}' for name in known)}"
                )
        if "out" not in found.placeholders:
            raise SettingsError(
                f"{flag}={text} is not valid: expected {{out}}, the folder to which the program "
                "writes its dump"
            )
        for name in options:
            if name in PLACEHOLDERS or name not in found.placeholders:
                raise SettingsError(
                    f"{flag.removesuffix('command')}option={name} has no use: expected {{{name}}} "
                    f"in {flag}, and none of the names {', '.join(PLACEHOLDERS)}"
                )
        found = cls(text, tuple(_filled(argument, options) for argument in arguments), flag)
        if shutil.which(found.arguments[0]) is None:
            raise SettingsError(
                f"{flag}={text}: there is no program {found.arguments[0]}: expected one in PATH, "
                "or a path to one that may be executed"
            )
        return found

    @property
    def placeholders(self) -> list[str]:
        """The names in braces, in order."""
        return [name for argument in self.arguments for name in _PLACEHOLDER.findall(argument)]

    def filled(self, values: Mapping[str, str]) -> list[str]:
        """Return the arguments with every placeholder that ``values`` has replaced."""
        return [_filled(argument, values) for argument in self.arguments]


def _filled(argument: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), argument)
