"""What a process of its own does: the same answers and drawings, whatever becomes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from harness import FIXTURES, fixture_pair
from report_cases import report_of

from pytest_aprt import beside
from pytest_aprt.errors import EngineError, SourceError
from pytest_aprt.pair import open_headers
from pytest_aprt.render import files
from pytest_aprt.report import write
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


@pytest.fixture
def not_here(monkeypatch):
    for name in ("pytest_aprt.rungs.tokens.token_rows", "pytest_aprt.beside.tokenizer_of"):
        monkeypatch.setattr(name, lambda *given: pytest.fail("was done here"))


def test_another_process_finds_the_same_rows(pair, pays, request):
    expected = token_rows(pair, [TEXT])
    request.getfixturevalue("not_here")
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        process.judge([TEXT])
        assert process.rows(pair, [TEXT]) == expected


def test_another_process_stands_in_for_the_tokenizer(pair, pays, not_here):
    own = pair.tokenizer
    ids = list(own(TEXT)["input_ids"])
    special = [int(own.eos_token_id), *ids]
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        lent = process.tokenizer(pair.oracle.path)
        assert lent(TEXT)["input_ids"] == ids
        assert lent.decode(special) == own.decode(special)
        assert lent.decode(special, skip_special_tokens=True) == TEXT
        assert [*map(lent.convert_ids_to_tokens, ids)] == own.convert_ids_to_tokens(ids)
        process.judge([TEXT])
        process.rows(pair, [TEXT])
        assert lent(TEXT)["input_ids"] == ids  # and goes on after the rung


def ended(child):
    raise EngineError("ended")


ANSWERS = {
    "ended": ended,
    "no JSON": lambda child: b"Traceback\n",
    "no answer": lambda child: b"1\n",
    "empty": lambda child: b"\n",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_none_is_made_up_for(answer, pair, pays, monkeypatch):
    monkeypatch.setattr(beside.Child, "line", ANSWERS[answer])
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        lent = replace(pair, lent_tokenizer=process.tokenizer(pair.oracle.path))
        process.judge([TEXT])
        assert process.rows(lent, [TEXT]) == token_rows(pair, [TEXT])
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        lent = process.tokenizer(pair.oracle.path)
        assert lent(TEXT)["input_ids"] == list(pair.tokenizer(TEXT)["input_ids"])
        assert lent.decode([5, 6]) == pair.tokenizer.decode([5, 6])
        assert lent.convert_ids_to_tokens(5) == pair.tokenizer.convert_ids_to_tokens(5)


def test_rows_of_other_prompts_are_not_taken(pair, pays):
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        process.judge(["other"])
        assert process.rows(pair, [TEXT]) == token_rows(pair, [TEXT])


def test_what_is_asked_during_the_rung_is_answered_here(pair, pays):
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        lent = process.tokenizer(pair.oracle.path)
        process.judge([TEXT])
        assert lent.decode([5, 6]) == pair.tokenizer.decode([5, 6])
        assert process.rows(pair, [TEXT]) == token_rows(pair, [TEXT])


def test_a_process_that_was_killed_is_made_up_for(pair, pays):
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        process._child._process.kill()
        process._child._process.wait()
        lent = process.tokenizer(pair.oracle.path)
        assert lent(TEXT)["input_ids"] == list(pair.tokenizer(TEXT)["input_ids"])
        process.judge([TEXT])
        assert process.rows(pair, [TEXT]) == token_rows(pair, [TEXT])


def test_a_process_that_cannot_be_started_is_made_up_for(pair, pays, monkeypatch):
    def refused(child):
        raise OSError("no more processes")

    monkeypatch.setattr(beside.Child, "__enter__", refused)
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        assert process.tokenizer(pair.oracle.path) is None
        process.judge([TEXT])
        assert process.rows(pair, [TEXT]) == token_rows(pair, [TEXT])


@pytest.fixture(scope="module")
def report():
    return report_of("fault")


@pytest.fixture
def kept(report, tmp_path):
    """Where a report lies that is to be drawn."""
    write(report, tmp_path / "report.json")
    return tmp_path


def drawings(folder):
    return [(folder / name).read_bytes() for name in ("report.md", "report.html")]


def test_another_process_draws_the_same(report, kept, pays, monkeypatch, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    files.draw(report, here)
    monkeypatch.setattr(files, "draw", lambda *given: pytest.fail("was drawn here"))
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        process.draw(kept)
        process.drawn(report, kept)
    assert drawings(kept) == drawings(here)


def killed(process):
    process._child._process.kill()
    process._child._process.wait()


def with_a_broken_report(process):
    process._send("draw", "/nowhere")


@pytest.mark.parametrize("before", [killed, with_a_broken_report])
def test_a_drawing_that_fails_is_made_up_for(before, report, kept, pays):
    with beside.started(open_headers(MODEL, ORACLE), settings_of()) as process:
        before(process)
        process.draw(kept)
        process.drawn(report, kept)
    assert all(drawings(kept))


def test_without_a_process_it_is_drawn_here(report, kept):
    process = beside.Beside()
    process.draw(kept)
    process.drawn(report, kept)
    assert all(drawings(kept))


def test_an_oracle_without_a_tokenizer_is_refused_as_without_a_process(pays, tmp_path):
    bare = tmp_path / "hf"
    shutil.copytree(ORACLE, bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    with (
        beside.started(open_headers(MODEL, str(bare)),
                             settings_of(aprt_oracle=str(bare))) as process,
        pytest.raises(SourceError, match="no tokenizer that transformers can load"),
    ):  # fmt: skip
        process.tokenizer(bare)(TEXT)


def test_the_process_ends_with_a_run_that_fails(pays):
    started = []
    enter = beside.Child.__enter__
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="broken"),
    ):
        patch.setattr(beside.Child, "__enter__", lambda c: started.append(c) or enter(c))
        with beside.started(open_headers(MODEL, ORACLE), settings_of()):
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
beside.LARGE = 0
beside.available_cores = lambda: 2
line = beside.Child.line
beside.Child.line = lambda child: print("ANSWERED") or line(child)
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(tmp_path, *more, at_least=0):
    code = RUN.replace("LARGE = 0", f"LARGE = {at_least}")
    command = [sys.executable, "-c", code, "-q", "-s", "-p", "no:cacheprovider", "-c", "/dev/null",
               f"--rootdir={tmp_path}", f"--aprt-model={MODEL}", f"--aprt-oracle={ORACLE}",
               f"--aprt-report={tmp_path}", "--aprt-decode-steps=0", *more]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_a_whole_run(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ANSWERED") > 3  # prompt, rung, the highest tokens, drawings
    assert done.stdout.rindex("ANSWERED") > done.stdout.index("....")  # drawn while tests ran
    assert all(drawings(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["status"] for row in report["ladder"]["tokens"]} == {"pass"}
    assert all(top["token"] for row in report["ladder"]["logits"]
               for side in row.get("top", {}).values() for top in side)  # fmt: skip


@pytest.mark.parametrize("ends", [["-x"], ["--maxfail=1"]])
def test_a_run_that_ends_early_is_drawn(ends, tmp_path):
    done = run(tmp_path, "--aprt-strict", "--aprt-min-cosine=1", *ends)
    assert done.returncode == 1 and "stopping after 1 failures" in done.stdout
    assert all(drawings(tmp_path))


@pytest.mark.parametrize("place", ["report.md", "report.html"])
def test_a_page_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / place / "full").mkdir(parents=True)
    done = run(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("ERROR"))
    assert place in line and "Traceback" not in said and "INTERNALERROR" not in said


@pytest.mark.parametrize("at_least", [0, 10**9], ids=["by another process", "by this one"])
def test_a_test_may_change_the_folder(at_least, tmp_path):
    """What is drawn at the end lies beside report.json."""
    (tmp_path / "elsewhere").mkdir()
    own = "import os\ndef test_own(aprt_run):\n    os.chdir('elsewhere')\n"
    (tmp_path / "test_own.py").write_text(own)
    done = run(tmp_path, "test_own.py", "--aprt-report=kept", at_least=at_least)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("ANSWERED" in done.stdout) == (at_least == 0)
    assert all(drawings(tmp_path / "kept"))
