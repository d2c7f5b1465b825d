"""GGUF models, whole or split: what their headers say, and their tensors dequantised on demand.

The header's walk is in ``gguf_header.py``; dequantisation is gguf-py's.

Source: llama.cpp's ``gguf-split`` for the names and keys of split files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.errors import SourceError
from pytest_aprt.sources._files import (
    Reader,
    no_such_tensor,
    one_line,
    rows_within,
    sha256_of,
)
from pytest_aprt.sources.gguf_header import GgufPart, TensorInfo

__all__ = ["GgufFile", "TensorInfo"]

_PLAIN = {
    "F64": "<f8",
    "F32": "<f4",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
}
"""Tensor types that are plain numbers -> numpy dtype; all others are gguf-py's to dequantise."""

_CHUNK = 1 << 20
"""Weights dequantised at a time: the decoder's temporaries then stay in cache."""

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufFile:
    """A GGUF model, whole or split, open for reading; a context manager.

    Whoever holds a view from ``raw`` keeps its memory map alive past ``close``.
    """

    path: Path
    parts: list[Path]
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path, parts: list[GgufPart]) -> None:
        self.path = path
        self.parts = [part.path for part in parts]
        self.metadata = parts[0].metadata
        self.architecture = _architecture(parts[0])
        self.tensors = _merged(parts)
        self._maps = [part.data for part in parts]
        self._readers: dict[int, Reader] = {}
        self._sha256: str | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Open a GGUF file, or the whole of a split one given any of its parts.

        Raises:
            SourceError: no GGUF of a known version, a truncated or contradictory header, an unknown
                tensor type, tensor data outside the file, or a missing part.
        """
        path = Path(path)
        first = GgufPart(path)
        paths = _split_paths(first)
        parts = [first if each == path else GgufPart(each) for each in paths]
        _check_split(parts)
        return cls(path, parts)

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor.

        Raises:
            SourceError: no such tensor; the message names close matches.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise no_such_tensor(self.path, name, self.tensors) from None

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the tensor's bytes as they lie in the file: (rows, bytes per row), read-only.

        Raises:
            SourceError: no such tensor, or the file was closed.
        """
        info = self._open_info(name)
        data = np.frombuffer(self._maps[info.part], np.uint8, info.n_bytes, info.offset)
        return data.reshape(info.rows, -1)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return the whole tensor dequantised, a fresh array of ``info(name).shape``.

        Raises:
            SourceError: no such tensor, or gguf-py cannot dequantise its type.
        """
        info = self.info(name)
        return self._dequantised(info, self.raw(name)).reshape(info.shape)

    def fill(self, name: str, rows: slice | NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Dequantise some rows of a matrix into ``out``, (rows, columns).

        Raises:
            SourceError: as for ``tensor``, or the file was cut short since it was opened.
        """
        info = self._open_info(name)
        if isinstance(rows, slice):
            row = info.n_bytes // info.rows
            blocks = _own_memory((rows.stop - rows.start, row))
            self._reader(info).fill(blocks, info.offset + rows.start * row)
            self._decode(info, blocks, out)
        else:
            self._decode(info, _copied(self.raw(name)[rows]), out)

    def _open_info(self, name: str) -> TensorInfo:
        info = self.info(name)
        if not self._maps:
            raise SourceError(f"{one_line(self.path)}: was closed; open it again to read {name}")
        return info

    def _reader(self, info: TensorInfo) -> Reader:
        if info.part not in self._readers:
            self._readers[info.part] = Reader(self.parts[info.part])
        return self._readers[info.part]

    def rows(self, name: str, indices: Iterable[int]) -> NDArray[np.float32]:
        """Return some rows dequantised, in the order asked: (len(indices), columns).

        Raises:
            SourceError: as for ``tensor``, or an index that is no row.
        """
        info = self.info(name)
        wanted = rows_within(self.path, name, indices, info.rows)
        return self._dequantised(info, self.raw(name)[wanted])

    def sha256(self) -> str:
        """Return the hex SHA-256 of the file, for split ones of the parts one after another."""
        if self._sha256 is None:
            self._sha256 = sha256_of(self.parts)
        return self._sha256

    def close(self) -> None:
        """Let go of the memory maps; ``metadata`` read so far and ``tensors`` remain."""
        self._readers.clear()
        maps, self._maps = self._maps, []
        for each in maps:
            try:
                each.close()
            except BufferError:  # a view of it is still held; it closes with the last of them
                continue

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _dequantised(self, info: TensorInfo, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
        out = np.empty((len(blocks), info.columns), np.float32)
        step = max(1, _CHUNK // info.columns)
        for start in range(0, len(blocks), step):
            self._decode(info, _copied(blocks[start : start + step]), out[start : start + step])
        return out

    def _decode(
        self, info: TensorInfo, blocks: NDArray[np.uint8], out: NDArray[np.float32]
    ) -> None:
        try:
            with np.errstate(all="ignore"):  # a NaN scale is data, not an accident of ours
                _decoder(info.type)(blocks, out)
        except NotImplementedError:  # of gguf: it knows the type, and has no decoder for it
            raise SourceError(
                f"{one_line(self.path)}: tensor {one_line(info.name)!r} is of type {info.type}, "
                f"which the installed gguf package cannot dequantise: requantise the model to "
                f"another type or update gguf"
            ) from None


def _split_paths(part: GgufPart) -> list[Path]:
    """Return where all parts of the model lie, by the header and the name of one of them."""
    number, count = part.split
    if count == 1:
        return [part.path]
    match = _SPLIT_NAME.fullmatch(part.path.name)
    if not match or (int(match["number"]) - 1, int(match["count"])) != (number, count):
        raise SourceError(
            f"{one_line(part.path)}: its header says split.no {number!r:.20} of split.count "
            f"{count!r:.20}, expected a name that ends in -0000I-of-0000N.gguf with I = split.no "
            f"+ 1 and N = split.count: give all parts their original names"
        )
    names = [f"{match['stem']}-{each:05d}-of-{count:05d}.gguf" for each in range(1, count + 1)]
    paths = [part.path.with_name(name) for name in names]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise SourceError(
            f"{one_line(part.path)}: expected all {count} parts beside it, {len(missing)} missing, "
            f"the first is {one_line(missing[0].name)}: fetch it into the same folder"
        )
    return paths


def _check_split(parts: list[GgufPart]) -> None:
    if len(parts) == 1:
        return
    for number, part in enumerate(parts):
        if part.split != (number, len(parts)):
            raise SourceError(
                f"{one_line(part.path)}: expected split.no {number} of split.count {len(parts)}, "
                f"found {part.split[0]!r:.20} of {part.split[1]!r:.20}: fetch all parts anew"
            )
    stated = parts[0].metadata.get("split.tensors.count")
    total = sum(len(part.tensors) for part in parts)
    if stated != total:
        raise SourceError(
            f"{one_line(parts[0].path)}: split.tensors.count says {stated!r:.20} tensors, the "
            f"{len(parts)} parts hold {total}: fetch all parts anew"
        )


def _merged(parts: list[GgufPart]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for name, info in part.tensors.items():
            if name in tensors:
                raise SourceError(
                    f"{one_line(part.path)}: tensor {one_line(name)!r:.80} is in an earlier part "
                    f"too: fetch all parts anew"
                )
            tensors[name] = replace(info, part=number)
    return tensors


def _architecture(part: GgufPart) -> str:
    found = part.metadata.get("general.architecture")
    if isinstance(found, str):
        return found
    raise SourceError(
        f"{one_line(part.path)}: expected general.architecture in the metadata, found "
        f"{type(found).__name__ if found is not None else 'none'}: name the GGUF of a model"
    )


@cache
def _decoder(kind: str) -> Callable[[NDArray[np.uint8], NDArray[np.float32]], None]:
    """Return what decodes raw rows, (rows, bytes per row), into values, (rows, columns)."""
    if plain := _PLAIN.get(kind):
        return lambda blocks, out: np.copyto(out, blocks.view(plain), casting="unsafe")
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    type_ = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[type_]
    import torch

    from pytest_aprt.sources.dequant import unpack_of

    if unpack := unpack_of(kind):

        def decode(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
            packed = torch.from_numpy(blocks).view(-1, size)
            unpack(packed, torch.from_numpy(out).view(-1, values))

        return decode
    from gguf.quants import dequantize

    return lambda blocks, out: np.copyto(out, dequantize(blocks, type_))


def _own_memory(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return aligned memory to decode from; this thread's next call overwrites it."""
    import torch

    from pytest_aprt.buffers import buffer

    found: NDArray[np.uint8] = buffer("blocks", shape, torch.uint8).numpy()
    return found


def _copied(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a copy: a mapped file is read-only, and its blocks lie on odd addresses."""
    own = _own_memory(blocks.shape)
    np.copyto(own, blocks)
    return own
