"""APRT tensors and folders of them: what ``apr trace --save-tensor`` writes, and we do.

A tensor's file: bytes 0-3 ``APRT``; 4-7 layer, u32 little-endian, 0xFFFFFFFF for whole-model
stages; 8-11 element count, u32; then that many float32. It knows neither its stage nor its shape.
A folder: ``layer-<N>/<stage>.bin``, and ``<stage>.bin`` for whole-model stages. Ours hold a
``manifest.json`` too, with which stale and foreign files are told from data.

Source: https://github.com/paiml/aprender, crates/aprender-serve/src/inference_trace/save_tensor.rs
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.sources._files import Block, file_size, json_object, one_line, reason, replace_file
from pytest_aprt.stages import STAGES, Stage, stage_named

WHOLE_MODEL = 0xFFFFFFFF
"""The header's layer of a stage that belongs to no layer."""

MANIFEST = "manifest.json"
INCOMPLETE = "INCOMPLETE"
"""A file that stands in a folder of ours as long as it is being written."""

SCHEMA = "aprt-dump-v1"

MAPPED = 1 << 20
"""Elements above which a file is mapped and not read."""

_HEADER = struct.Struct("<4sII")  # magic, layer, count
_TENSORS = ("*.bin", "layer-*/*.bin", "step-*/*.bin", "step-*/layer-*/*.bin")
_LAYER_FOLDER = re.compile(r"layer-(0|[1-9][0-9]{0,8})", re.ASCII)


def read_header(path: Path) -> tuple[int, int]:
    """Return the layer and the element count of an APRT file, checked against its size.

    Raises:
        SourceError: no file, not APRT, or a size other than 12 + 4 * count bytes.
    """
    size = file_size(path, "an APRT tensor")
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise SourceError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    if len(head) < _HEADER.size or head[:4] != b"APRT":
        raise SourceError(
            f"{one_line(path)}: expected an APRT tensor, 12 bytes of header that begin with "
            f"b'APRT', found {size} bytes that begin with {head[:4]!r}: dump it anew"
        )
    _, layer, count = _HEADER.unpack(head)
    if size != _HEADER.size + 4 * count:
        raise SourceError(
            f"{one_line(path)}: expected {_HEADER.size + 4 * count} bytes, as its header counts "
            f"{count} elements, found {size}: the file is truncated or overwritten, dump it anew"
        )
    return layer, count


def read_tensor(path: str | os.PathLike[str], expect_layer: int | None) -> NDArray[np.float32]:
    """Return the elements of an APRT file: (count,) float32, bit for bit as stored.

    They are fresh, or those of a large file mapped: what is written to them changes no file.

    Args:
        path: the file.
        expect_layer: what the header must say, WHOLE_MODEL for no layer; None takes any layer.

    Raises:
        SourceError: as for ``read_header``, or the header has another layer.
    """
    return _elements(_checked(Path(path), expect_layer))


def write_tensor(path: str | os.PathLike[str], layer: int, array: NDArray[np.float32]) -> None:
    """Write an APRT file atomically, its folder too where absent: it is there whole or not at all.

    Args:
        path: the file, replaced if it is there.
        layer: the layer, or WHOLE_MODEL.
        array: float32 of any shape; its elements are written in row-major order.

    Raises:
        SourceError: the file cannot be written, for instance on a full disk.
    """
    body = np.ascontiguousarray(array, dtype="<f4")
    _write(Path(path), _HEADER.pack(b"APRT", layer, body.size), body.data.cast("B"))


class InParts(Protocol):
    """A stage (heads, queries, keys) that is made some queries at a time."""

    @property
    def shape(self) -> Sequence[int]:
        """Heads, queries, keys."""

    def arrays(self) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """Yield queries and their part, (heads, their number, keys) float32."""


def write_parts(
    path: str | os.PathLike[str],
    layer: int,
    shape: Sequence[int],
    parts: Iterable[tuple[range, NDArray[np.float32]]],
) -> None:
    """Write an APRT file as ``write_tensor`` does, from what ``InParts.arrays`` yields."""
    heads, queries, keys = shape

    def body(file: BinaryIO) -> None:
        for some, part in parts:
            for head in range(heads):
                file.seek(_HEADER.size + 4 * (head * queries + some.start) * keys)
                file.write(np.ascontiguousarray(part[head], dtype="<f4").data.cast("B"))

    _write(Path(path), _HEADER.pack(b"APRT", layer, heads * queries * keys), body)


