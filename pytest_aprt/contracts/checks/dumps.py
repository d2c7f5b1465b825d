"""Checks on captures as files: what is written, byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.contracts.checks.settings import Layers
from pytest_aprt.contracts.subject import BlockedError, Finding, Subject
from pytest_aprt.errors import AprtError
from pytest_aprt.sources import aprt
from pytest_aprt.sources.aprt import WHOLE_MODEL, DumpFolder
from pytest_aprt.sources.aprt_writer import DumpWriter
from pytest_aprt.stages import STAGES, Point

SIZES = ((), (0,), (1,), (7, 3), (2, 3, 5))
ODD_BITS = (
    # quiet and signalling NaN with payloads, infinities, zeros, the smallest and largest numbers
    0x7FC00000, 0xFFC00000, 0x7FC12345, 0x7F800001, 0xFFBFFFFF, 0x7F800000, 0xFF800000,
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF,
)  # fmt: skip


def stage_path(folder: Path, layer: int | None, stage: str) -> Path:
    """Return where a stage's file lies by the format's own words (not by what wrote it)."""
    return folder / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"


def dump(
    subject: Subject, folder: Path, stages: list[str] | None = None, layers: Layers | None = None
) -> None:
    """Capture the model on the first prompt into a folder, as ``--aprt-dump`` writes it."""
    opened = subject.model.opened
    count = opened.pair.graph.n_layers
    chosen = range(count) if layers is None else layers(count)
    with DumpWriter(folder, opened.prompts[0].tokens, {}) as writer:
        for layer, captured in subject.run_model():
            if layer is None or layer in chosen:
                for stage in [name for name in captured if stages is None or name in stages]:
                    writer.write(layer, stage, captured[stage])


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder by its path there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}  # fmt: skip


def determinism(subject: Subject, *, stages: list[str] | None, layers: Layers | None) -> Finding:
    """Capture twice, compare all bytes."""
    first, second = subject.folder / "first", subject.folder / "second"
    dump(subject, first, stages, layers)
    dump(subject, second, stages, layers)
    a, b = files_in(first), files_in(second)
    if a.keys() | b.keys() == {aprt.MANIFEST}:
        raise BlockedError("the model shows none of the stages")
    differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    detail = f"{len(differ)} of {len(a)} files differ between two captures"
    if differ:
        detail += f", the first is {differ[0]}"
    return Finding(held=not differ, detail=detail, values={"files": len(a), "differ": len(differ)})


def header_format(subject: Subject) -> Finding:
    """Write tensors, read their bytes by hand; then spoil them, which the reader must refuse."""
    problems = []
    count = 0
    for layer in (0, 1, 27, WHOLE_MODEL):
        for shape in SIZES:
            count += 1
            value = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
            path = subject.folder / f"{count}.bin"
            aprt.write_tensor(path, layer, value)
            expected = b"APRT" + struct.pack("<II", layer, value.size)
            expected += struct.pack(f"<{value.size}f", *value.ravel().tolist())
            if path.read_bytes() != expected:
                problems.append(f"layer {layer}, shape {shape}: {path.read_bytes()[:12]!r}")
    lies = 0
    whole = b"APRT" + struct.pack("<II2f", 3, 2, 1.0, 2.0)
    for name, data in _lies(whole).items():
        path = subject.folder / "lie.bin"
        path.write_bytes(data)
        try:
            aprt.read_tensor(path, 3)
        except AprtError:
            lies += 1
        else:
            problems.append(f"{name} was read without complaint")
    detail = "; ".join(problems[:3]) or f"{count} files as the format says, {lies} lies refused"
    return Finding(held=not problems, detail=detail, values={"files": count, "refused": lies})


def _lies(whole: bytes) -> dict[str, bytes]:
    return {
        "a file with another magic": b"APRX" + whole[4:],
        "a file with another layer": whole[:4] + struct.pack("<I", 4) + whole[8:],
        "a file that counts too many": whole[:8] + struct.pack("<I", 3) + whole[12:],
        "a file that counts too few": whole[:8] + struct.pack("<I", 1) + whole[12:],
        "a short body": whole[:-1],
        "a long body": whole + b"\0",
        "a short header": whole[:11],
        "an empty file": b"",
    }


def stage_files(subject: Subject, *, stages: list[str], layers: Layers | None) -> Finding:
    """Capture a selection: exactly its files lie in the folder, each with its header."""
    folder = subject.folder / "dump"
    expected = expected_files(subject, folder, stages, layers)
    dump(subject, folder, stages, layers)
    problems = file_problems(subject, folder, expected)
    detail = "; ".join(problems[:3]) or f"exactly the {len(expected)} files that were asked for"
    return Finding(held=not problems, detail=detail, values={"files": len(expected)})


def expected_files(
    subject: Subject, folder: Path, stages: list[str], layers: Layers | None
) -> dict[Path, Point]:
    """Return the files that a capture of a selection must write.

    Raises:
        BlockedError: the architecture lacks one of the stages there.
    """
    graph = subject.model.opened.pair.graph
    chosen = range(graph.n_layers) if layers is None else layers(graph.n_layers)
    expected = {
        stage_path(folder, point.layer, point.stage): point
        for point in graph.points
        if point.stage in stages and (point.layer is None or point.layer in chosen)
    }
    absent = set(stages) - {point.stage for point in expected.values()}
    if absent:
        raise BlockedError(f"this architecture has no {', '.join(sorted(absent))} there")
    return expected


def file_problems(subject: Subject, folder: Path, expected: dict[Path, Point]) -> list[str]:
    """Return what is wrong with the tensors of a folder: missing, unasked for, or their headers."""
    there = set(folder.rglob("*.bin"))
    problems = [f"{_of(p, folder)} is missing" for p in sorted(expected.keys() - there)]
    problems += [f"{_of(p, folder)} was not asked for" for p in sorted(there - expected.keys())]
    for path in sorted(expected.keys() & there):
        problems += _header_problem(path, folder, expected[path], subject)
    return problems


def _of(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _header_problem(path: Path, folder: Path, point: Point, subject: Subject) -> Iterable[str]:
    opened = subject.model.opened
    sizes = opened.pair.oracle_facts.sizes(len(opened.prompts[0].tokens))
    count = int(np.prod([sizes[symbol] for symbol in STAGES[point.stage].shape]))
    number = WHOLE_MODEL if point.layer is None else point.layer
    data = path.read_bytes()
    if data[:12] != b"APRT" + struct.pack("<II", number, count) or len(data) != 12 + 4 * count:
        yield f"{_of(path, folder)}: header {data[:12]!r}, {len(data)} bytes"


def nan_preservation(subject: Subject) -> Finding:
    """Write odd bit patterns and read them back: from the file's bytes, and by the reader."""
    bits = np.array(ODD_BITS, np.uint32)
    folder = subject.folder / "dump"
    with DumpWriter(folder, [0], {}) as writer:
        writer.write(0, "ffn_gate", bits.view(np.float32))
    stored = np.frombuffer(stage_path(folder, 0, "ffn_gate").read_bytes(), "<u4", offset=12)
    read: NDArray[Any] = DumpFolder.open(folder).read(0, "ffn_gate").view(np.uint32)
    changed = [
        f"{wanted:#010x} became {found[0]:#010x} in the file, {found[1]:#010x} when read"
        for wanted, *found in zip(bits.tolist(), stored.tolist(), read.tolist(), strict=True)
        if found != [wanted, wanted]
    ]
    detail = "; ".join(changed[:3]) or f"{len(bits)} odd values kept bit for bit"
    return Finding(held=not changed, detail=detail,
                   values={"values": len(bits), "changed": len(changed)})  # fmt: skip


def capture_is_additive(subject: Subject) -> Finding:
    """Compare the logits of a run that keeps every stage with one that keeps them alone."""
    hooks = next((t for t in subject.report["self_test"] if t["name"] == "hooks"), None)
    everything: dict[str, bytes] = {}
    for layer, stages in subject.run_model():
        for name, value in stages.items():
            everything[str(Point(layer, name))] = value.tobytes()
    alone = [
        stages["lm_head"].tobytes() for _, stages in subject.run_model() if "lm_head" in stages
    ]
    if not alone:
        raise BlockedError("the model shows nothing of lm_head")
    same = alone == [everything["lm_head"]]
    observed = hooks is not None and hooks["passed"]
    detail = (
        f"logits are {'the same' if same else 'other'} bits beside {len(everything)} kept stages; "
        f"{hooks['detail'] if hooks else 'the self-test on hooks did not run'}"
    )
    return Finding(held=same and observed, detail=detail, values={"stages": len(everything)})
