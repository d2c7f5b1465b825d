"""GgufFile against gguf-py on files written by gguf-py, and against damaged ones."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import time
import warnings

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_aprt.errors import SourceError
from pytest_aprt.sources.gguf import GgufFile

UNSUPPORTED = {"Q8_1", "Q8_K", "Q1_0"}
PLAIN = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
QUANTISED = [kind for kind in GGML_QUANT_SIZES if kind.name not in PLAIN]


def write(path, tensors=None, *, alignment=None, pairs=(), **writer):
    out = gguf.GGUFWriter(path, "qwen2", **writer)
    if alignment:
        out.add_custom_alignment(alignment)
    for add, key, *value in pairs:
        getattr(out, add)(key, *value)
    for name, value in (tensors or {}).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        out.add_tensor(name, array, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


PAIRS = [
    ("add_uint8", "a.u8", 255),
    ("add_int8", "a.i8", -128),
    ("add_uint16", "a.u16", 65535),
    ("add_int16", "a.i16", -32768),
    ("add_uint32", "a.u32", 2**32 - 1),
    ("add_int32", "a.i32", -(2**31)),
    ("add_uint64", "a.u64", 2**64 - 1),
    ("add_int64", "a.i64", -(2**63)),
    ("add_float32", "a.f32", 1e6),
    ("add_float64", "a.f64", 1e-300),
    ("add_bool", "a.yes", True),
    ("add_bool", "a.no", False),
    ("add_string", "a.text", "Größe \n 漢字"),
    ("add_string", "a.empty", ""),
    ("add_array", "a.ints", [1, -2, 3]),
    ("add_array", "a.floats", [0.5, 1.25]),
    ("add_array", "a.flags", [True, False, True]),
    ("add_array", "a.words", ["", "ab", "漢", "x" * 300]),
]


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def model(tmp_path):
    tensors = {
        "token_embd.weight": matrix(6, 32),
        "blk.0.attn_q.weight": (
            gguf.quants.quantize(matrix(8, 64), GGMLQuantizationType.Q8_0),
            GGMLQuantizationType.Q8_0,
        ),
        "blk.0.ffn_gate_exps.weight": matrix(3, 4, 8).astype(np.float16),
        "output_norm.weight": matrix(32),
    }
    return write(tmp_path / "model.gguf", tensors, pairs=PAIRS)


def test_metadata_is_what_gguf_py_reads(model):
    expected = {
        key: field.contents()
        for key, field in gguf.GGUFReader(model).fields.items()
        if not key.startswith("GGUF.")
    }
    with GgufFile.open(model) as file:
        assert list(file.metadata) == list(expected)
        assert dict(file.metadata) == expected
        assert [type(v) for v in file.metadata.values()] == [type(v) for v in expected.values()]
        assert file.architecture == "qwen2"
        assert "a.words" in file.metadata and file.metadata.get("none", 7) == 7
        with pytest.raises(KeyError):
            file.metadata["none"]


def test_tensors_are_what_gguf_py_reads(model):
    with GgufFile.open(model) as file:
        for theirs in gguf.GGUFReader(model).tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(dim) for dim in reversed(theirs.shape))
            assert (ours.type, ours.n_bytes) == (theirs.tensor_type.name, theirs.n_bytes)
            assert (ours.part, ours.offset) == (0, theirs.data_offset)
            assert file.raw(theirs.name).tobytes() == theirs.data.tobytes()
        assert file.tensor("blk.0.ffn_gate_exps.weight").shape == (3, 4, 8)
        assert file.raw("blk.0.attn_q.weight").shape == (8, 2 * 34)
        assert file.raw("output_norm.weight").shape == (1, 128)
        np.testing.assert_array_equal(file.tensor("token_embd.weight"), matrix(6, 32))


def test_arrays_are_fresh_and_writable(model):
    with GgufFile.open(model) as file:
        file.tensor("token_embd.weight")[:] = 0
        np.testing.assert_array_equal(file.tensor("token_embd.weight"), matrix(6, 32))
        with pytest.raises(ValueError, match="read-only"):
            file.raw("token_embd.weight")[:] = 0


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_dequantises_as_gguf_py_does(tmp_path, kind):
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    raw = rng.integers(0, 256, (37, 3 * size), dtype=np.uint8)
    path = write(tmp_path / "model.gguf", {"w": (raw, kind)})
    with GgufFile.open(path) as file:
        info = file.tensors["w"]
        assert (info.type, info.shape, info.n_bytes) == (kind.name, (37, 3 * block), raw.size)
        if kind.name in UNSUPPORTED:
            with pytest.raises(SourceError, match=f"'w' is of type {kind.name}"):
                file.tensor("w")
            return
        with np.errstate(all="ignore"):
            expected = bits(gguf.quants.dequantize(raw, kind))
        np.testing.assert_array_equal(bits(file.tensor("w")), expected)
        wanted = [36, 0, 0, 17]
        np.testing.assert_array_equal(bits(file.rows("w", wanted)), expected[wanted])


def bits(values):
    """The bits of every number; a NaN is a NaN whatever it carries."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


