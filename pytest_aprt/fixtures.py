"""Fixtures for the tests of a user's own; without ``--aprt-model`` the tests that ask are skipped.

The models have run before the first test; these fixtures only read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from pytest_aprt.captures import Captures
    from pytest_aprt.report import Report
    from pytest_aprt.workbench import Workbench

T = TypeVar("T")

_NO_MODEL = "no model under test: give --aprt-model and --aprt-oracle"


@pytest.fixture(scope="session")
def aprt_run(pytestconfig: pytest.Config) -> Report:
    """The finished run: the content of report.json (schema ``aprt-report-v1``)."""
    return _read(pytestconfig, lambda workbench: workbench.report)


@pytest.fixture(scope="session")
def aprt_model(pytestconfig: pytest.Config) -> Captures:
    """The captured stages of the model under test, by point, as float32 arrays."""
    return _read(pytestconfig, lambda workbench: workbench.captures("model"))


@pytest.fixture(scope="session")
def aprt_oracle(pytestconfig: pytest.Config) -> Captures:
    """The captured stages of the oracle, by point, as float32 arrays."""
    return _read(pytestconfig, lambda workbench: workbench.captures("oracle"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``aprt_point`` once for every selected point."""
    if "aprt_point" not in metafunc.fixturenames:
        return
    workbench = _workbench(metafunc.config)
    if workbench is None:
        none = pytest.param(None, id="no-model", marks=pytest.mark.skip(reason=_NO_MODEL))
        metafunc.parametrize("aprt_point", [none])
    else:
        metafunc.parametrize("aprt_point", workbench.points, ids=str)


def _workbench(config: pytest.Config) -> Workbench | None:
    if "pytest_aprt.workbench" not in sys.modules:
        return None
    from pytest_aprt.workbench import workbench_of

    return workbench_of(config)


def _read(config: pytest.Config, read: Callable[[Workbench], T]) -> T:
    from pytest_aprt.errors import AprtError

    workbench = _workbench(config)
    if workbench is None:
        pytest.skip(_NO_MODEL)
    try:
        return read(workbench)
    except AprtError as error:
        pytest.fail(str(error), pytrace=False)
