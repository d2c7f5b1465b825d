"""Every error that a user can cause, as one tree.

AprtError                 caught at the pytest border: one line, exit code 4
├── SettingsError         an option or ini value is not valid
├── SourceError           a model, oracle or dump cannot be opened or is damaged
├── ArchitectureError     no row of ARCHITECTURES fits, or the two sides differ in kind
├── CaptureError          a runner or a user's engine yields something that is no capture
├── EngineError           an engine in a process of its own fails or does not start
└── ContractError         a contract or ledger is damaged, or states what cannot be

The message of each names the thing, says what was expected, and what to do.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class AprtError(Exception):
    """Base of all errors that bad input can cause; its text is one line."""


class SettingsError(AprtError):
    """An option or an ini value is not valid."""


class SourceError(AprtError):
    """A file, folder or hub id cannot be opened, or what it holds is damaged."""


class ArchitectureError(AprtError):
    """The architecture is unknown, or model and oracle are of different kinds."""


class CaptureError(AprtError):
    """A runner or an engine yielded stages that cannot be a capture; ``test`` is the self-test."""

    def __init__(self, text: str, test: str = "capture") -> None:
        super().__init__(text)
        self.test = test


class EngineError(AprtError):
    """An engine in a process of its own does not start, fails, or takes too long."""


class ContractError(AprtError):
    """A contract or a ledger cannot be read, or states what cannot be.

    ``rule`` is the id of the schema's rule that is broken, where it is one.
    """

    def __init__(self, text: str, rule: str | None = None) -> None:
        super().__init__(text)
        self.rule = rule


def blame(error: BaseException) -> str:
    """Return one line for an error in a user's own code: type, text, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or "no message"
    where = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    return f"{type(error).__name__}: {text} ({where})"
