"""``aprt report``: report.html, drawn again from a report.json alone."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="JSON", type=Path,
                        help="a report.json that pytest --aprt-report wrote")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="HTML", type=Path,
                        help="the page to write; default: report.html beside JSON")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Draw the page and say where it is.

    Raises:
        SettingsError: the source is no report, or the page cannot be written.
    """
    from pytest_aprt.render.files import redraw

    page = arguments.output or arguments.source.with_name("report.html")
    redraw(arguments.source, page)
    print(page)
    return 0
