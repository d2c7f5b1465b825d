"""Other plugins that a user's suite has installed: all at once, and each with its own option."""

from __future__ import annotations

import pytest

OTHERS = ("html", "metadata", "pytest_cov", "randomly", "timeout")
ALL = {"failed": 2, "passed": 95, "skipped": 24, "xfailed": 20}


def failed_ids(result):
    return {line.split()[1] for line in result.outlines if line.startswith("FAILED")}


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "-n2"])
def test_all_at_once(faulty, workers):
    result = faulty(
        "--html=report.html", "--timeout=60", "--cov=conftest", "-p", "randomly", *workers,
        plugins=OTHERS,
    )  # fmt: skip
    assert result.ret == 1
    result.assert_outcomes(**ALL)
    assert failed_ids(result) == {"aprt::L01-ffn_silu", "aprt::gate"}
    assert faulty.runs() == 1
    assert "L01-ffn_silu: local rel_l2 2.5e-01" in (faulty.path / "report.html").read_text()
    result.stdout.fnmatch_lines(["*coverage: *", "conftest.py *"])


def test_an_order_shuffled_at_random(faulty):
    orders = []
    for seed in (1, 2):
        result = faulty("-v", "-p", "randomly", f"--randomly-seed={seed}", plugins=["randomly"])
        result.assert_outcomes(**ALL)
        assert failed_ids(result) == {"aprt::L01-ffn_silu", "aprt::gate"}
        orders.append([line.split()[0] for line in result.outlines if line.startswith("aprt::")])
    assert sorted(orders[0]) == sorted(orders[1])
    assert faulty.runs() == 2


def test_a_timeout_is_for_tests_and_not_for_the_models(faulty):
    """The engine takes longer than any test may; the models run before the tests."""
    conftest = faulty.path / "conftest.py"
    slow = "import time\n        time.sleep(1.5)\n        yield from super()"
    conftest.write_text(conftest.read_text().replace("yield from super()", slow))
    result = faulty("--timeout=1", plugins=["timeout"])
    result.assert_outcomes(**ALL)
