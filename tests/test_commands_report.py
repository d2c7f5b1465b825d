"""``aprt report``: the page again, from the JSON alone."""

from __future__ import annotations

import pytest
from report_cases import report_of

from pytest_aprt import report as reports
from pytest_aprt.commands.main import main
from pytest_aprt.render import html


@pytest.mark.parametrize("named", [True, False])
def test_the_page_is_what_the_run_would_have_written(tmp_path, capsys, named):
    source = tmp_path / "kept.json"
    reports.write(report_of("fault"), source)
    page = tmp_path / ("page.html" if named else "report.html")
    assert main(["report", str(source), *(["-o", str(page)] if named else [])]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == html.render(report_of("fault"))


def test_what_is_no_report_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    assert main(["report", str(tmp_path / "r.json")]) == 2
    assert capsys.readouterr().err == (
        f"aprt report: error: {tmp_path / 'r.json'} is no aprt-report-v1 report: its schema is "
        "None; expected a report.json of --aprt-report (schema aprt-report-v1)\n"
    )
    assert not (tmp_path / "report.html").exists()
