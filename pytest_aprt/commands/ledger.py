"""``aprt ledger``: what the runs in a ledger support, beside what the contracts declare."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_aprt.errors import SettingsError

if TYPE_CHECKING:
    from pytest_aprt.ledger.record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("ledger", metavar="FILE", type=Path, help="a ledger, as --aprt-ledger "
                        "writes it")  # fmt: skip
    parser.add_argument("--contracts", metavar="DIR", type=Path, action="append",
                        help="the contracts, repeatable; default contracts/")  # fmt: skip
    parser.add_argument("--since", metavar="BASE",
                        help="tell changes since a time such as 2026-11-24 or an older copy of the "
                        "ledger")  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true",
                      help="print JSON, schema aprt-ledger-summary-v1")  # fmt: skip
    form.add_argument("--markdown", action="store_true", help="print Markdown for a repository")


def run(arguments: argparse.Namespace) -> int:
    """Print the summary; 1 where a falsifier is falsified or overstated.

    Raises:
        AprtError: ledger or contracts cannot be read, or there is no record.
    """
    from pytest_aprt.ledger import render
    from pytest_aprt.ledger.record import read
    from pytest_aprt.ledger.summary import as_json, contracts_by_name, summarise

    records, problems = read(arguments.ledger)
    folders = arguments.contracts or [Path("contracts")]
    contracts = contracts_by_name(Path.cwd(), folders)
    base = None if arguments.since is None else _base(arguments.since, records)
    summary = summarise(contracts, records, problems, base=base, since=arguments.since)
    if arguments.json:
        print(json.dumps(as_json(summary), indent=1))
    else:
        print((render.markdown if arguments.markdown else render.text)(summary), end="")
    return 1 if summary.flagged else 0


def _base(since: str, records: list[Record]) -> list[Record]:
    from pytest_aprt.ledger.record import read

    if Path(since).exists():
        return read(Path(since))[0]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\+00:00)?)?)?", since):
        raise SettingsError(
            f"--since={since} is not valid: expected a UTC time such as 2026-11-24 or "
            "2026-11-24T12:00, or the path of an older ledger"
        )
    return [record for record in records if record.time_utc < since]
