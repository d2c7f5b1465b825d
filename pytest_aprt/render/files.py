"""The files of a report: report.json, and what is drawn from it alone."""

from __future__ import annotations

from pathlib import Path

from pytest_aprt import report as reports
from pytest_aprt.errors import SettingsError
from pytest_aprt.report import Report


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into a folder, which is made.

    Raises:
        SettingsError: the folder cannot be made or written.
    """
    reports.write(report, folder / "report.json")
    draw(report, folder)


def draw(report: Report, folder: Path) -> None:
    """Write report.md and report.html into a folder.

    Raises:
        SettingsError: they cannot be written.
    """
    from pytest_aprt.render import html, markdown  # html loads matplotlib

    reports.write_text(folder / "report.md", markdown.render(report))
    reports.write_text(folder / "report.html", html.render(report))


def add_step_summary(report: Report | None, path: Path) -> None:
    """Add report.md to the summary of a GitHub step, which may hold that of others already.

    Without a report it is only tried whether the file can be written.

    Raises:
        SettingsError: the file cannot be written.
    """
    from pytest_aprt.render import markdown

    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("" if report is None else markdown.render(report) + "\n")
    except OSError as error:
        raise SettingsError(
            f"cannot write GITHUB_STEP_SUMMARY={path}: {error.strerror}; expected a file that a "
            "GitHub step may add to"
        ) from error


def redraw(source: Path, page: Path) -> None:
    """Draw report.html again from a report.json.

    Raises:
        SettingsError: ``source`` is no report, or ``page`` cannot be written.
    """
    from pytest_aprt.render import html

    reports.write_text(page, html.render(reports.read(source)))
