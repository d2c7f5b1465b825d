"""Hugging Face models on disk: config.json and safetensors, read tensor by tensor.

A hub id is resolved through huggingface_hub's cache, as transformers resolves it. Nothing here
knows what the tensors mean, and transformers is not imported.

Source: https://huggingface.co/docs/safetensors for the format; transformers'
``_get_resolved_checkpoint_files`` for which files are a model's weights: model.safetensors, else
the shards that model.safetensors.index.json names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytest_aprt.errors import SourceError
from pytest_aprt.sources._files import (
    Reader,
    file_size,
    json_object,
    mapped,
    no_such_tensor,
    one_line,
    reason,
    rows_within,
    sha256_of,
)

if TYPE_CHECKING:
    import torch

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_FETCHED = (
    _CONFIG,
    "generation_config.json",
    _SINGLE,
    _INDEX,
    "tokenizer*",
    "*token*.json",  # special_tokens_map.json, added_tokens.json
    "vocab.*",
    "merges.txt",
    "*.model",  # SentencePiece
    "chat_template*",
)
"""What is fetched of a hub repository at first; shards follow once the index names them."""

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?", re.ASCII)

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes that widen to float32, or narrow to it, by value -> torch's names; all others are
quantised or integer."""

_INSTEAD = (
    ("pytorch_model*.bin", "pickled weights: convert them with save_pretrained"),
    ("adapter_model.safetensors", "an adapter alone: merge it into its base model first"),
    ("*.gguf", "a GGUF file: name that file itself"),
    ("*.safetensors", "other safetensors files: save_pretrained writes the expected names"),
)
"""What lies in folders without the expected weights, and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies and what it is."""

    file: Path
    type: str  # safetensors' name: BF16
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    n_bytes: int