@pytest.mark.parametrize("name", PLAIN)
def test_widens_plain_numbers(tmp_path, name):
    array = np.arange(-12, 12).reshape(4, 6).astype(PLAIN[name])
    path = write(tmp_path / "model.gguf", {"w": (array, GGMLQuantizationType[name])})
    with GgufFile.open(path) as file:
        assert file.tensors["w"].type == name
        assert file.tensor("w").dtype == np.float32
        np.testing.assert_array_equal(file.tensor("w"), array.astype(np.float32))


def test_what_float32_cannot_hold_is_no_accident_of_ours(tmp_path):
    path = write(tmp_path / "a.gguf", {"a": np.full((2, 32), 1e300)})
    with GgufFile.open(path) as file:
        assert np.isinf(file.tensor("a")).all()  # without numpy's warning, which would be an error


def test_chunks_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_aprt.sources.gguf._CHUNK", 100)
    path = write(tmp_path / "model.gguf", {"w": matrix(17, 32)})
    with GgufFile.open(path) as file:
        np.testing.assert_array_equal(file.tensor("w"), matrix(17, 32))


def test_rows(model):
    with GgufFile.open(model) as file:
        whole = file.tensor("token_embd.weight")
        for wanted in ([], [5], [0, 5, 0], range(2, 5), np.array([1, 4])):
            got = file.rows("token_embd.weight", wanted)
            np.testing.assert_array_equal(got, whole[list(wanted)])
            assert got.dtype == np.float32 and got.shape == (len(wanted), 32)
        assert file.rows("blk.0.ffn_gate_exps.weight", [11]).shape == (1, 8)
        for bad in ([6], [-1]):
            with pytest.raises(SourceError, match=r"token_embd.weight.*expected 0 to 5"):
                file.rows("token_embd.weight", bad)


def test_unknown_tensor_names_close_ones(model):
    with (
        GgufFile.open(model) as file,
        pytest.raises(SourceError, match=r"no tensor 'blk.0.attn_k.weight'.*blk.0.attn_q.weight"),
    ):
        file.tensor("blk.0.attn_k.weight")


def test_close(model):
    file = GgufFile.open(model)
    view = file.raw("output_norm.weight")
    words = file.metadata["a.words"]
    file.close()
    file.close()
    assert view.view(np.float32)[0, 3] == matrix(32)[3]
    del view
    assert file.metadata["a.words"] is words
    for read in (
        lambda: file.tensor("output_norm.weight"),
        lambda: file.rows("output_norm.weight", [0]),
        lambda: file.fill("output_norm.weight", slice(0, 1), np.empty((1, 32), np.float32)),
    ):
        with pytest.raises(SourceError, match="was closed"):
            read()


def test_unread_array_of_a_closed_file(model):
    with GgufFile.open(model) as file:
        pass
    with pytest.raises(SourceError, match=r"was closed.*a\.words"):
        file.metadata["a.words"]


def test_sha256(model):
    with GgufFile.open(model) as file:
        assert file.sha256() == hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_alignment(tmp_path, alignment):
    tensors = {f"w{i}": np.full((1, i + 1), i, np.float32) for i in range(4)}
    path = write(tmp_path / "model.gguf", tensors, alignment=alignment)
    with GgufFile.open(path) as file:
        for name, array in tensors.items():
            np.testing.assert_array_equal(file.tensor(name), array)


def test_needs_no_torch():
    code = "import sys, pytest_aprt.sources.gguf; print({'torch', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Split files


