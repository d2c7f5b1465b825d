"""Checks on the comparison of files: ``aprt diff`` on pairs of files that are known to differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pytest_aprt.commands.diff import diff_files, diff_folders, is_missed
from pytest_aprt.contracts.subject import Finding, Subject
from pytest_aprt.errors import AprtError
from pytest_aprt.sources.aprt import write_tensor

COUNT, LAYER, CHANGED = 120, 3, 0.05


def diff_semantics(subject: Subject, *, stages: list[str]) -> Finding:
    """Compare equal files, files with one value changed, and files that do not belong together."""
    value = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)
    problems = []
    for stage in stages:
        folder = subject.folder / stage
        problems += [f"{stage}: {text}" for text in _problems(folder, stage, value)]
    problems += _folder_problems(subject.folder, stages, value)
    detail = "; ".join(problems[:3]) or (
        f"{', '.join(stages)}: equal files differ by 0, a change of {CHANGED:.0%} is found at its "
        "index, other layers and counts are refused"
    )
    return Finding(held=not problems, detail=detail, values={"stages": len(stages)})


def _problems(folder: Path, stage: str, value: NDArray[np.float32]) -> Iterator[str]:
    def written(name: str, array: NDArray[np.float32], layer: int = LAYER) -> Path:
        path = folder / name / f"layer-{layer}" / f"{stage}.bin"
        write_tensor(path, layer, array)
        return path

    place = int(np.abs(value).argmax())
    changed, broken = value.copy(), value.copy()
    changed[place] *= np.float32(1 + CHANGED)
    broken[place] = np.nan
    a = written("a", value)

    same = diff_files(a, written("same", value), 5)
    if (same["max_abs_diff"], same["rms_diff"], same["identical"]) != (0.0, 0.0, True):
        yield f"equal files differ by {same['max_abs_diff']}"
    if same["cosine_sim"] is None or abs(same["cosine_sim"] - 1) > 1e-12:
        yield f"equal files have cosine {same['cosine_sim']}"

    other = diff_files(a, written("changed", changed), 5)
    expected = abs(float(changed[place]) - float(value[place]))
    if other["max_abs_diff_index"] != place or other["top_diffs"][0]["index"] != place:
        yield f"a change at {place} is found at {other['max_abs_diff_index']}"
    if not np.isclose(other["max_abs_diff"] or 0.0, expected, rtol=1e-12) or other["identical"]:
        yield f"a change of {expected:.4g} is told as {other['max_abs_diff']}"

    nan = diff_files(a, written("nan", broken), 5)
    if nan["non_finite_b"] != 1 or nan["cosine_sim"] is not None or not is_missed(nan, -1.0):
        yield f"a NaN is told as cosine {nan['cosine_sim']}, {nan['non_finite_b']} non-finite"
    if not is_missed(diff_files(a, written("negated", -value), 5), 0.0):
        yield "negated values meet a threshold on cosine of 0"

    for what, path in (
        ("another layer", written("layer", value, LAYER + 1)),
        ("another count", written("count", value[:-1])),
    ):
        try:
            diff_files(a, path, 5)
        except AprtError:
            continue
        yield f"files of {what} are compared"


def _folder_problems(root: Path, stages: list[str], value: NDArray[np.float32]) -> Iterator[str]:
    for name in ("left", "right"):
        for layer in (0, 1):
            for stage in stages:
                odd = name == "right" and layer == 1 and stage == stages[-1]
                path = root / name / f"layer-{layer}" / f"{stage}.bin"
                write_tensor(path, layer, value * np.float32(1 + CHANGED) if odd else value)
    result = diff_folders(root / "left", root / "right", 1)
    found = [(s["layer"], s["stage"]) for s in result["stages"] if not s["identical"]]
    if found != [(1, stages[-1])] or len(result["stages"]) != 2 * len(stages):
        yield f"folders that differ in L01-{stages[-1]} are said to differ in {found}"