class HfFolder:
    """A Hugging Face model folder, open for reading; a context manager.

    ``source`` is what the user named, ``path`` the folder it led to, ``config`` the raw content of
    config.json.
    """

    source: str
    path: Path
    config: dict[str, Any]

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self.path = path
        self.config = json_object(path / _CONFIG)
        self._files = _weight_files(path)
        self._entries = _entries(self._files)
        _check_index(path, self._files, self._entries)
        self._maps: dict[Path, mmap.mmap] = {}
        self._readers: dict[Path, Reader] = {}
        self._sha256: str | None = None

    @classmethod
    def open(cls, source: str) -> HfFolder:
        """Open a model folder or a hub id (``owner/name``, also ``owner/name@revision``).

        Raises:
            SourceError: no such folder or hub id, nothing cached while offline, config or weights
                missing or damaged.
        """
        path = Path(source)
        try:
            local = path.is_dir()
        except (OSError, ValueError) as error:
            raise SourceError(f"{one_line(source)}: cannot be opened: {reason(error)}") from None
        if not local:
            path = _snapshot(source)
        if not (path / _CONFIG).is_file():
            raise SourceError(
                f"{one_line(source)}: expected a Hugging Face model folder, found no {_CONFIG} in "
                f"it: name the folder that save_pretrained wrote"
            )
        return cls(source, path)

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """Where every tensor lies and what it is, by name."""
        return self._entries

    @property
    def names(self) -> KeysView[str]:
        """Names of all tensors, in the order of the files; works as a set."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            SourceError: no such tensor; the message names close matches.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's stored dtype as safetensors names it: ``BF16``.

        Raises:
            SourceError: no such tensor.
        """
        return self._entry(name).type

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor as float32, of ``shape(name)``.

        Raises:
            SourceError: no such tensor, or its dtype is no float that float32 can stand for.
        """
        import torch

        return self._stored(name).to(torch.float32)

    def rows(self, name: str, indices: Iterable[int]) -> torch.Tensor:
        """Return some rows as float32, in the order asked: (len(indices), *shape(name)[1:]).

        The rest of the tensor is not read: what safetensors returns is a view of the mapped file.

        Raises:
            SourceError: as for ``tensor``, or an index that is no row.
        """
        import torch

        stored = self._stored(name)
        if not stored.dim():
            raise SourceError(f"{one_line(self.source)}: tensor {one_line(name)!r} has no rows")
        if isinstance(indices, range) and indices.step == 1:
            rows_within(self.path, name, [indices[0], indices[-1]] if indices else [], len(stored))
            return stored[indices.start : indices.stop].to(torch.float32, copy=True)
        wanted = rows_within(self.path, name, indices, len(stored))
        return stored[torch.tensor(wanted, dtype=torch.int64)].to(torch.float32)

    def fill(self, name: str, rows: range, out: torch.Tensor) -> None:
        """Widen consecutive rows of a matrix into ``out``, float32 (rows, columns).

        Raises:
            SourceError: as for ``tensor``, or the file was cut short since it was opened.
        """
        import torch

        from pytest_aprt.buffers import buffer

        entry, dtype = self._entry(name), self._dtype_of(name)
        row = entry.n_bytes // entry.shape[0]
        raw = buffer("raw", (len(rows) * row,), torch.uint8)
        self._reader(entry).fill(raw.numpy(), entry.offset + rows.start * row)
        out.copy_(buffer("raw", out.shape, dtype))  # the same memory

    def _reader(self, entry: Entry) -> Reader:
        if entry.file not in self._readers:
            self._readers[entry.file] = Reader(entry.file)
        return self._readers[entry.file]

    def sha256(self) -> str:
        """Return the hex SHA-256 of the safetensors files, in name order, one after another."""
        if self._sha256 is None:
            self._sha256 = sha256_of(self._files)
        return self._sha256

    def close(self) -> None:
        """Let go of the files; tensors read so far stay valid, and reading maps them again."""
        self._maps.clear()
        self._readers.clear()

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise no_such_tensor(self.path, name, self._entries) from None

    def _dtype_of(self, name: str) -> torch.dtype:
        import torch

        entry = self._entry(name)
        if entry.type not in FLOATS:
            raise SourceError(
                f"{one_line(entry.file)}: tensor {one_line(name)!r}: expected one of "
                f"{', '.join(sorted(FLOATS))}, found {entry.type}: name a checkpoint whose "
                f"weights are not quantised"
            )
        found: torch.dtype = getattr(torch, FLOATS[entry.type])
        return found

    def _stored(self, name: str) -> torch.Tensor:
        import torch

        entry, dtype = self._entry(name), self._dtype_of(name)
        if entry.file not in self._maps:
            self._maps[entry.file] = mapped(entry.file)
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape)
        # A private map may be written to in principle, which spares torch a copy or a warning.
        flat = torch.frombuffer(
            self._maps[entry.file], dtype=dtype, count=count, offset=entry.offset
        )
        return flat.view(entry.shape)


def _weight_files(path: Path) -> list[Path]:
    """Return the safetensors files that are the model's weights, sorted by name."""
    if os.path.lexists(path / _SINGLE):
        return [path / _SINGLE]
    if os.path.lexists(path / _INDEX):
        return sorted(path / shard for shard in set(_weight_map(path).values()))
    for pattern, what in _INSTEAD:
        if any(path.glob(pattern)):
            raise SourceError(f"{one_line(path)}: expected {_SINGLE} or {_INDEX}, found {what}")
    raise SourceError(
        f"{one_line(path)}: expected {_SINGLE} or {_INDEX}, found no weights: fetch the whole model"
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index's map from tensor to shard, each shard a file below the folder."""
    index = path / _INDEX
    found = json_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError(
            f"{one_line(index)}: expected weight_map, an object from tensor to shard, found "
            f"{type(found).__name__}: fetch it anew"
        )
    for name, shard in found.items():
        if not isinstance(shard, str) or not _is_below(shard):
            raise SourceError(
                f"{one_line(index)}: weight_map[{one_line(name)!r:.80}]: expected a file name, "
                f"found {one_line(shard)!r:.80}: fetch it anew"
            )
    return found


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        "\0" not in name
        and name not in ("", ".")
        and not path.is_absolute()
        and ".." not in path.parts
    )