@pytest.fixture
def split(tmp_path):
    tensors = {f"blk.{i}.w": matrix(4, 32, seed=i) for i in range(5)}
    write(tmp_path / "big.gguf", tensors, pairs=PAIRS, split_max_tensors=2)
    return [tmp_path / f"big-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split(split, given):
    with GgufFile.open(split[given]) as file:
        assert file.path == split[given] and file.parts == split
        assert file.metadata["a.words"][1] == "ab"
        assert [info.part for info in file.tensors.values()] == [0, 0, 1, 1, 2]
        for i in range(5):
            np.testing.assert_array_equal(file.tensor(f"blk.{i}.w"), matrix(4, 32, seed=i))
        whole = b"".join(path.read_bytes() for path in split)
        assert file.sha256() == hashlib.sha256(whole).hexdigest()


def test_missing_part_is_named(split):
    split[1].unlink()
    with pytest.raises(SourceError, match=r"1 missing, the first is big-00002-of-00003.gguf"):
        GgufFile.open(split[2])


def test_renamed_part(split, tmp_path):
    with pytest.raises(SourceError, match=r"split.no 0 of split.count 3"):
        GgufFile.open(split[0].rename(tmp_path / "model.gguf"))


def test_part_of_another_model(split):
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(SourceError, match=r"00002-of-00003.*expected split.no 1 .*found 2 of 3"):
        GgufFile.open(split[0])


def test_parts_that_miss_tensors(split):
    data = split[0].read_bytes()
    key = b"split.tensors.count" + struct.pack("<I", 5)
    at = data.index(key) + len(key)
    split[0].write_bytes(data[:at] + struct.pack("<i", 6) + data[at + 4 :])
    with pytest.raises(SourceError, match="says 6 tensors, the 3 parts hold 5"):
        GgufFile.open(split[0])


def test_tensor_in_two_parts(split):
    split[2].write_bytes(split[2].read_bytes().replace(b"blk.4.w", b"blk.0.w"))
    with pytest.raises(SourceError, match=r"00003-of-00003.*'blk.0.w' is in an earlier part"):
        GgufFile.open(split[0])


# Bad input


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, body):
    return text(key) + struct.pack("<I", kind) + body


def entry(name="w", dims=(32, 2), kind=0, offset=0):
    head = text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


ARCH = pair("general.architecture", 8, text("qwen2"))


def blob(pairs=(ARCH,), entries=(), *, version=3, magic=b"GGUF", counts=None, data=256):
    n_tensors, n_pairs = counts or (len(entries), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**63 + 5
BAD = {
    "no file": (None, "found nothing"),
    "empty": (b"", "found 0 bytes"),
    "one byte": (b"G", "begins with b'GGUF', found b'G'"),
    "magic": (blob(magic=b"GGML"), "found b'GGML'"),
    "magic only": (b"GGUF", "the version at byte 4 needs 4 bytes, the file has 0 more"),
    "version 1": (blob(version=1), "found version 1: "),
    "version 4": (blob(version=4), "found version 4: "),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found a big-endian file"),
    "pairs lie": (blob(counts=(0, HUGE)), f"a list of {HUGE} metadata pairs"),
    "tensors lie": (blob(counts=(HUGE, 1)), f"a list of {HUGE} tensors"),
    "one pair more": (blob(counts=(0, 40), data=600), "is there twice|is not valid|needs"),
    "key twice": (blob([ARCH, ARCH]), "'general.architecture' is there twice"),
    "key not UTF-8": (blob([ARCH, pair(b"\xff\xfe", 0, b"1")]), r"a metadata key: expected UTF-8"),
    "key runs out": (blob([ARCH, struct.pack("<Q", HUGE)]), f"a list of {HUGE} bytes"),
    "value not UTF-8": (blob([ARCH, pair("a\nb", 8, text(b"\xff"))]), r"a\\nb: expected UTF-8"),
    "value type": (blob([ARCH, pair("k", 13, b"1234")]), "'k': value type 13 is not valid"),
    "array of arrays": (
        blob([ARCH, pair("k", 9, struct.pack("<IQ", 9, 1))]),
        "'k': value type 9 is not valid",
    ),
    "array runs out": (blob([ARCH, pair("k", 9, struct.pack("<IQ", 12, HUGE))]), "elements of k"),
    "strings lie": (blob([ARCH, pair("k", 9, struct.pack("<IQ", 8, HUGE))]), "strings of k"),
    "string in array lies": (
        blob([ARCH, pair("k", 9, struct.pack("<IQQ", 8, 2, 2**64 - 1))]),
        "k: its strings run past the end",
    ),
    "last string in array lies": (
        blob([ARCH, pair("k", 9, struct.pack("<IQQ", 8, 1, 9999))]),
        "k: its strings run past the end",
    ),
    "no architecture": (blob([]), "expected general.architecture in the metadata, found none"),
    "architecture is no text": (blob([pair("general.architecture", 0, b"1")]), "found int"),
    "alignment 0": (blob([ARCH, pair("general.alignment", 4, bytes(4))]), "power of two, found 0"),
    "alignment 24": (blob([ARCH, pair("general.alignment", 4, b"\x18\0\0\0")]), "found 24"),
    "alignment is text": (blob([ARCH, pair("general.alignment", 8, text("x"))]), "found 'x'"),
    "tensor twice": (blob(entries=[entry(), entry(dims=(8,), offset=256)]), "'w' is there twice"),
    "name not UTF-8": (blob(entries=[entry(b"\xff")]), "a tensor name: expected UTF-8"),
    "five dims": (blob(entries=[entry(dims=(1,) * 5)]), "expected at most 4 dims, found 5"),
    "huge dims": (blob(entries=[text("w") + b"\xff" * 4 + bytes(20)]), "found 4294967295"),
    "dim 0": (blob(entries=[entry(dims=(32, 0))]), r"dims of at least 1, found \[32, 0\]"),
    "type": (blob(entries=[entry(kind=99)]), "tensor 'w': type number 99 is unknown"),
    "removed type": (blob(entries=[entry(kind=4)]), "type number 4 is unknown"),
    "half a block": (blob(entries=[entry(dims=(48,), kind=8)]), "no whole number of Q8_0 blocks"),
    "offset": (blob(entries=[entry(offset=8)]), "'w': offset 8 is no multiple of 32"),
    "offset lies": (blob(entries=[entry(offset=2**63)]), "truncated: the data of tensor 'w'"),
    "data cut": (blob(entries=[entry()], data=255), "should end at byte 384, the file ends at 383"),
    "dims lie": (blob(entries=[entry(dims=(2**62,) * 4)]), "truncated: the data of tensor 'w'"),
    "overlap": (
        blob(entries=[entry("a"), entry("b", dims=(8,), offset=32)]),
        "'b': its data overlaps that of tensor 'a'",
    ),
    "split count is text": (blob([ARCH, pair("split.count", 8, text("x"))]), "split.count 'x'"),
    "split count lies": (blob([ARCH, pair("split.count", 2, b"\xff\xff")]), "split.count 65535"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    data, message = BAD[case]
    path = tmp_path / "bad.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        GgufFile.open(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_good_blob(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(blob(entries=[entry(), entry("scalar", dims=(), offset=256)], data=260))
    for version in (2, 3):
        path.write_bytes(path.read_bytes().replace(b"GGUF\3", b"GGUF" + bytes([version])))
        with GgufFile.open(path) as file:
            assert file.tensor("w").shape == (2, 32)
            assert file.tensor("scalar").shape == ()


def test_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("", "found a folder"),
        ("pipe", "named pipe"),
        ("loop", "symbolic link"),
    ):
        with pytest.raises(SourceError, match=message):
            GgufFile.open(tmp_path / name)
    with pytest.raises(SourceError, match="null"):
        GgufFile.open("a\0b")


def test_invalid_token_is_an_error_when_asked(tmp_path):
    words = pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("ok") + text(b"\xff"))
    path = tmp_path / "model.gguf"
    path.write_bytes(blob([ARCH, words]))
    with GgufFile.open(path) as file, pytest.raises(SourceError, match="tokens: expected UTF-8"):
        file.metadata["tokens"]


def survives(path):
    """Read all that opens; anything but SourceError is a failure of the test."""
    try:
        with warnings.catch_warnings(), GgufFile.open(path) as file:
            dict(file.metadata)
            for name in file.tensors:
                file.tensor(name)
    except SourceError as error:
        assert str(error).isprintable()


SMALL = blob(
    [
        ARCH,
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("a.words", 9, struct.pack("<IQ", 8, 2) + text("one") + text("two")),
        pair("a.ints", 9, struct.pack("<IQ3i", 5, 3, 1, 2, 3)),
        pair("a.flag", 7, b"\1"),
        pair("split.count", 2, b"\1\0"),
    ],
    [entry("a"), entry("b", dims=(256,), kind=12, offset=256)],
    data=512,
)
QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.integers(0, len(SMALL) - 1))
def test_any_truncation(tmp_path, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(SMALL[:length])
    survives(path)


@QUICK
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 513), st.integers(0, 255)), max_size=4))
def test_any_flipped_bytes(tmp_path, flips):
    data = bytearray(SMALL)
    for at, value in flips:
        data[at] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    survives(path)


