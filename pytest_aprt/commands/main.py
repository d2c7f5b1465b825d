"""What the console script ``aprt`` runs: the table of subcommands and their exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

from pytest_aprt.commands import diff, ledger, report, trace, validate
from pytest_aprt.errors import AprtError

OK, MISSED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class Command(NamedTuple):
    """A subcommand; ``run`` returns the exit code, and raises AprtError on bad input."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = (
    Command("trace", "run a model and save its stages as APRT tensors",
            trace.add_arguments, trace.run),
    Command("diff", "compare two APRT tensors, or two folders of them",
            diff.add_arguments, diff.run),
    Command("report", "draw report.html again from a report.json",
            report.add_arguments, report.run),
    Command("validate", "check contracts against the rules of their schema",
            validate.add_arguments, validate.run),
    Command("ledger", "show what the runs in a ledger support of the claims of contracts",
            ledger.add_arguments, ledger.run),
)  # fmt: skip
"""Every subcommand. A module imports numpy and torch when it runs, not before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    0; 1 where a threshold is missed or a contract is not valid; 2 on bad input.
    """
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except AprtError as error:
        print(f"aprt {arguments.command}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"aprt {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # a reader such as head had enough; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aprt",
        description="Forward-pass parity of language models: stages on disk.",
        epilog="exit codes: 0; 1 a threshold is missed, or a contract is not valid; 2 the input "
        "cannot be used",
    )
    parser.add_argument(
        "--version", action="version", version=f"aprt (pytest-aprt {version('pytest-aprt')})"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
