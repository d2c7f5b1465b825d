"""The header of one GGUF file: walked once and validated against itself and the file's size.

The walk is our own: gguf-py's reader builds Python objects for every token and merge of the
vocabulary, seconds of work for values that a parity run never looks at. Here strings in arrays are
stepped over and decoded when asked for.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format; ``gguf.cpp`` of
that project for what a reader must refuse.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pytest_aprt.errors import SourceError
from pytest_aprt.sources._files import file_size, one_line, reason

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment is absent
_MAX_DIMS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9

_SCALARS = {
    number: struct.Struct(f"<{code}")
    for number, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
"""Value types of fixed size (gguf_metadata_value_type); the codes mean the same to numpy."""

_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    ``shape`` is in numpy order, out-features first, the reverse of the file's dims. ``type`` is a
    name of gguf.GGMLQuantizationType (``Q4_K``). ``part`` counts into GgufFile.parts; ``offset`` is
    from the start of that part's file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    part: int
    offset: int

    @property
    def columns(self) -> int:
        """Elements per row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows; leading dimensions count as one."""
        return math.prod(self.shape[:-1])


class GgufPart:
    """One file: its bytes, metadata and tensors, validated against each other and its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _mapped(path)
        cursor = _Cursor(path, self.data)
        n_tensors, n_pairs = _preamble(cursor)
        self.metadata = _Metadata(_pairs(cursor, n_pairs))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise cursor.damaged(
                f"general.alignment: expected a power of two, found {alignment!r:.40}"
            )
        self.tensors = {info.name: info for info in _tensor_infos(cursor, n_tensors, alignment)}

    @property
    def split(self) -> tuple[Any, Any]:
        """``split.no`` and ``split.count``; a file that was never split is part 0 of 1."""
        # gguf-split --merge leaves a count of 0 behind.
        return self.metadata.get("split.no", 0), self.metadata.get("split.count", 0) or 1


