"""Programs as engines: what they are told, what becomes of their dumps, and how they may fail."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import FIXTURES, TOKENS, fixture_pair, verdict_of

from pytest_aprt.arithmetic import profile_named
from pytest_aprt.engines.command import Command, values_of
from pytest_aprt.engines.command_line import PLACEHOLDERS, CommandLine
from pytest_aprt.errors import EngineError, SettingsError, SourceError
from pytest_aprt.measure import measure_pair
from pytest_aprt.process import finished
from pytest_aprt.readings import Prompt
from pytest_aprt.selftest import SelfTest
from pytest_aprt.sources.aprt import WHOLE_MODEL, write_tensor

GGUF = FIXTURES / "tiny-qwen2" / "q4_k_m.gguf"
OTHER = (*TOKENS[:-1], 10)
TRACE = (
    "-c 'from pytest_aprt.commands.main import main; raise SystemExit(main())' trace {model} "
    "--save-tensor {stages} --save-tensor-dir {out} --save-tensor-layers {layers} --tokens {tokens}"
)


@pytest.fixture(scope="module")
def pair():
    return fixture_pair()


@pytest.fixture
def program(pair, tmp_path, monkeypatch):
    """Makes an engine of a Python script, or of options for ``python`` itself."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    monkeypatch.setenv("PYTHONPATH", paths)  # of this pytest's own package

    def program(script, arguments="{out}", prompts=(TOKENS,), timeout_s=60.0, texts="", **options):
        path = tmp_path / "engine.py"
        path.write_text(script)
        start = f"{path} " if script else ""
        line = CommandLine.parse(f"{sys.executable} {start}{arguments}", options)
        asked = [Prompt(text=texts, tokens=tokens) for tokens in prompts]
        return Command(line, values_of(pair, str(GGUF), str(GGUF)), pair, asked, timeout_s)

    return program


def failure(engine):
    with pytest.raises(EngineError) as error:
        list(engine.layers(TOKENS))
    text = str(error.value)
    assert "\n" not in text
    return text


def self_tests(pair, engine, tokens=TOKENS) -> dict[str, SelfTest]:
    prompts = [Prompt(text="", tokens=tokens)]
    result = measure_pair(pair, engine, prompts, pair.graph.points, profile_named("auto"))
    return {test.name: test for test in result.self_tests}


# What works


def test_aprt_trace_is_an_engine(pair, program):
    verdict = verdict_of(pair, program("", TRACE))
    assert verdict.status == "QUANTISATION_NOISE", verdict.summary
    assert {judged.status for judged in verdict.points} == {"noise", "pass"}


@pytest.fixture
def dumped(pair, tmp_path):
    """A dump without manifest, of the NumPy engine with a fault in layer 1."""
    faults = {(1, "ffn_silu"): lambda value, workings: value * 1.25}
    engine = harness.NumpyEngine(pair.model_weights, pair.oracle_facts, pair.architecture, faults)
    for layer, stages in engine.layers(TOKENS):
        place = tmp_path / "dump" / ("" if layer is None else f"layer-{layer}")
        for stage, value in stages.items():
            write_tensor(place / f"{stage}.bin", WHOLE_MODEL if layer is None else layer, value)
    return tmp_path / "dump"


COPY = "import shutil, sys; shutil.copytree(sys.argv[2], sys.argv[1], dirs_exist_ok=True)"


def test_a_fault_in_what_a_program_dumps_is_found(pair, program, dumped):
    verdict = verdict_of(pair, program(COPY, f"{{out}} {dumped}"))
    assert harness.origins_of(verdict) == ["L01-ffn_silu"]


def test_every_placeholder_is_filled_and_nothing_else_is_expanded(pair, program, tmp_path):
    said = tmp_path / "said"
    script = f"import sys; open({str(said)!r}, 'w').write('\\n'.join(sys.argv[1:])); sys.exit(3)"
    names = " ".join(f"{name}={{{name}}}" for name in PLACEHOLDERS)
    arguments = f"{names} rope={{rope}} $HOME '$(id) ; a' '*' {{\"a\":1}} > x"
    failure(program(script, arguments, texts="two words; ${x}", rope="1e4"))
    found = said.read_text().splitlines()
    values = dict(line.split("=", 1) for line in found[: len(PLACEHOLDERS) + 1])
    assert Path(values.pop("out")).name.startswith("aprt-")
    assert values == {
        "model": str(GGUF),
        "weights": str(GGUF),
        "oracle": str(pair.oracle.path),
        "stages": ",".join(stage.name for stage in pair.graph.stages),
        "layers": "0..4",
        "tokens": ",".join(map(str, TOKENS)),
        "prompt": "two words; ${x}",
        "rope": "1e4",
    }
    assert found[len(PLACEHOLDERS) + 1 :] == ["$HOME", "$(id) ; a", "*", "{a:1}", ">", "x"]


