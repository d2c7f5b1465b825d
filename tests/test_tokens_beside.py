"""The tokens rung in a process of its own: the same rows, whatever becomes of the process."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from harness import FIXTURES, fixture_pair

from pytest_aprt import beside
from pytest_aprt.errors import EngineError
from pytest_aprt.pair import open_headers
from pytest_aprt.rungs.tokens import token_rows
from pytest_aprt.settings import read_settings

MODEL, ORACLE = (str(FIXTURES / "tiny-qwen2" / name) for name in ("q4_k_m.gguf", "hf"))
TEXT = "What is 2+2?"


def settings_of(**options):
    given = {"aprt_model": MODEL, "aprt_oracle": ORACLE, "aprt_prompt": [TEXT], **options}
    return read_settings(given.get, command="pytest")


@pytest.fixture(scope="module")
def pair():
    return fixture_pair("qwen2")


@pytest.fixture
def pays(monkeypatch):
    monkeypatch.setattr(beside, "_pays", lambda headers, settings: True)


def test_another_process_finds_the_same_rows(pair, pays, monkeypatch):
    monkeypatch.setattr(
        "pytest_aprt.rungs.tokens.token_rows", lambda *given: pytest.fail("was judged here")
    )
    with beside.tokens_beside(open_headers(MODEL, ORACLE), settings_of()) as tokens:
        found = tokens(pair, [TEXT])
    assert found == token_rows(pair, [TEXT])


def ended(child):
    raise EngineError("ended")


ANSWERS = {
    "ended": ended,
    "no JSON": lambda child: b"Traceback\n",
    "other prompts": lambda child: json.dumps({"prompts": ["other"], "rows": []}).encode(),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_none_is_made_up_for(answer, pair, pays, monkeypatch):
    monkeypatch.setattr(beside.Child, "line", ANSWERS[answer])
    with beside.tokens_beside(open_headers(MODEL, ORACLE), settings_of()) as tokens:
        assert tokens(pair, [TEXT]) == token_rows(pair, [TEXT])


def test_a_process_that_cannot_be_started_is_made_up_for(pair, pays, monkeypatch):
    def refused(child):
        raise OSError("no more processes")

    monkeypatch.setattr(beside.Child, "__enter__", refused)
    with beside.tokens_beside(open_headers(MODEL, ORACLE), settings_of()) as tokens:
        assert tokens(pair, [TEXT]) == token_rows(pair, [TEXT])


def test_the_process_ends_with_a_run_that_fails(pays):
    started = []
    enter = beside.Child.__enter__
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="broken"),
    ):
        patch.setattr(beside.Child, "__enter__", lambda c: started.append(c) or enter(c))
        with beside.tokens_beside(open_headers(MODEL, ORACLE), settings_of()):
            raise ValueError("broken")
    assert started[0]._process.poll() is not None


CASES = {
    # name: vocabulary, cores, threads, modules, whether a process pays
    "a large vocabulary": (152_064, 2, 0, {}, True),
    "a small vocabulary": (1_000, 2, 0, {}, False),
    "one core": (152_064, 1, 0, {}, False),
    "one thread asked for": (152_064, 2, 1, {}, False),
    "transformers at hand": (152_064, 2, 0, {"transformers": None}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_process_is_started_where_it_pays(case, monkeypatch):
    vocabulary, cores, threads, modules, pays = CASES[case]
    headers = open_headers(MODEL, ORACLE)
    monkeypatch.setitem(headers.model.__dict__, "facts", SimpleNamespace(vocab=vocabulary))
    monkeypatch.setattr(beside, "available_cores", lambda: cores)
    monkeypatch.setattr(beside, "sys", SimpleNamespace(modules=modules))
    assert beside._pays(headers, settings_of(aprt_threads=str(threads))) == pays


RUN = """
import sys, pytest
from pytest_aprt import beside
beside.LARGE, beside.available_cores = 0, lambda: 2
line = beside.Child.line
beside.Child.line = lambda child: print("ANSWERED") or line(child)
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_whole_run(tmp_path):
    command = [sys.executable, "-c", RUN, "-q", "-s", "-p", "no:cacheprovider", "-c", "/dev/null",
               f"--rootdir={tmp_path}", f"--aprt-model={MODEL}", f"--aprt-oracle={ORACLE}",
               f"--aprt-report={tmp_path}", "--aprt-decode-steps=0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ANSWERED") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["status"] for row in report["ladder"]["tokens"]} == {"pass"}