class _Metadata(Mapping[str, Any]):
    """The key-value pairs; an array is decoded at its first access."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = value.decoded()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


@dataclass(frozen=True, kw_only=True)
class _Array:
    """An array of the metadata, not decoded yet."""

    cursor: _Cursor  # stands at the first element
    key: str
    type: int
    count: int

    def decoded(self) -> list[Any]:
        path, data, at = self.cursor.path, self.cursor.data, self.cursor.at
        if data.closed:
            raise SourceError(f"{one_line(path)}: was closed; open it again to read {self.key}")
        if self.type == _STRING:
            return _Cursor(path, data, at).strings(self.count, self.key)
        values: list[Any] = np.frombuffer(data, _SCALARS[self.type].format, self.count, at).tolist()
        return values


class _Cursor:
    """Reads a header's little-endian values one after another, never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, at: int = 0) -> None:
        self.path = path
        self.data = data
        self.at = at
        self.size = len(data)

    def damaged(self, found: str) -> SourceError:
        """Return the error for a header that says what cannot be."""
        return SourceError(
            f"{one_line(self.path)}: damaged GGUF header: {one_line(found)}: fetch or convert it "
            f"anew"
        )

    def need(self, n_bytes: int, what: str) -> None:
        """Make sure that ``n_bytes`` more lie ahead."""
        if n_bytes > self.size - self.at:
            raise self.damaged(
                f"{what} at byte {self.at} needs {n_bytes} bytes, the file has "
                f"{max(0, self.size - self.at)} more"
            )

    def value(self, layout: struct.Struct, what: str) -> Any:
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def count(self, what: str, least: int) -> int:
        """Return a count of items of at least ``least`` bytes, which must have room ahead."""
        count: int = self.value(_U64, f"the number of {what}")
        self.need(count * least, f"a list of {count} {what}")
        return count

    def string(self, what: str) -> str:
        length = self.count(f"bytes of {what}", 1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(
                f"{what}: expected UTF-8, found {raw[:40]!r} ({error.reason})"
            ) from None

    def strings(self, count: int, what: str) -> list[str]:
        """Return ``count`` strings: of a vocabulary and its merges there are 300,000."""
        at, length_at, data = self.at, _U64.unpack_from, self.data
        found = []
        with suppress(struct.error, IndexError, OverflowError, UnicodeDecodeError):
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                found.append(str(data[start:at], "utf-8"))
        if len(found) == count and at <= self.size:
            self.at = at
            return found
        return [self.string(what) for _ in range(count)]  # which says what is wrong, and where

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings: the inner loop of opening a file."""
        at, length_at, data = self.at, _U64.unpack_from, self.data
        try:
            for _ in range(count):
                at += 8 + length_at(data, at)[0]
        except (struct.error, IndexError, OverflowError):  # the last length led out of the file
            at = self.size + 1
        if at > self.size:
            raise self.damaged(f"{what}: its strings run past the end of the file")
        self.at = at


def _mapped(path: Path) -> mmap.mmap:
    if not file_size(path, "a GGUF file"):
        raise SourceError(f"{one_line(path)}: expected a GGUF file, found 0 bytes: fetch it anew")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise SourceError(f"{one_line(path)}: cannot be mapped: {reason(error)}") from None


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Read magic, version and the numbers of tensors and of key-value pairs."""
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise SourceError(
            f"{one_line(cursor.path)}: expected a GGUF file, which begins with b'GGUF', found "
            f"{magic!r}: convert the model to GGUF"
        )
    cursor.at = 4
    version = cursor.value(_U32, "the version")
    if version not in _VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        found = "a big-endian file" if big_endian else f"version {version}"
        raise SourceError(
            f"{one_line(cursor.path)}: expected little-endian GGUF version 2 or 3, found {found}: "
            f"convert it with {'gguf-convert-endian' if big_endian else 'a current llama.cpp'}"
        )
    n_tensors: int = cursor.value(_U64, "the number of tensors")
    n_pairs = cursor.count("metadata pairs", 13)  # key length, value type, one byte of value
    cursor.need(
        n_tensors * 24, f"a list of {n_tensors} tensors"
    )  # name length, n_dims, type, offset
    return n_tensors, n_pairs


def _pairs(cursor: _Cursor, count: int) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key")
        if key in pairs:
            raise cursor.damaged(f"metadata key {key!r:.80} is there twice")
        pairs[key] = _value(cursor, key)
    return pairs


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.value(_U32, f"the type of {key:.80}")
    if kind == _STRING:
        return cursor.string(f"{key:.80}")
    if kind != _ARRAY:
        return cursor.value(_scalar(cursor, key, kind), f"{key:.80}")
    kind = cursor.value(_U32, f"the element type of {key:.80}")
    if kind == _STRING:
        count, size = cursor.count(f"strings of {key:.80}", 8), 0
    else:  # an array of arrays is refused here, as by gguf.cpp
        size = _scalar(cursor, key, kind).size
        count = cursor.count(f"elements of {key:.80}", size)
    start = _Cursor(cursor.path, cursor.data, cursor.at)
    if kind == _STRING:
        cursor.skip_strings(count, f"{key:.80}")
    else:
        cursor.at += count * size
    return _Array(cursor=start, key=key, type=kind, count=count)


def _scalar(cursor: _Cursor, key: str, kind: int) -> struct.Struct:
    try:
        return _SCALARS[kind]
    except KeyError:
        raise cursor.damaged(f"metadata key {key!r:.80}: value type {kind} is not valid") from None


def _tensor_infos(cursor: _Cursor, count: int, alignment: int) -> Iterator[TensorInfo]:
    """Yield the tensors of a part; every check of one is made before it is yielded."""
    listed = [_tensor_info(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    names: set[str] = set()
    end, before = 0, ""
    for info in sorted(listed, key=lambda info: info.offset):
        name = f"tensor {info.name!r:.80}"
        if info.name in names:
            raise cursor.damaged(f"{name} is there twice")
        if info.offset % alignment:
            raise cursor.damaged(f"{name}: offset {info.offset} is no multiple of {alignment}")
        if info.offset < end:
            raise cursor.damaged(f"{name}: its data overlaps that of {before}")
        names.add(info.name)
        end, before = info.offset + info.n_bytes, name
        if start + end > cursor.size:
            raise SourceError(
                f"{one_line(cursor.path)}: truncated: the data of {one_line(name)} should end at "
                f"byte {start + end}, the file ends at {cursor.size}: fetch it anew"
            )
    for info in listed:
        yield replace(info, offset=start + info.offset)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """Read one tensor's entry; its offset still counts from the start of the data."""
    name = cursor.string("a tensor name")
    what = f"tensor {name!r:.80}"
    n_dims = cursor.value(_U32, f"the number of dims of {what}")
    if n_dims > _MAX_DIMS:
        raise cursor.damaged(f"{what}: expected at most {_MAX_DIMS} dims, found {n_dims}")
    dims = [cursor.value(_U64, f"the dims of {what}") for _ in range(n_dims)]
    if not all(dims):
        raise cursor.damaged(f"{what}: expected dims of at least 1, found {dims}")
    number = cursor.value(_U32, f"the type of {what}")
    if number not in _tensor_types():
        raise SourceError(
            f"{one_line(cursor.path)}: {one_line(what)}: type number {number} is unknown to the "
            f"installed gguf package: update gguf, or requantise the model"
        )
    type_name, block, block_bytes = _tensor_types()[number]
    columns = dims[0] if dims else 1
    if columns % block:
        raise cursor.damaged(
            f"{what}: rows of {columns} are no whole number of {type_name} blocks of {block}"
        )
    return TensorInfo(
        name=name,
        shape=tuple(reversed(dims)),
        type=type_name,
        n_bytes=math.prod(dims) // block * block_bytes,
        part=0,
        offset=cursor.value(_U64, f"the offset of {what}"),
    )


@cache
def _tensor_types() -> dict[int, tuple[str, int, int]]:
    """Return type number -> (name, elements per block, bytes per block), as gguf-py has it."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
