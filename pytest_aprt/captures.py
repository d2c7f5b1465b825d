"""Captured stages of model and oracle on disk, for the tests of a user's own that ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.errors import SettingsError
from pytest_aprt.stages import Point, stage_named

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_aprt.capture import LayerStages
    from pytest_aprt.report import Report

SIDES = ("model", "oracle")


class CaptureWriter:
    """Writes every stage that passes: ``<folder>/<side>/<prompt>/<point>.npy``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self, side: str, prompt: int, layers: Iterable[LayerStages]
    ) -> Iterator[LayerStages]:
        """Yield what ``layers`` yields once it is written.

        Raises:
            SettingsError: the disk is full, or the folder cannot be written.
        """
        folder = self._folder / side / str(prompt)
        for captured in layers:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for name, tensor in captured.stages.items():
                    _save(folder / f"{Point(captured.layer, name)}.npy", tensor)
            except OSError as error:
                raise SettingsError(
                    f"cannot keep the captured stages in {folder}: {error.strerror or error}; a "
                    "test asks for aprt_model or aprt_oracle; choose a disk with room by TMPDIR"
                ) from error
            yield captured


def _save(path: Path, tensor: Tensor) -> None:
    from pytest_aprt import strips

    if not isinstance(tensor, strips.Strips):
        np.save(path, tensor.numpy())
        return
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(tensor.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        strips.write(file, tensor)


class Captures(Mapping[str, NDArray[np.float32]]):
    """The captured stages of one side on one prompt, by point; each is read when asked for.

    ``captures["L02-q_post_rope"]`` and ``captures.stage(2, "q_post_rope")`` are the same array:
    float32, shaped as STAGES says, Q and K rows in Hugging Face order.
    """

    def __init__(self, folder: Path, report: Report, prompt: int = 0) -> None:
        self._folder, self._report, self._prompt = folder, report, prompt

    def __getitem__(self, point: str | Point) -> NDArray[np.float32]:
        """Return the stage at a point; raises KeyError where it was not captured."""
        if str(point) not in self._names:
            known = ", ".join(self._names) or "none"
            raise KeyError(f"{point} was not captured; these were: {known}")
        stage: NDArray[np.float32] = np.load(self._path / f"{point}.npy")
        return stage

    def __contains__(self, point: object) -> bool:
        return str(point) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def stage(self, layer: int | None, name: str) -> NDArray[np.float32]:
        """Return the stage ``name`` of a layer (None: of the whole model).

        Raises:
            KeyError: it was not captured.
            SettingsError: no stage has that name.
        """
        return self[Point(layer, stage_named(name).name)]

    def prompt(self, index: int) -> Captures:
        """Return the same side's captures on another prompt; the first is 0."""
        count = len(self._report["run"]["prompts"])
        if not 0 <= index < count:
            raise IndexError(f"prompt {index} was not run: expected 0 to {count - 1}")
        return Captures(self._folder, self._report, index)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of the prompt."""
        return tuple(self._report["run"]["prompts"][self._prompt]["tokens"])

    @property
    def _path(self) -> Path:
        return self._folder / str(self._prompt)

    @cached_property
    def _names(self) -> dict[str, None]:
        """The captured points in computation order."""
        names = [point["point"] for point in self._report["points"]]
        return dict.fromkeys(n for n in names if (self._path / f"{n}.npy").exists())
