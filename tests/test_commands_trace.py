"""``aprt trace``: what it writes, that it writes the same again, and never a half."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from harness import FIXTURES, builtin, fixture_pair

from pytest_aprt.commands.main import main
from pytest_aprt.errors import SourceError
from pytest_aprt.oracle import TransformersRunner
from pytest_aprt.sources.aprt import DumpFolder, write_tensor
from pytest_aprt.stages import STAGES

QWEN2 = FIXTURES / "tiny-qwen2"
GGUF, HF = str(QWEN2 / "q4_k_m.gguf"), str(QWEN2 / "hf")
TOKENS = (3, 77, 500, 12)
IDS = "3,77,500,12"


def trace(*args):
    return main(["trace", *map(str, args)])


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("model", [GGUF, HF])
def test_saves_what_the_engine_yields(tmp_path, capsys, model):
    assert trace(model, "--save-tensor-dir", tmp_path / "d", "--tokens", IDS) == 0
    out = capsys.readouterr()
    assert out.out == f"{tmp_path / 'd'}: 71 tensors, 4 tokens\n"
    assert "final norm and head (5/5)" in out.err
    folder = DumpFolder.open(tmp_path / "d")
    pair = fixture_pair()
    engine = (
        builtin(pair) if model == GGUF else TransformersRunner(pair.config, pair.oracle_weights)
    )
    for layer, stages in engine.layers(TOKENS):
        assert folder.stages(layer) == [name for name in STAGES if name in stages]
        for name, value in stages.items():
            array = value.numpy()
            if name == "attn_scores":  # keys behind the query are 0, as apr trace leaves them
                array = np.tril(array)
            np.testing.assert_array_equal(folder.read(layer, name), array.ravel())
            place = f"{name}.bin" if layer is None else f"layer-{layer}/{name}.bin"
            assert folder.manifest["files"][place]["shape"] == list(array.shape)
    manifest = folder.manifest
    assert manifest["tokens"] == list(TOKENS) and manifest["arithmetic"] == "float32"
    assert manifest["architecture"] == "qwen2" and manifest["prompt"] == ""
    assert len(manifest["model_sha256" if model == GGUF else "oracle_sha256"]) == 64


def test_runs_are_byte_identical(tmp_path):
    for model in (GGUF, HF):
        for name in ("one", "two"):
            command = [sys.executable, "-c", "import sys; from pytest_aprt.commands.main import "
                       "main; sys.exit(main())", "trace", model, "--tokens", IDS,
                       "--save-tensor-dir", str(tmp_path / name)]  # fmt: skip
            threads = {"one": "1", "two": "2"}[name]
            env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
            subprocess.run(command, check=True, capture_output=True, env=env)
        assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_prompt_stages_and_layers(tmp_path):
    args = ("--save-tensor", "attn_norm, LM_HEAD,embedding", "--save-tensor-layers", "1..3")
    folder = tmp_path / "d"
    assert (
        trace(GGUF, *args, "--save-tensor-dir", folder, "--prompt", "def f", "--tokenizer", HF) == 0
    )
    dump = DumpFolder.open(folder)
    assert dump.layers == [1, 2] and dump.stages(1) == ["attn_norm"]
    assert dump.stages(None) == ["lm_head"] and 0 < len(dump.manifest["tokens"]) < 6


def test_ends_with_the_last_layer_that_is_asked_for(tmp_path, capsys):
    args = ("--save-tensor", "ffn_out", "--save-tensor-layers", "0..1", "--tokens", "5")
    assert trace(HF, *args, "--save-tensor-dir", tmp_path / "d") == 0
    assert "layer 0 (1/1)" in capsys.readouterr().err
    assert list(digest(tmp_path / "d")) == ["layer-0/ffn_out.bin", "manifest.json"]


def test_default_folder(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").symlink_to(GGUF)
    monkeypatch.chdir(tmp_path)
    assert trace("m.gguf", "--tokens", "5", "--save-tensor", "lm_head") == 0
    assert DumpFolder.open(tmp_path / "m-trace").layers == []


def test_an_own_dump_is_replaced_whole(tmp_path):
    folder = tmp_path / "d"
    trace(GGUF, "--tokens", "5", "--save-tensor-dir", folder)
    trace(GGUF, "--tokens", "7", "--save-tensor", "lm_head", "--save-tensor-dir", folder)
    assert sorted(digest(folder)) == ["lm_head.bin", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def foreign_file(folder):
    trace(GGUF, "--tokens", "5", "--save-tensor", "lm_head", "--save-tensor-dir", folder)
    (folder / "layer-0").mkdir()
    (folder / "layer-0" / "notes.txt").touch()


def dump_of_another_tool(folder):
    write_tensor(folder / "layer-0" / "ffn_out.bin", 0, np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (foreign_file, "found layer-0/notes.txt"),
        (dump_of_another_tool, "found layer-0/ffn_out.bin"),
        (lambda folder: folder.touch(), "Not a directory"),
    ],
)
def test_nothing_of_others_is_replaced(tmp_path, capsys, make, found):
    folder = tmp_path / "d"
    make(folder)
    before = digest(tmp_path)
    assert trace(GGUF, "--tokens", "7", "--save-tensor-dir", folder) == 2
    assert found in capsys.readouterr().err and digest(tmp_path) == before


BAD = {
    "no model": (["none.gguf"], "none.gguf"),
    "no tokenizer": ([GGUF], "expected --tokenizer with the Hugging Face model"),
    "no ids": ([GGUF, "--tokens", "a"], "--tokens=a is not valid"),
    "id beyond": ([GGUF, "--tokens", "1024"], "outside the vocabulary: expected 0 to 1023"),
    "no stage": ([GGUF, "--tokens", "1", "--save-tensor", "x"], "stage 'x' is unknown"),
    "empty stage": ([GGUF, "--tokens", "1", "--save-tensor", "ffn_out,"], "stage '' is unknown"),
    "not this model's": ([GGUF, "--tokens", "1", "--save-tensor", "moe_router"], "that this mod"),
    "layers": (
        [GGUF, "--tokens", "1", "--save-tensor-layers", "2..2"],
        "--save-tensor-layers=2..2",
    ),
    "no prompt": ([HF, "--prompt", ""], "has no tokens"),
    "embedding elsewhere": (
        [GGUF, "--tokens", "1", "--save-tensor", "embedding", "--save-tensor-layers", "1..2"],
        "that this model has in layers 1..2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, capsys, case):
    args, message = BAD[case]
    assert trace(*args, "--save-tensor-dir", tmp_path / "d") == 2
    out = capsys.readouterr()
    assert message in out.err and out.err.count("\n") == 1 and not out.out
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert trace(GGUF, "--tokens", "5", "--save-tensor-dir", tmp_path / "d") == 2
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert trace(GGUF, "--tokens", "5", "--save-tensor-dir", tmp_path / "d") == 130
    assert not list(tmp_path.iterdir())


SLOW = """
import os, sys, time
from pytest_aprt.commands.main import main
fsync = os.fsync
os.fsync = lambda descriptor: (fsync(descriptor), time.sleep(0.02))
sys.exit(main())
"""


@pytest.mark.parametrize("written", [1, 25, 70])
def test_a_killed_trace_leaves_nothing_that_reads_as_complete(tmp_path, capsys, written):
    target = tmp_path / "d"
    trace(GGUF, "--tokens", "7", "--save-tensor-dir", target)
    before = digest(target)
    command = [sys.executable, "-c", SLOW, "trace", GGUF, "--tokens", IDS,
               "--save-tensor-dir", str(target)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".d.*/**/*.bin"))) < written:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert digest(target) == before, "the complete dump from before still stands"
    (draft,) = tmp_path.glob(".d.*")
    with pytest.raises(SourceError, match="expected a complete dump, found INCOMPLETE"):
        DumpFolder.open(draft)
    assert main(["diff", str(draft), str(target)]) == 2
    assert json.loads((target / "manifest.json").read_text())["tokens"] == [7]


def test_help_and_version(capsys):
    for args in (["--help"], ["trace", "--help"], ["diff", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--save-tensor-layers A..B", "--limit N", "aprt (pyt"))
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2


def test_a_reader_that_had_enough(tmp_path):
    trace(GGUF, "--tokens", "5", "--save-tensor-dir", tmp_path / "d")
    code = "import sys; from pytest_aprt.commands.main import main; sys.exit(main())"
    line = f"{sys.executable} -c {code!r} diff {tmp_path}/d {tmp_path}/d --json | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == ""


def test_listing_loads_no_torch():
    code = "import sys; from pytest_aprt.commands import main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
