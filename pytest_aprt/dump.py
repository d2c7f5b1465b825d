"""A folder of APRT dumps as an engine: it yields what another program wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.sources.aprt import DumpFolder


class DumpRunner:
    """Reads one layer of a dump folder at a time."""

    def __init__(self, folder: DumpFolder) -> None:
        self._folder = folder

    @classmethod
    def open(cls, path: str) -> DumpRunner:
        """Open a dump folder.

        Raises:
            SourceError: it is no dump folder, or damaged.
        """
        return cls(DumpFolder.open(path))

    def layers(
        self, tokens: Sequence[int]
    ) -> Iterator[tuple[int | None, Mapping[str, NDArray[np.float32]]]]:
        """Yield the stages of every layer that the folder holds, then of the whole model."""
        for layer in [*self._folder.layers, None]:
            names = self._folder.stages(layer)
            yield layer, {name: self._folder.read(layer, name) for name in names}
