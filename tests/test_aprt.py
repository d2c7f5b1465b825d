"""APRT tensors bit for bit, dump folders, manifests, and what is wrong with damaged ones."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import struct
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.sources import aprt
from pytest_aprt.sources.aprt import (
    WHOLE_MODEL,
    DumpFolder,
    read_header,
    read_tensor,
    write_manifest,
    write_tensor,
)

QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ONES = np.ones(3, np.float32)


# Tensors


def test_layout(tmp_path):
    path = tmp_path / "x.bin"
    write_tensor(path, 7, np.array([[1.0, -2.0]], np.float32))
    assert path.read_bytes() == b"APRT\x07\0\0\0\x02\0\0\0" + struct.pack("<2f", 1.0, -2.0)
    write_tensor(path, WHOLE_MODEL, np.empty(0, np.float32))
    assert path.read_bytes() == b"APRT\xff\xff\xff\xff\0\0\0\0"
    assert read_tensor(path, WHOLE_MODEL).shape == (0,)


@QUICK
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(0, 2**32 - 1))
def test_bits_survive(tmp_path, bits, layer):
    path = tmp_path / "x.bin"
    array = np.array(bits, np.uint32)
    write_tensor(path, layer, array.view(np.float32))
    assert read_header(path) == (layer, len(bits))
    for expected in (layer, None):
        got = read_tensor(path, expected)
        assert got.dtype == np.float32 and got.flags.writeable
        np.testing.assert_array_equal(got.view(np.uint32), array)


def test_special_values_survive(tmp_path):
    bits = np.array(
        [0x7FC00001, 0x7FA00000, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32
    )
    write_tensor(tmp_path / "x.bin", 0, bits.view(np.float32))
    np.testing.assert_array_equal(read_tensor(tmp_path / "x.bin", 0).view(np.uint32), bits)


def test_strided_arrays_are_written_in_row_major_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensor(tmp_path / "x.bin", 0, array.T)
    np.testing.assert_array_equal(read_tensor(tmp_path / "x.bin", 0), array.T.ravel())


GOOD = b"APRT" + struct.pack("<II2f", 3, 2, 1, 2)
BAD = {
    "no file": (None, "expected an APRT tensor, found nothing"),
    "empty": (b"", "12 bytes of header .*found 0 bytes"),
    "short header": (GOOD[:11], "found 11 bytes that begin with b'APRT'"),
    "magic": (b"GGUF" + GOOD[4:], "begin with b'GGUF'"),
    "short body": (GOOD[:-1], "expected 20 bytes, as its header counts 2 elements, found 19"),
    "no body": (GOOD[:12], "expected 20 bytes, .*found 12"),
    "long body": (GOOD + b"\0", "expected 20 bytes, .*found 21"),
    "count lies": (GOOD[:8] + b"\xff" * 4 + GOOD[12:], "counts 4294967295 elements, found 20"),
    "layer": (b"APRT" + struct.pack("<II2f", 4, 2, 1, 2), "expected layer 3 .*found layer 4"),
    "whole model": (b"APRT\xff\xff\xff\xff" + GOOD[8:], r"found the whole model \(0xFFFFFFFF\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensor(tmp_path, case):
    data, message = BAD[case]
    path = tmp_path / "x\n.bin"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        read_tensor(path, 3)
    assert r"x\n.bin" in str(caught.value) and str(caught.value).isprintable()


@QUICK
@given(st.binary(max_size=40), st.booleans())
def test_any_bytes(tmp_path, data, magic):
    path = tmp_path / "x.bin"
    path.write_bytes(b"APRT" + data if magic else data)
    try:
        array = read_tensor(path, None)
    except SourceError as error:
        assert str(error).isprintable()
    else:
        assert path.stat().st_size == 12 + array.nbytes


def test_no_plain_file(tmp_path):
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    for name, message in (
        ("folder", "a folder"),
        ("loop", "symbolic link"),
        ("pipe", "named pipe"),
    ):
        with pytest.raises(SourceError, match=message):
            read_tensor(tmp_path / f"{name}.bin", None)


# Atomic writes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_tensor(path, 0, ONES)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SourceError, match=r"x\.bin: cannot be written: No space left on device"):
        write_tensor(path, 0, 2 * ONES)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensor(tmp_path / "x.bin", 0, ONES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("builtin", [open, os.open], ids=["open", "os.open"])
def test_an_interrupt_as_a_file_is_opened_leaves_no_file_object(tmp_path, builtin):
    """Which would warn when it is forgotten: an error in suites that allow no warnings."""

    def interrupt(frame, event, function):
        if event == "c_return" and function is builtin:
            sys.setprofile(None)
            raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sys.setprofile(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                write_tensor(tmp_path / "x.bin", 0, ONES)
        finally:
            sys.setprofile(None)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "layer-0").touch()
    with pytest.raises(SourceError, match="cannot be written"):
        write_tensor(tmp_path / "layer-0" / "x.bin", 0, ONES)


# Folders


@pytest.fixture
def dump(tmp_path):
    path = tmp_path / "dump"
    write_tensor(path / "layer-0" / "embedding.bin", 0, ONES)
    for layer in (0, 2, 10):
        write_tensor(path / f"layer-{layer}" / "ffn_out.bin", layer, layer * ONES)
        write_tensor(path / f"layer-{layer}" / "attn_norm.bin", layer, ONES)
    write_tensor(path / "lm_head.bin", WHOLE_MODEL, 5 * ONES)
    (path / "_PROVENANCE.txt").write_text("another tool's note")
    write_tensor(path / "step-0" / "layer-0" / "k_cache.bin", 0, ONES)
    return path


def test_lists_and_reads(dump):
    folder = DumpFolder.open(str(dump))
    assert folder.path == dump and folder.manifest is None
    assert folder.layers == [0, 2, 10]
    assert folder.stages(0) == ["embedding", "attn_norm", "ffn_out"]
    assert folder.stages(2) == ["attn_norm", "ffn_out"]
    assert folder.stages(None) == ["lm_head"] and folder.stages(1) == []
    np.testing.assert_array_equal(folder.read(10, " FFN_out"), 10 * ONES)
    np.testing.assert_array_equal(folder.read(None, "lm_head"), 5 * ONES)


def test_names_in_other_case_and_aliases(tmp_path):
    write_tensor(tmp_path / "layer-1" / "Layer_Output.bin", 1, ONES)
    folder = DumpFolder.open(tmp_path)
    assert folder.stages(1) == ["post_ffn_residual"]
    np.testing.assert_array_equal(folder.read(1, "layer_output"), ONES)


def test_absent_points(dump):
    folder = DumpFolder.open(dump)
    with pytest.raises(SourceError, match="no ffn_up of layer 2: its stages here are: attn_norm, "):
        folder.read(2, "ffn_up")
    with pytest.raises(SourceError, match=r"no final_norm of the whole model.*: lm_head"):
        folder.read(None, "final_norm")
    with pytest.raises(SourceError, match="no ffn_up of layer 1: its stages here are: none"):
        folder.read(1, "ffn_up")
    with pytest.raises(SettingsError, match="'nonsense'"):
        folder.read(0, "nonsense")


def test_header_must_agree_with_the_folder(dump):
    (dump / "layer-2").rename(dump / "layer-3")
    write_tensor(dump / "lm_head.bin", 0, ONES)
    folder = DumpFolder.open(dump)
    with pytest.raises(SourceError, match=r"layer-3/ffn_out.bin: expected layer 3 .*found layer 2"):
        folder.read(3, "ffn_out")
    with pytest.raises(SourceError, match=r"lm_head.bin: expected the whole model"):
        folder.read(None, "lm_head")


def tensor(name, layer=0):
    return lambda path: write_tensor(path / name, layer, ONES)


def link(name, target):
    return lambda path: (path / name).symlink_to(target)


BAD_FOLDERS = {
    "absent": (shutil.rmtree, "expected a folder of APRT dumps: No such file"),
    "unknown name": (
        tensor("layer-0/attn.bin"),
        "attn.bin: expected a stage's name, one of embedd",
    ),
    "unknown name in root": (tensor("logits.bin"), "logits.bin: expected a stage's name"),
    "not UTF-8": (tensor(os.fsdecode(b"\xff.bin")), r"\\udcff.bin: expected a stage's name"),
    "stage twice": (tensor("layer-0/FFN_out.bin"), "ffn_out.bin: is the same stage as FFN_out.bin"),
    "layer's stage in root": (tensor("ffn_out.bin"), r"expected ffn_out in a folder layer-<N>/"),
    "model's stage in layer": (
        tensor("layer-0/lm_head.bin"),
        "expected lm_head in the dump folder itself",
    ),
    "embedding elsewhere": (tensor("layer-2/embedding.bin"), "expected embedding in layer-0/"),
    "padded number": (tensor("layer-00/ffn_out.bin"), "layer-00: expected layer-<N> with a plain"),
    "huge number": (tensor("layer-9999999999/ffn_out.bin"), "expected layer-<N>"),
    "no number": (tensor("layer-x/ffn_out.bin"), "expected layer-<N>"),
    "layer is a file": (lambda path: (path / "layer-7").touch(), "layer-7: expected a folder"),
    "folder as file": (lambda path: (path / "layer-2/ffn_up.bin").mkdir(), "found a folder"),
    "loop as file": (link("layer-2/ffn_up.bin", "ffn_up.bin"), "ffn_up.bin: cannot be opened"),
    "loop as layer": (link("layer-7", "layer-7"), "layer-7: expected a folder"),
    "dangling": (
        link("layer-2/ffn_up.bin", "none"),
        "ffn_up.bin: expected an APRT tensor, found no",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(dump, case):
    change, message = BAD_FOLDERS[case]
    change(dump)
    with pytest.raises(SourceError, match=message) as caught:
        DumpFolder.open(dump)
    assert str(dump) in str(caught.value) and str(caught.value).isprintable()


def test_no_dump(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty" / "layer-0").mkdir(parents=True)
    for name, message in (
        ("file", "Not a directory"),
        ("loop", "symbolic link"),
        ("empty", "found no tensor"),
    ):
        with pytest.raises(SourceError, match=message):
            DumpFolder.open(tmp_path / name)


# Manifests


@pytest.fixture
def recorded(dump):
    shapes = {"layer-0/embedding.bin": (1, 3)}
    write_manifest(dump, tokens=[1, 2], shapes=shapes, writer="test")
    return dump


def test_manifest(recorded):
    folder = DumpFolder.open(recorded)
    assert folder.manifest is not None
    assert folder.manifest["schema"] == "aprt-dump-v1"
    assert (folder.manifest["tokens"], folder.manifest["writer"]) == ([1, 2], "test")
    data = (recorded / "lm_head.bin").read_bytes()
    files = folder.manifest["files"]
    assert files["lm_head.bin"] == {"sha256": hashlib.sha256(data).hexdigest(), "shape": [3]}
    assert files["layer-0/embedding.bin"]["shape"] == [1, 3]
    assert "step-0/layer-0/k_cache.bin" in files and len(files) == 9
    assert [path.name for path in recorded.iterdir() if path.suffix == ".tmp"] == []
    for layer in (0, 2, 10, None):
        for stage in folder.stages(layer):
            assert folder.read(layer, stage).shape == (3,)


def test_changed_file(recorded):
    folder = DumpFolder.open(recorded)
    write_tensor(recorded / "layer-2" / "ffn_out.bin", 2, ONES)
    with pytest.raises(SourceError, match=r"layer-2/ffn_out.bin: expected sha256 \w{64} and shape"):
        folder.read(2, "ffn_out")


def edited(change):
    def edit(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return edit


def raw(content):
    return lambda path: (path / "manifest.json").write_bytes(content)


BAD_MANIFESTS = {
    "missing": (lambda path: (path / "lm_head.bin").unlink(), "lm_head.bin is missing"),
    "missing in a step": (
        lambda path: shutil.rmtree(path / "step-0"),
        "step-0/layer-0/k_cache.bin is missing",
    ),
    "foreign": (tensor("layer-2/ffn_up.bin", 2), "layer-2/ffn_up.bin is not listed"),
    "foreign in a step": (tensor("step-1/lm_head.bin"), "step-1/lm_head.bin is not listed"),
    "no JSON": (raw(b"{"), "manifest.json: expected valid JSON"),
    "empty": (raw(b""), "expected valid JSON"),
    "no text": (raw(b"\xff"), "expected valid JSON"),
    "deep": (raw(b"[" * 200_000), "expected valid JSON"),
    "list": (raw(b"[]"), "expected a JSON object, found a list"),
    "no schema": (raw(b"{}"), "expected schema 'aprt-dump-v1', found 'None'"),
    "schema": (edited(lambda m: m.update(schema="v\n2")), r"found 'v\\+n2'"),
    "no tokens": (edited(lambda m: m.pop("tokens")), "expected tokens, a list"),
    "tokens": (edited(lambda m: m.update(tokens=[1.5])), "expected tokens, a list"),
    "files": (edited(lambda m: m.update(files=[])), "expected files, an object"),
    "entry": (
        edited(lambda m: m["files"].update({"lm_head.bin": 1})),
        r"files\['lm_head.bin'\] to hold",
    ),
    "shape": (edited(lambda m: m["files"]["lm_head.bin"].update(shape=[-1])), r"to hold sha256"),
    "folder": (
        lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
        "found a folder",
    ),
    "loop": (
        lambda path: (
            (path / "manifest.json").unlink(),
            (path / "manifest.json").symlink_to("manifest.json"),
        ),
        "symbolic link",
    ),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifest(recorded, case):
    change, message = BAD_MANIFESTS[case]
    change(recorded)
    with pytest.raises(SourceError, match=message) as caught:
        DumpFolder.open(recorded)
    assert str(recorded) in str(caught.value) and str(caught.value).isprintable()


def test_shape_must_count_the_elements(recorded):
    edited(lambda m: m["files"]["lm_head.bin"].update(shape=[2, 2]))(recorded)
    with pytest.raises(SourceError, match=r"shape \[2, 2\].*found another file of 3 elements"):
        DumpFolder.open(recorded).read(None, "lm_head")


def test_a_layer_that_is_a_link_is_foreign_too(recorded):
    (recorded / "layer-5").symlink_to("layer-2")
    with pytest.raises(SourceError, match=r"layer-5/attn_norm.bin is not listed"):
        DumpFolder.open(recorded)


def test_manifest_over_a_damaged_tensor(dump):
    (dump / "lm_head.bin").write_bytes(b"APRT")
    with pytest.raises(SourceError, match=r"lm_head.bin: expected an APRT tensor"):
        write_manifest(dump, tokens=[])
    assert not (dump / aprt.MANIFEST).exists()