class DumpFolder:
    """A folder of APRT tensors, listed and checked; each is read when asked for."""

    path: Path
    manifest: dict[str, Any] | None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _listed(path)
        self.manifest = _manifest(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DumpFolder:
        """List a dump folder; headers and hashes are checked by ``read``.

        Raises:
            SourceError: no folder, no tensors in it, a file that is no stage's, the same stage
                twice, or files that contradict the manifest.
        """
        return cls(Path(path))

    @property
    def layers(self) -> list[int]:
        """Layers that have a stage here, ascending."""
        return sorted({layer for layer, _ in self._files if layer is not None})

    def stages(self, layer: int | None) -> list[str]:
        """Return the stages of a layer (None: of the whole model), in computation order."""
        return [name for name in STAGES if (layer, name) in self._files]

    def file(self, layer: int | None, stage: str) -> Path:
        """Return the file of one stage; raises as ``read`` where it is not here."""
        name = stage_named(stage).name
        path = self._files.get((layer, name))
        if path is None:
            where = "the whole model" if layer is None else f"layer {layer}"
            there = ", ".join(self.stages(layer)) or "none"
            raise SourceError(
                f"{one_line(self.path)}: no {name} of {where}: its stages here are: {there}"
            )
        return path

    def header(self, layer: int | None, stage: str) -> tuple[int, int]:
        """Return what the header of one stage says: layer and element count; raises as ``read``."""
        return read_header(self.file(layer, stage))

    def read(self, layer: int | None, stage: str) -> NDArray[np.float32]:
        """Return the elements of one stage: (count,) float32.

        Args:
            layer: the layer, None for whole-model stages.
            stage: the stage's name or alias.

        Raises:
            SourceError: the stage is not here, its file is damaged or of another layer, or it has
                changed since the manifest was written.
            SettingsError: no stage has this name.
        """
        path = self.file(layer, stage)
        data = _checked(path, WHOLE_MODEL if layer is None else layer)
        if self.manifest is not None:
            _check_unchanged(
                path, data, self.manifest["files"][path.relative_to(self.path).as_posix()]
            )
        return _elements(data)


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    tokens: Sequence[int],
    shapes: Mapping[str, Sequence[int]] | None = None,
    **fields: Any,
) -> None:
    """Write ``manifest.json`` over all tensors in the folder, those of its steps too, atomically.

    Args:
        folder: a dump folder, complete.
        tokens: the token ids of the run.
        shapes: shape by relative path (``layer-0/attn_norm.bin``); (count,) where absent.
        fields: what else to record, as JSON: model and oracle hashes, arithmetic, writer version.

    Raises:
        SourceError: a file is no APRT tensor, or the manifest cannot be written.
    """
    folder = Path(folder)
    known = shapes or {}
    files = {}
    for name in _tensor_paths(folder):
        data = _checked(folder / name, None)
        shape = list(known.get(name, [(len(data) - _HEADER.size) // 4]))
        files[name] = {"sha256": hashlib.sha256(data.data).hexdigest(), "shape": shape}
    manifest = {"schema": SCHEMA, **fields, "tokens": list(tokens), "files": files}
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _checked(path: Path, expect_layer: int | None) -> NDArray[np.uint8]:
    """Return the file's bytes; its size is checked before the body is read."""
    layer, count = read_header(path)
    if expect_layer is not None and layer != expect_layer:
        raise SourceError(
            f"{one_line(path)}: expected {_layer_text(expect_layer)} in the header, found "
            f"{_layer_text(layer)}: the file was moved or written by mistake, dump it anew"
        )
    try:
        data: NDArray[np.uint8]
        if count > MAPPED:
            data = np.memmap(path, np.uint8, "c")  # a copy on write: torch takes no read-only array
        else:
            data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise SourceError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    if len(data) != _HEADER.size + 4 * count:
        raise SourceError(f"{one_line(path)}: changed while it was read: wait for its writer")
    return data


def _check_unchanged(path: Path, data: NDArray[np.uint8], entry: Mapping[str, Any]) -> None:
    count = (len(data) - _HEADER.size) // 4
    if hashlib.sha256(data.data).hexdigest() != entry["sha256"] or prod(entry["shape"]) != count:
        raise SourceError(
            f"{one_line(path)}: expected sha256 {one_line(entry['sha256']):.64} and shape "
            f"{entry['shape']!s:.80}, as {MANIFEST} says, found another file of {count} elements: "
            f"dump it anew"
        )


def _elements(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    found = data[_HEADER.size :].view("<f4")
    return found if isinstance(found, np.memmap) else found.astype(np.float32)


def _layer_text(layer: int) -> str:
    return "the whole model (0xFFFFFFFF)" if layer == WHOLE_MODEL else f"layer {layer}"


def _write(path: Path, *blocks: Block) -> None:
    try:
        replace_file(path, *blocks)
    except OSError as error:
        raise SourceError(f"{one_line(path)}: cannot be written: {reason(error)}") from None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{one_line(folder)}: expected a folder of APRT dumps: {reason(error)}: check the path"
        ) from None


def _listed(folder: Path) -> dict[tuple[int | None, str], Path]:
    """Return the stages' files by layer and stage."""
    files: dict[tuple[int | None, str], Path] = {}
    for layer, path in _candidates(folder):
        key = (layer, _stage_of(path, layer).name)
        if key in files:
            raise SourceError(
                f"{one_line(path)}: is the same stage as {one_line(files[key].name)}: keep one"
            )
        file_size(path, "an APRT tensor")
        files[key] = path
    if not files:
        raise SourceError(
            f"{one_line(folder)}: expected layer-<N>/<stage>.bin or <stage>.bin, found no tensor: "
            f"did the dump fail, or is another folder meant?"
        )
    return files


def _candidates(folder: Path) -> Iterator[tuple[int | None, Path]]:
    """Yield every ``.bin`` of the folder and of its layers, each with the layer it lies in."""
    for entry in _entries(folder):
        if entry.suffix == ".bin":
            yield None, entry
        elif match := _LAYER_FOLDER.fullmatch(entry.name):
            for path in _entries(entry):
                if path.suffix == ".bin":
                    yield int(match[1]), path
        elif entry.name.startswith("layer-"):
            raise SourceError(
                f"{one_line(entry)}: expected layer-<N> with a plain number, such as layer-0: "
                f"rename or remove it"
            )


def _stage_of(path: Path, layer: int | None) -> Stage:
    try:
        stage = stage_named(path.stem)
    except SettingsError:
        raise SourceError(
            f"{one_line(path)}: expected a stage's name, one of {', '.join(STAGES)}: rename or "
            f"remove it"
        ) from None
    if stage.per_layer != (layer is not None) or (stage.first_layer_only and layer):
        if not stage.per_layer:
            place = "the dump folder itself"
        else:
            place = "layer-0/" if stage.first_layer_only else "a folder layer-<N>/"
        raise SourceError(f"{one_line(path)}: expected {stage.name} in {place}: move or remove it")
    return stage


def _tensor_paths(folder: Path) -> list[str]:
    """Return the path of every tensor of the folder and its steps, relative to the folder."""
    found = [path for pattern in _TENSORS for path in folder.glob(pattern)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, None if there is none; its files are those in the folder."""
    path = folder / MANIFEST
    if os.path.lexists(folder / INCOMPLETE):
        raise SourceError(
            f"{one_line(folder)}: expected a complete dump, found {INCOMPLETE}: its writer is "
            f"still at work or was stopped, dump it anew"
        )
    if not os.path.lexists(path):
        return None
    manifest = json_object(path)
    problem = _manifest_problem(manifest)
    if problem:
        raise SourceError(f"{one_line(path)}: expected {problem}: dump the folder anew")
    listed, there = set(manifest["files"]), set(_tensor_paths(folder))
    for names, what in ((listed - there, "is missing"), (there - listed, "is not listed")):
        if names:
            raise SourceError(
                f"{one_line(path)}: {one_line(min(names))} {what}, the first of {len(names)}: the "
                f"folder mixes dumps or lost files, dump it anew"
            )
    return manifest


def _manifest_problem(manifest: Mapping[str, Any]) -> str | None:
    """Return what the manifest should have and has not, None if it is well-formed."""
    if manifest.get("schema") != SCHEMA:
        return f"schema {SCHEMA!r}, found {one_line(manifest.get('schema'))!r:.60}"
    if not _are_counts(manifest.get("tokens")):
        return "tokens, a list of token ids"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "files, an object from path to sha256 and shape"
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("sha256"), str)
            and _are_counts(entry.get("shape"))
        ):
            return f"files[{one_line(name)!r:.80}] to hold sha256, a string, and shape, a list"
    return None


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
