"""What bad input, a broken engine and an interrupt come to: one line, exit 4 or 2, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from short_summary import one_line, summary

TWO = [[], ["-n2"]]


@pytest.mark.parametrize("workers", TWO, ids=["alone", "-n2"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise RuntimeError('no device\\nat all')",
         "the hook pytest_aprt_model raised RuntimeError: no device at all (conftest.py:2 in "
         "pytest_aprt_model)"),
        ("import pytest; pytest.skip('no device')",
         "the hook pytest_aprt_model raised Skipped: no device ("),
    ],
    ids=["raises", "skips"],
)  # fmt: skip
def test_a_hook_that_raises(healthy, body, says, workers):
    healthy.pytester.makeconftest(f"\ndef pytest_aprt_model(config):\n    {body}\n")
    assert says in one_line(healthy(*workers))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("python:absent:engine", "there is no module absent; expected one that is installed, or "),
        ("python:absent.part:engine", "there is no module absent.part; expected one that "),
        ("python:broken:engine", "importing broken raised ZeroDivisionError: division by zero ("),
        ("python:leaves:engine", "importing leaves raised SystemExit: 3 (leaves.py:1 in <module>)"),
        ("python:own:absent", "module own has no function absent; expected python:module:factory"),
        ("python:own:raising", "raising() raised ValueError: no such device (own.py:2 in raising)"),
        ("python:own:nothing", "nothing() returned None; expected an engine"),
        ("python:own", "--aprt-model=python:own is not valid: expected python:module:factory"),
        ("python:own:a.b", "--aprt-model=python:own:a.b is not valid: expected python:module:"),
    ],
)
def test_a_factory_that_is_none(healthy, source, says):
    healthy.pytester.makepyfile(
        broken="1 / 0\n",
        leaves="raise SystemExit(3)\n",
        own="def raising():\n    raise ValueError('no such device')\n\ndef nothing():\n    pass\n",
    )
    gguf = healthy.pair[0].replace("--aprt-model=", "--aprt-weights=")
    assert says in one_line(healthy(gguf, f"--aprt-model={source}"))


def test_a_factory_that_is_none_with_two_workers(healthy):
    gguf = healthy.pair[0].replace("--aprt-model=", "--aprt-weights=")
    assert "there is no module absent" in one_line(
        healthy(gguf, "--aprt-model=python:absent:engine", "-n2")
    )


@pytest.mark.parametrize("workers", TWO, ids=["alone", "-n2"])
def test_a_factory_in_the_current_folder_and_the_last_failed(faulty, workers):
    faulty.path.joinpath("conftest.py").rename(faulty.path / "own_engine.py")
    gguf = faulty.pair[0].replace("--aprt-model=", "--aprt-weights=")
    args = [gguf, "--aprt-model=python:own_engine:engine", *workers]
    faulty(*args).assert_outcomes(failed=2, passed=95, skipped=24, xfailed=20)
    faulty(*args, "--lf").assert_outcomes(failed=2, deselected=None)
    assert faulty.runs() == 2


def test_an_engine_that_raises_is_inconclusive_and_says_why(faulty):
    conftest = faulty.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("value * 1.25", "value / missing"))
    result = faulty()
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["FAILED aprt::selftest-capture*", summary("aprt::gate", "INCONCLUSIVE: *")]
    )
    assert "NameError: name 'missing' is not defined (conftest.py:" in result.stdout.str()


@pytest.mark.parametrize("workers", TWO, ids=["alone", "-n2"])
def test_a_report_that_cannot_be_written(healthy, workers):
    healthy.path.joinpath("taken").write_text("a file")
    assert "cannot write taken/report.json" in one_line(healthy("--aprt-report=taken", *workers))


def test_a_disk_too_small_for_the_captures(healthy, monkeypatch):
    def full(path, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    healthy.pytester.makepyfile("def test_mine(aprt_model):\n    pass\n")
    said = one_line(healthy("test_a_disk_too_small_for_the_captures.py"))
    assert "No space left on device; a test asks for aprt_model" in said


@pytest.fixture
def interruptible():
    """A shell has its background jobs ignore SIGINT, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPTING = """
    import os, signal
    from pathlib import Path

    def engine_that_stops(tokens):
        yield 0, {}
        os.kill(os.getpid(), signal.SIGINT)
        yield 1, {}

    class Stopping:
        layers = staticmethod(engine_that_stops)

    def pytest_aprt_model(config):
        return Stopping()
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("workers", TWO, ids=["alone", "-n2"])
def test_an_interrupt_while_the_models_run(healthy, monkeypatch, workers):
    temporary = healthy.path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    healthy.pytester.makeconftest(INTERRUPTING)
    healthy.pytester.makeini("[pytest]\nfilterwarnings = error\n")
    result = healthy("--aprt-report=out", "--aprt-dump=all/dumps", *workers, subprocess=True)
    assert result.ret == 2
    text = result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in text and "Traceback" not in text
    assert not (healthy.path / "out").exists()
    assert not (healthy.path / "all").exists()
    assert list(temporary.glob("aprt-*")) == []


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("workers", TWO, ids=["alone", "-n2"])
def test_an_interrupt_while_the_tests_run(faulty, monkeypatch, workers):
    temporary = faulty.path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    faulty.pytester.makepyfile(
        """
        import os, signal

        def test_that_interrupts(aprt_model):
            controller = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            os.kill(controller, signal.SIGINT)
            import time; time.sleep(5)
        """
    )
    name = "test_an_interrupt_while_the_tests_run.py"
    result = faulty("--aprt-report=out", name, *workers, subprocess=True)
    assert result.ret == 2
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert json.loads((faulty.path / "out" / "report.json").read_text())["points"]
    assert [path.name for path in (faulty.path / "out").iterdir() if path.name[0] == "."] == []
    assert list(temporary.glob("aprt-*")) == []


def test_a_terminated_controller_leaves_no_folder(faulty, monkeypatch):
    temporary = faulty.path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    faulty.pytester.makepyfile(
        test_mine="""
        import time

        def test_slow(aprt_model):
            open("started", "w").close()
            time.sleep(60)
        """
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *faulty.pair, "--aprt-tokens=1,2,3", "test_mine.py"],
        cwd=faulty.path,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (faulty.path / "started").exists():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    assert len(list(temporary.glob("aprt-*"))) == 1
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == -signal.SIGTERM
    assert list(temporary.glob("aprt-*")) == []
