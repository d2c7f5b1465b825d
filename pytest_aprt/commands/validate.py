"""``aprt validate``: contracts against the rules of their schema, and what it leaves open."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", metavar="CONTRACT", type=Path, nargs="+",
                        help="a contract, or a folder of them")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, schema aprt-validate-v1")
    parser.add_argument("--base", metavar="REV",
                        help="warn of statuses raised since this git revision while the version "
                        "stayed")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print every violation; 1 where there is an error, 2 where there is no contract.

    Raises:
        AprtError: the base revision cannot be read.
    """
    from pytest_aprt.contracts.validate import as_json, as_text, validate

    result = validate(arguments.paths, arguments.base)
    print((as_json if arguments.json else as_text)(result), end="")
    return result.exit_code