def _entries(files: list[Path]) -> dict[str, Entry]:
    """Return the tensors of all files by name, from their headers: no torch is needed for it."""
    entries: dict[str, Entry] = {}
    for file in files:
        start, header = _header(file)
        for name in sorted(header.keys() - {"__metadata__"}):
            if name in entries:
                raise SourceError(
                    f"{one_line(file)}: tensor {one_line(name)!r} is in "
                    f"{one_line(entries[name].file.name)} too: fetch the model anew"
                )
            stated = header[name]
            begin, end = stated["data_offsets"]
            entries[name] = Entry(
                file=file,
                type=stated["dtype"],
                shape=tuple(stated["shape"]),
                offset=start + begin,
                n_bytes=end - begin,
            )
    return entries


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where a file's tensors begin and its header, which safetensors has validated."""
    with _safe_open(file, "np"), file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
        return 8 + length, header


def _check_index(path: Path, files: list[Path], entries: dict[str, Entry]) -> None:
    """Check that each shard holds the tensors that the index says it holds."""
    if files == [path / _SINGLE]:
        return
    for name, shard in _weight_map(path).items():
        if name not in entries or entries[name].file != path / shard:
            raise SourceError(
                f"{one_line(path / shard)}: expected tensor {one_line(name)!r}, as {_INDEX} says, "
                f"found none: fetch the shards and the index of one revision"
            )


def _safe_open(file: Path, framework: str) -> Any:
    from safetensors import SafetensorError, safe_open

    file_size(file, "a safetensors file")
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(
            f"{one_line(file)}: expected a whole safetensors file, found: {reason(error)}: fetch "
            f"it anew"
        ) from None


def _snapshot(source: str) -> Path:
    """Return the folder in the hub's cache that holds the model, fetched if need be.

    Raises:
        SourceError: ``source`` is no folder and no hub id, or the hub does not give it.
    """
    match = _HUB_ID.fullmatch(source)
    there = os.path.lexists(source)
    if there or not match or source.startswith("."):
        found = "something else" if there else "nothing"
        raise SourceError(
            f"{one_line(source)}: expected a model folder or a hub id (owner/name), found {found}: "
            f"check the path"
        )
    repo, revision = match["id"], match["revision"]
    folder = _fetched(source, repo, revision, _FETCHED)
    if not (folder / _SINGLE).exists() and (folder / _INDEX).is_file():
        shards = sorted(set(_weight_map(folder).values()))
        if not all((folder / shard).exists() for shard in shards):
            _fetched(source, repo, revision, shards)
    return folder


def _fetched(source: str, repo: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Return the snapshot folder after fetching the files that match ``patterns``."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except hub.LocalEntryNotFoundError:
        # Offline. The hub refuses a snapshot that lacks any file matched by a pattern; what
        # transformers cached file by file is whole for us if config and weights are there.
        cached = try_to_load_from_cache(repo, _CONFIG, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        todo = "unset it" if offline else "connect"
        problem = (
            f"no such folder, and not in the hub's cache while {why}: {todo}, or fetch it before "
            f"with: hf download {repo}"
        )
    except hub.GatedRepoError:
        problem = "is gated: accept its terms on its page, then log in (hf auth login or HF_TOKEN)"
    except hub.RepositoryNotFoundError:
        problem = "no such folder, and the hub has none of that id: check it, or log in if private"
    except hub.RevisionNotFoundError:
        problem = f"the hub has no revision {revision!r} of it: name a branch, tag or commit"
    except hub.HFValidationError as error:
        problem = f"is no folder and no valid hub id: {reason(error)}"
    except Exception as error:  # whatever the HTTP library below huggingface_hub raises
        problem = f"cannot be fetched from the hub: {type(error).__name__}: {reason(error)}"
    raise SourceError(f"{one_line(source)}: {problem}")
