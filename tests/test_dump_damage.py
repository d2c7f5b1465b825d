"""Whatever happens to a dump folder, reading it gives its values or one clear error."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_aprt.commands.main import main
from pytest_aprt.dump import DumpRunner
from pytest_aprt.errors import AprtError, SourceError
from pytest_aprt.sources.aprt import WHOLE_MODEL, DumpFolder, write_manifest, write_tensor

FILES = ("layer-0/embedding.bin", "layer-0/ffn_out.bin", "layer-1/ffn_out.bin", "lm_head.bin")
EXAMPLES = settings(max_examples=150, deadline=None)


def values(place: str) -> np.ndarray:
    return np.arange(5, dtype=np.float32) + FILES.index(place) * 10


def layer_of(place: str) -> int:
    return int(place[6]) if "/" in place else WHOLE_MODEL


def make(folder: Path, manifest: bool) -> None:
    for place in FILES:
        write_tensor(folder / place, layer_of(place), values(place))
    if manifest:
        write_manifest(folder, tokens=[1, 2, 3])


def bytes_of(change):
    """A damage that changes a file's bytes."""

    def damage(path: Path, at: int, other: Path) -> None:
        path.write_bytes(change(path.read_bytes(), at))

    return damage


def instead(put):
    """A damage that puts something else in the file's place."""

    def damage(path: Path, at: int, other: Path) -> None:
        path.unlink()
        put(path, at, other)

    return damage


DAMAGES = {
    "truncated": bytes_of(lambda data, at: data[: at % len(data)]),
    "oversized": bytes_of(lambda data, at: data + bytes(at % 9 + 1)),
    "flipped": bytes_of(lambda data, at: flipped(data, at % len(data))),
    "lying count": bytes_of(
        lambda data, at: data[:8] + struct.pack("<I", at * 999_983) + data[12:]
    ),
    "shorter, honestly": bytes_of(
        lambda data, at: data[:8] + struct.pack("<I", at % 5) + data[12 : 12 + 4 * (at % 5)]
    ),
    "wrong layer": bytes_of(lambda data, at: data[:4] + struct.pack("<I", at + 7) + data[8:]),
    "empty": bytes_of(lambda data, at: b""),
    "noise": bytes_of(lambda data, at: np.random.default_rng(at).bytes(at)),
    "removed": lambda path, at, other: path.unlink(),
    "a folder": instead(lambda path, at, other: path.mkdir()),
    "a full folder": instead(lambda path, at, other: (path / "x.bin").mkdir(parents=True)),
    "a pipe": instead(lambda path, at, other: os.mkfifo(path)),
    "a loop": instead(lambda path, at, other: path.symlink_to(path.name)),
    "a dangling link": instead(lambda path, at, other: path.symlink_to("nowhere")),
    "a link to another": instead(lambda path, at, other: path.symlink_to(other)),
    "a link to a device": instead(lambda path, at, other: path.symlink_to("/dev/zero")),
    "copied from another": lambda path, at, other: shutil.copy(other, path),
    "a stranger": lambda path, at, other: shutil.copy(
        path, path.parent / os.fsdecode(b"\xff\n%d.bin" % at)
    ),
    "a twin": lambda path, at, other: shutil.copy(path, path.parent / f"{path.stem.upper()}.bin"),
    "moved": lambda path, at, other: path.rename(path.with_name("attn_norm.bin")),
    "a strange layer": lambda path, at, other: (path.parent / f"layer-{at}x").mkdir(),
}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]


damages = st.lists(
    st.tuples(
        st.sampled_from(sorted(DAMAGES)),
        st.sampled_from(FILES),
        st.integers(0, 4000),
        st.sampled_from(FILES),
    ),
    min_size=1,
    max_size=3,
)


def damaged(folder: Path, damage) -> None:
    for name, place, at, other in damage:
        path, second = folder / place, folder / other
        if path.is_file() and second.is_file():  # an earlier damage may have left no file
            with contextlib.suppress(OSError, shutil.Error, ZeroDivisionError):
                DAMAGES[name](path, at, second)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    dump = DumpFolder.open(folder)
    return {
        str(dump.file(layer, stage).relative_to(folder)): dump.read(layer, stage)
        for layer in (*dump.layers, None)
        for stage in dump.stages(layer)
    }


def assert_clear(error: AprtError, folder: Path) -> None:
    text = str(error)
    assert text.isprintable() and str(folder) in text and len(text) < 700


@EXAMPLES
@given(damages)
def test_with_a_manifest_there_are_the_true_values_or_an_error(damage):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, manifest=True)
        damaged(folder, damage)
        try:
            found = read_all(folder)
        except AprtError as error:
            assert_clear(error, folder)
            return
        assert sorted(found) == sorted(FILES)
        for place, array in found.items():
            np.testing.assert_array_equal(array, values(place))


@EXAMPLES
@given(damages)
def test_without_a_manifest_no_file_is_half_read(damage):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, manifest=False)
        damaged(folder, damage)
        try:
            found = read_all(folder)
        except AprtError as error:
            assert_clear(error, folder)
            return
        for place, array in found.items():
            data = (folder / place).read_bytes()
            assert data[:4] == b"APRT" and len(data) == 12 + array.nbytes
            layer, count = struct.unpack("<II", data[4:12])
            assert count == array.size and array.tobytes() == data[12:]
            assert layer == (int(place[6]) if "/" in place else WHOLE_MODEL)


@settings(max_examples=40, deadline=None)
@given(damages, st.booleans())
def test_the_command_ends_in_one_line(damage, manifest):
    with tempfile.TemporaryDirectory() as name:
        folder, healthy = Path(name) / "damaged", Path(name) / "healthy"
        make(folder, manifest)
        make(healthy, manifest)
        damaged(folder, damage)
        assert main(["diff", str(folder), str(healthy), "--threshold", "0.9"]) in (0, 1, 2)


def test_a_manifest_that_is_cut_anywhere_is_an_error(tmp_path):
    make(tmp_path, manifest=True)
    whole = (tmp_path / "manifest.json").read_bytes()
    for end in range(0, len(whole), 7):
        (tmp_path / "manifest.json").write_bytes(whole[:end])
        with pytest.raises(SourceError) as caught:
            DumpRunner.open(str(tmp_path))
        assert_clear(caught.value, tmp_path)


@pytest.mark.parametrize("writer", ["atomic", "in place"])
def test_a_reader_beside_a_writer(tmp_path, writer):
    """A writer that renames is seen before or after; what another leaves half-way is an error."""
    make(tmp_path, manifest=False)
    path, old = tmp_path / "lm_head.bin", np.zeros(50_000, np.float32)
    new = old + 1
    write_tensor(path, WHOLE_MODEL, old)
    if writer == "in place":
        write_manifest(tmp_path, tokens=[1])
    done = threading.Event()

    def write() -> None:
        for turn in range(150):
            array = new if turn % 2 == 0 else old
            if writer == "atomic":
                write_tensor(path, WHOLE_MODEL, array)
            else:
                path.write_bytes(b"APRT" + struct.pack("<II", WHOLE_MODEL, array.size)
                                 + array.tobytes())  # fmt: skip
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set():
        try:
            found = DumpFolder.open(tmp_path).read(None, "lm_head")
        except SourceError as error:
            assert writer == "in place"
            assert_clear(error, tmp_path)
            continue
        reads += 1
        whole = [array for array in (old, new) if np.array_equal(found, array)]
        assert len(whole) == 1 and (writer == "atomic" or whole[0] is old)
    thread.join()
    assert reads or writer == "in place"