def test_nothing_is_left_of_a_dump(program, dumped, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    layers = program(COPY, f"{{out}} {dumped}").layers(TOKENS)
    next(layers)
    assert len(list((tmp_path / "here").iterdir())) == 1
    layers.close()
    assert list((tmp_path / "here").iterdir()) == []


# Another prompt's dump gives no verdict


def test_a_dump_of_other_tokens_without_a_manifest(pair, program, dumped):
    engine = program(COPY, f"{{out}} {dumped}", prompts=(OTHER,))
    found = self_tests(pair, engine, OTHER)["tokens"]
    assert not found.passed
    assert "the dump is another prompt's: row 6 of its embedding is that of token 9" in found.detail


def test_a_dump_of_other_tokens_with_a_manifest(pair, program):
    engine = program("", TRACE.replace("{tokens}", "1,2,3"))
    found = self_tests(pair, engine)["tokens"]
    assert not found.passed
    assert "ran the tokens [1, 2, 3], as its dump says, expected [3, 77, " in found.detail


# What fails


def test_a_program_that_fails_is_shown_with_what_it_printed(program):
    script = "import sys; print('loading'); sys.stderr.write('no kernel for q4_k\\n'); sys.exit(7)"
    text = failure(program(script))
    assert "ended with exit code 7: loading | no kernel for q4_k (run as " in text


def test_a_program_that_crashes(program):
    text = failure(program("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert "was ended by SIGSEGV: it printed nothing" in text


NOISY = {
    # what a program may print: what its error shows of it
    "bytes that are no text": (
        r"b'\xff bad \x00 nul \x1b[31mred\n'",
        "\ufffd bad   nul  red (run as",
    ),
    "a line without end": ("b'y' * 10_000_000", f"{'y' * 300} ... (run as"),
    "lines without end": (
        "b'loading\\n' * 5_000_000",
        "loading | loading | loading | loading (run",
    ),
}


@pytest.mark.parametrize("printed", NOISY)
def test_what_is_printed_is_cut_to_one_plain_line(program, printed):
    said, shown = NOISY[printed]
    text = failure(program(f"import sys; sys.stdout.buffer.write({said}); sys.exit(1)"))
    assert f"ended with exit code 1: {shown}" in text
    assert text.isprintable() and len(text) < 2000


def test_little_of_a_long_output_is_read():
    script = "import sys; sys.stdout.write('x' * 10_000_000)"
    code, output = finished([sys.executable, "-c", script], 60)
    assert (code, len(output)) == (0, 1 << 16)


def test_an_argument_that_no_program_can_be_given(program):
    text = failure(program("", "{out} a\0b"))
    assert text.endswith("cannot be started: embedded null byte")


def test_a_tensor_that_was_not_finished(program):
    script = "import os, sys; os.mkdir(sys.argv[1] + '/layer-0'); "
    script += "open(sys.argv[1] + '/layer-0/ffn_up.bin', 'wb').write(b'APRT' + bytes(12))"
    with pytest.raises(SourceError, match=r"layer-0/ffn_up\.bin: expected "):
        list(program(script).layers(TOKENS))


def test_a_part_of_the_stages_is_judged_and_the_rest_is_missing(pair, program, dumped):
    for path in dumped.rglob("*.bin"):
        if path.stem not in ("ffn_gate", "ffn_silu", "post_ffn_residual"):
            path.unlink()
    verdict = verdict_of(pair, program(COPY, f"{{out}} {dumped}"))
    assert harness.origins_of(verdict) == ["L01-ffn_silu"]
    missing = [judged for judged in verdict.points if judged.status == "missing"]
    assert len(missing) == len(verdict.points) - 12


def test_a_program_that_writes_no_dump(program):
    text = failure(program("print('saved to elsewhere')"))
    assert "ended well, but wrote no dump to {out}: " in text
    assert "(what it printed: saved to elsewhere)" in text


def test_a_program_that_cannot_be_started(pair, tmp_path):
    path = tmp_path / "engine"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o700)
    line = CommandLine.parse(f"{path} {{out}}", {})
    engine = Command(line, values_of(pair, "m", "m"), pair, [Prompt(text="", tokens=TOKENS)])
    assert failure(engine).startswith(f"{path} cannot be started: Exec format error")


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_program_that_takes_too_long_ends_with_its_children(program):
    text = failure(program(SLOW, timeout_s=2))
    assert "was stopped after 2 s: " in text
    assert "; --aprt-engine-timeout gives it longer" in text
    child = int(text.partition("was stopped after 2 s: ")[2].partition(";")[0])
    assert _ends(child)


@pytest.fixture
def interruptible():
    """In a background job SIGINT is ignored, unless somebody wants it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_program(program, tmp_path):
    script = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT)\n"
    script += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        list(program(script).layers(TOKENS))
    if (tmp_path / "pid").exists() and (text := (tmp_path / "pid").read_text()):
        assert _ends(int(text))


def _ends(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


# What is refused before anything runs


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("true {out} 'a", {}, "is not valid: no closing quotation; expected a program"),
        ("true {out} {layer}", {}, "is not valid: {layer} is unknown, expected one of {model}, "),
        ("true {model}", {}, "is not valid: expected {out}, the folder to which the program "),
        ("nowhere {out}", {}, "there is no program nowhere: expected one in PATH, or a path "),
        ("true {out}", {"rope": "1"}, "--aprt-engine-option=rope has no use: expected {rope} in"),
        ("true {out}", {"out": "1"}, "--aprt-engine-option=out has no use: expected {out} in"),
    ],
)
def test_a_command_that_cannot_run(text, options, said):
    with pytest.raises(SettingsError) as error:
        CommandLine.parse(text, options)
    assert said in str(error.value)


def test_a_command_without_a_prompt_runs_one(program):
    with pytest.raises(SettingsError, match="tells the program no prompt, and 2 are to be run"):
        program("", prompts=(TOKENS, OTHER))


def test_a_text_is_needed_where_the_command_has_one(program):
    with pytest.raises(SettingsError, match=r"has \{prompt\}, but token ids were given: expected"):
        program("", "{out} {prompt}")


def test_a_placeholder_that_this_run_cannot_fill(pair):
    line = CommandLine.parse(f"{shlex.quote(sys.executable)} {{out}} {{weights}}", {})
    with pytest.raises(SettingsError, match=r"\{weights\} is not known in this run: expected --a"):
        Command(line, values_of(pair, "m.apr", None), pair, [])
