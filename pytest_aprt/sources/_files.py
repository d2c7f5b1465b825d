"""What all sources share: refusing what is no plain file, hashing, and one-line error texts."""

from __future__ import annotations

import difflib
import hashlib
import json
import mmap
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_aprt.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_REMEMBERED = 1 << 28
"""Bytes from which on a hash is remembered: 256 MB take 0.15 s."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def one_line(thing: object) -> str:
    """Return the text of ``thing`` with every unprintable character escaped, surrogates too."""
    text = str(thing)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def reason(error: BaseException) -> str:
    """Return the first line of what ``error`` says, without errno and file names."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return one_line(text.splitlines()[0].strip())


def file_size(path: Path, expected: str) -> int:
    """Return the size in bytes of the plain file at ``path``.

    A pipe or a device is refused before it is opened, since opening it may block for ever.

    Args:
        path: the file; symbolic links are followed.
        expected: what should be there, for the message: ``"a GGUF file"``.

    Raises:
        SourceError: nothing there, no permission, a loop of links, or no plain file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise SourceError(
            f"{one_line(path)}: expected {expected}, found nothing: check the path"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise SourceError(f"{one_line(path)}: cannot be opened: {reason(error)}") from None
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    found = next((kind for test, kind in _KINDS if test(status.st_mode)), "no plain file")
    raise SourceError(f"{one_line(path)}: expected {expected}, found {found}: name a file")


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that the file holds.

    Raises:
        SourceError: the file cannot be read, is no valid JSON, or holds no object.
    """
    file_size(path, "a JSON file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{one_line(path)}: expected valid JSON, found: {reason(error)}: fetch or write it anew"
        ) from None
    if not isinstance(value, dict):
        raise SourceError(
            f"{one_line(path)}: expected a JSON object, found a {type(value).__name__}"
        )
    return value


Block = bytes | memoryview | Callable[[BinaryIO], None]
"""What is written next to a file: bytes, or what writes some itself."""


def replace_file(path: Path, *blocks: Block) -> None:
    """Write beside the target, then rename onto it: readers see the old file or the new one.

    Its folder is made where absent; a failure leaves nothing.

    Raises:
        OSError: it cannot be written, for instance on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # An interrupt between opening and `with` must not leave a file object that warns.
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with open(handle, "wb", closefd=False) as file:
                for block in blocks:
                    if callable(block):
                        block(file)
                    else:
                        file.write(block)
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the hex SHA-256 of the files' bytes, one file after another.

    That of large files is remembered, as reading them takes longer than a run: by path, size,
    times of change and inode, in ``pytest-aprt`` under the user's cache folder.

    Raises:
        SourceError: a file cannot be read.
    """
    paths = list(paths)
    try:
        states = [(str(path.resolve()), path.stat()) for path in paths]
    except OSError as error:
        raise SourceError(f"{one_line(paths[0])}: cannot be read: {reason(error)}") from None
    if sum(state.st_size for _, state in states) < _REMEMBERED:
        return _hashed(paths)
    key = repr([(path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                for path, s in states])  # fmt: skip
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(base, "pytest-aprt", hashlib.sha256(key.encode(errors="replace")).hexdigest())
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", found := place.read_text(encoding="ascii")):
            return found
    digest = _hashed(paths)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        own = place.with_name(f"{place.name}.{os.getpid()}")
        own.write_text(digest, encoding="ascii")
        own.replace(place)
    return digest


def _hashed(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise SourceError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    return digest.hexdigest()


def no_such_tensor(path: Path, name: str, names: Iterable[str]) -> SourceError:
    """Return the error for a tensor that a file lacks; it names the three closest there are."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    nearest = f"the closest are {', '.join(close)}" if close else "none has a similar name"
    return SourceError(
        f"{one_line(path)}: no tensor {one_line(name)!r}: of its {len(known)} tensors "
        f"{one_line(nearest)}"
    )


def rows_within(path: Path, name: str, indices: Iterable[int], n_rows: int) -> list[int]:
    """Return ``indices`` as a list of ints, each checked to be a row of the tensor ``name``.

    Raises:
        SourceError: an index is negative or past the last row.
    """
    wanted = [int(index) for index in indices]
    for index in wanted:
        if not 0 <= index < n_rows:
            raise SourceError(
                f"{one_line(path)}: tensor {one_line(name)!r}: row {index} was asked for, expected "
                f"0 to {n_rows - 1}: were the tokens made for another vocabulary?"
            )
    return wanted


def mapped(path: Path) -> mmap.mmap:
    """Return a private map of a file: changes of the memory, if any, never reach the file."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise SourceError(f"{one_line(path)}: cannot be read: {reason(error)}") from None


class Reader:
    """Reads parts of a file into memory that is there already; threads may share it.

    A mapped page is mapped anew whenever its weights pass, under a lock that all threads share;
    what is read this way is no memory of ours.

    Raises:
        SourceError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SourceError(f"{one_line(path)}: cannot be opened: {reason(error)}") from None
        weakref.finalize(self, os.close, self._file)

    def fill(self, out: NDArray[np.uint8], offset: int) -> None:
        """Read as many bytes as ``out`` holds, from byte ``offset`` on.

        Raises:
            SourceError: the file cannot be read, or ends before.
        """
        left = out.reshape(-1).data
        while left:
            try:
                count = os.preadv(self._file, [left], offset)
            except OSError as error:
                raise SourceError(f"{one_line(self._path)}: cannot be read: {reason(error)}") from (
                    None
                )
            if not count:
                raise SourceError(
                    f"{one_line(self._path)}: expected {len(left)} more bytes at byte {offset}, "
                    "found the file's end: it was cut short while it was read; fetch it anew"
                )
            left, offset = left[count:], offset + count
