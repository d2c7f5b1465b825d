"""Writes a dump folder of which nobody ever sees a half.

Tensors go to a draft beside the target, marked as incomplete; the manifest comes last, then the
draft takes the target's place. What a killed writer leaves is the draft, which no reader accepts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.errors import SourceError
from pytest_aprt.sources._files import json_object, one_line, reason
from pytest_aprt.sources.aprt import (
    INCOMPLETE,
    MANIFEST,
    WHOLE_MODEL,
    InParts,
    write_manifest,
    write_parts,
    write_tensor,
)
from pytest_aprt.stages import STAGES


class DumpWriter:
    """A context manager: without an error, the folder is complete when it ends.

    Args:
        folder: the target; what is there is replaced if it is empty or a dump of ours.
        tokens: the token ids of the run.
        fields: what the manifest records besides, as JSON.

    Raises:
        SourceError: there is something else at the target, or it cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], tokens: Sequence[int], fields: Mapping[str, Any]
    ) -> None:
        self._target = Path(os.path.abspath(folder))
        self._tokens, self._fields = list(tokens), dict(fields)
        self._shapes: dict[str, tuple[int, ...]] = {}
        refuse_foreign(self._target)

    def __enter__(self) -> DumpWriter:
        try:
            # folders above the target are made at the end: without a dump there is no need of them
            there = next(folder for folder in self._target.parents if os.path.lexists(folder))
            prefix = f".{self._target.name}."
            self._draft = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=there))
            (self._draft / INCOMPLETE).touch()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from None
        return self

    def write(self, layer: int | None, stage: str, array: NDArray[np.float32] | InParts) -> None:
        """Write a stage of a layer (None: of the whole model), float32, shaped as STAGES says.

        Scores of keys behind the query count for nothing; they are written as 0, as others do.

        Raises:
            SourceError: it cannot be written, for instance on a full disk.
        """
        place = f"{stage}.bin" if layer is None else f"layer-{layer}/{stage}.bin"
        header = WHOLE_MODEL if layer is None else layer
        if isinstance(array, np.ndarray):
            if STAGES[stage].kind == "scores":
                array = _counted(array, range(array.shape[-2]), array.shape)
            write_tensor(self._draft / place, header, array)
        else:
            parts, shape = array.arrays(), array.shape
            if STAGES[stage].kind == "scores":
                parts = ((queries, _counted(part, queries, shape)) for queries, part in parts)
            write_parts(self._draft / place, header, shape, parts)
        self._shapes[place] = tuple(array.shape)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._complete()
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)

    def _complete(self) -> None:
        write_manifest(
            self._draft,
            tokens=self._tokens,
            shapes=self._shapes,
            writer=f"pytest-aprt {version('pytest-aprt')}",
            **self._fields,
        )
        try:
            self._draft.chmod(0o777 & ~_umask())
            (self._draft / INCOMPLETE).unlink()
            refuse_foreign(self._target)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if self._target.exists():
                old = self._draft.with_name(f"{self._draft.name}.old")
                self._target.rename(old)
                self._draft.rename(self._target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                self._draft.rename(self._target)
        except OSError as error:
            raise self._not_written(error) from None

    def _not_written(self, error: BaseException) -> SourceError:
        return SourceError(f"{one_line(self._target)}: cannot be written: {reason(error)}")


def _counted(
    array: NDArray[np.float32], queries: range, shape: Sequence[int]
) -> NDArray[np.float32]:
    """Return some queries' scores without those of keys behind the query."""
    return np.tril(array, shape[-1] - shape[-2] + queries.start)  # the last queries, all keys


def refuse_foreign(folder: Path) -> None:
    """Make sure that writing a dump to ``folder`` would lose nothing of somebody else's.

    Raises:
        SourceError: it is no folder, or holds a file that no manifest of ours lists.
    """
    if not os.path.lexists(folder):
        return
    try:
        next(folder.iterdir(), None)
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{one_line(folder)}: expected an empty or a new folder: {reason(error)}"
        ) from None
    ours = (
        {MANIFEST, *json_object(folder / MANIFEST).get("files", ())} if MANIFEST in there else set()
    )
    if foreign := there - ours:
        raise SourceError(
            f"{one_line(folder)}: expected an empty or a new folder, or a dump of ours to replace, "
            f"found {one_line(min(foreign))}: name another folder, or remove this one"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
