"""Dumps in and out: folders of APRT tensors as an engine, and what passes by written to folders.

A run on one prompt is one folder; a run on several holds them in ``prompt-0``, ``prompt-1``, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.sources.aprt import DumpFolder
from pytest_aprt.sources.aprt_writer import DumpWriter

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_aprt.capture import LayerStages
    from pytest_aprt.measure import Keep
    from pytest_aprt.readings import Prompt
    from pytest_aprt.strips import Strips


class DumpRunner:
    """Reads one layer of a dump at a time; ``arithmetic`` is what its manifest declares.

    Args:
        folders: one for each prompt; more than one have manifests.
        source: what the user named.
    """

    def __init__(self, folders: Sequence[DumpFolder], source: str) -> None:
        self._folders, self._source = folders, source
        declared = self.recorded("arithmetic")
        self.arithmetic: str | None = None if declared in (None, "auto") else str(declared)

    @classmethod
    def open(cls, path: str) -> DumpRunner:
        """Open a dump folder, or a folder of one for each prompt.

        Raises:
            SourceError: it is no dump folder, or damaged.
        """
        prompts = _prompt_folders(Path(path))
        folders = [DumpFolder.open(folder) for folder in prompts or [Path(path)]]
        for folder in folders:
            if prompts and folder.manifest is None:
                raise SourceError(
                    f"{folder.path}: expected a manifest.json, since the dump is one of several: "
                    "name the one folder to read, or dump them anew"
                )
        return cls(folders, path)

    @property
    def prompts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Text and token ids of every prompt, as the manifests say; empty without a manifest."""
        return [
            (str(folder.manifest.get("prompt", "")), tuple(folder.manifest["tokens"]))
            for folder in self._folders
            if folder.manifest is not None
        ]

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The content of the oracle's config.json, as the manifest of its dump records it."""
        found = self.recorded("config")
        return found if isinstance(found, dict) else None

    def recorded(self, field: str) -> Any:
        """Return what the manifest says besides tokens and files; None without it."""
        return (self._folders[0].manifest or {}).get(field)

    @property
    def has_manifest(self) -> bool:
        """Whether the folder is of our making, so that it says what it holds."""
        return self._folders[0].manifest is not None

    def layers(
        self, tokens: Sequence[int]
    ) -> Iterator[tuple[int | None, Mapping[str, NDArray[np.float32]]]]:
        """Yield the stages of every layer that is there, flat, then of the whole model.

        Raises:
            SettingsError: the manifest is of other tokens.
            SourceError: a file is damaged.
        """
        folder = self._folder_of(tokens)
        for layer in [*folder.layers, None]:
            yield layer, {name: folder.read(layer, name) for name in folder.stages(layer)}

    def _folder_of(self, tokens: Sequence[int]) -> DumpFolder:
        if not self.has_manifest:
            return self._folders[0]
        for folder, (_, dumped) in zip(self._folders, self.prompts, strict=True):
            if dumped == tuple(tokens):
                return folder
        known = " or ".join(str(list(dumped)) for _, dumped in self.prompts)
        raise SettingsError(
            f"{self._source} holds no run on the tokens {list(tokens)}: expected {known:.200}, as "
            "its manifest says; leave the prompt out, and those are taken"
        )


def _prompt_folders(path: Path) -> list[Path]:
    try:
        found = [p for p in path.glob("prompt-*") if p.name.removeprefix("prompt-").isdecimal()]
    except (OSError, ValueError):
        return []  # DumpFolder says what is wrong
    return sorted(found, key=lambda p: int(p.name.removeprefix("prompt-")))


Fields = Mapping[str, Mapping[str, Any]]
"""What the manifest records of each side."""


def kept_in(folder: Path, prompts: Sequence[Prompt], fields: Fields, keep: Keep) -> Keep:
    """Return ``keep``, with what passes by written to ``<folder>/model`` and ``<folder>/oracle``.

    A dump is complete once its last layer has passed; nothing is left of one that was not.

    Args:
        folder: made if need be.
        prompts: of the run; several get a folder each within that of the side.
        fields: what the manifest records, by side.
        keep: the one to go on with.

    Raises:
        SourceError: a folder holds something that is no dump of ours.
    """
    writers: dict[tuple[str, int], DumpWriter] = {}
    for side, recorded in fields.items():
        for index, prompt in enumerate(prompts):
            place = folder / side / f"prompt-{index}" if len(prompts) > 1 else folder / side
            entry = {**recorded, "prompt": prompt.text}
            writers[side, index] = DumpWriter(place, prompt.tokens, entry)

    def keep_both(side: str, prompt: int, layers: Iterator[LayerStages]) -> Iterator[LayerStages]:
        return _written(writers[side, prompt], keep(side, prompt, layers))

    return keep_both


def as_array(value: Tensor) -> NDArray[np.float32] | Strips:
    """Return what a writer takes: an array, or the stage of a long prompt as it is."""
    from pytest_aprt.strips import Strips

    if isinstance(value, Strips):
        return value
    array: NDArray[np.float32] = value.numpy()
    return array


def _written(writer: DumpWriter, layers: Iterable[LayerStages]) -> Iterator[LayerStages]:
    captures = iter(layers)
    with writer:
        for captured in captures:
            for stage, value in captured.stages.items():
                writer.write(captured.layer, stage, as_array(value))
            if captured.layer is None:  # nobody asks for more after the last one
                break
            yield captured
    yield captured
    yield from captures