@QUICK
@given(st.integers(4, len(SMALL) - 520), st.integers(0, 2**64 - 1))
def test_any_flipped_number(tmp_path, at, value):
    path = tmp_path / "flipped.gguf"
    path.write_bytes(SMALL[:at] + struct.pack("<Q", value) + SMALL[at + 8 :])
    survives(path)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    survives(path)


# Speed


def vocabulary(path, size):
    tokens = [f"token{i}" for i in range(size)]
    merges = [f"mer {i}" for i in range(size)]
    pairs = [("add_array", "tokens", tokens), ("add_array", "merges", merges)]
    return write(path, {"w": matrix(2, 32)}, pairs=pairs)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_a_large_vocabulary_opens_fast(tmp_path):
    """152k tokens and merges, as in Qwen2.5, against gguf-py's reader on a tenth of them."""
    large = vocabulary(tmp_path / "large.gguf", 152_000)
    tenth = vocabulary(tmp_path / "tenth.gguf", 15_200)
    ours = min(seconds(lambda: GgufFile.open(large).close()) for _ in range(3))
    theirs = seconds(lambda: gguf.GGUFReader(tenth))
    print(f"GgufFile.open {ours:.4f} s, GGUFReader on a tenth {theirs:.3f} s")
    assert ours < theirs / 5
    with GgufFile.open(large) as file:
        assert file.metadata["tokens"][-1] == "token151999"
