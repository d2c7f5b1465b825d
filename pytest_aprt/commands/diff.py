"""``aprt diff``: two APRT tensors, or two folders of them, element by element.

The JSON has the field names of ``apr diff --values --json`` (schema apr-stage-diff-v1), and
besides them what those leave open: NaN, infinities, zero norms, bit equality.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_aprt.errors import SettingsError, SourceError
from pytest_aprt.settings import cosine_named
from pytest_aprt.stages import STAGES, point_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_aprt.sources.aprt import DumpFolder

SCHEMA = "apr-stage-diff-v1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of ``apr diff`` have its names."""
    parser.add_argument("a", metavar="A", type=Path, help="an APRT file, or a folder of them")
    parser.add_argument("b", metavar="B", type=Path, help="what to compare it with")
    parser.add_argument("--values", action="store_true",
                        help="compare values, which is all that this command does")  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=_limit, default=10,
                        help="how many elements to list, the worst first; default 10")  # fmt: skip
    parser.add_argument("--json", action="store_true", help=f"print JSON, schema {SCHEMA}")
    parser.add_argument("--threshold", metavar="COS",
                        help="exit with 1 where a cosine is below it or has no value")  # fmt: skip


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: expected a number such as 10")
    return max(int(text), 1)


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; 1 where a threshold is given and missed.

    Raises:
        AprtError: a file or folder cannot be read, or the two cannot be compared.
    """
    threshold = arguments.threshold
    if threshold is not None:
        threshold = cosine_named("--threshold", threshold)
    folders = arguments.a.is_dir(), arguments.b.is_dir()
    if folders[0] != folders[1]:
        raise SettingsError(
            f"{arguments.a} and {arguments.b}: expected two files or two folders, found one of each"
        )
    compare = diff_folders if all(folders) else diff_files
    result = compare(arguments.a, arguments.b, arguments.limit)
    stages = result.get("stages", [result])
    missed = [s for s in stages if threshold is not None and is_missed(s, threshold)]
    if threshold is not None:
        result["threshold"] = threshold
        result["missed"] = len(missed)
    if arguments.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        from pytest_aprt.commands.diff_text import render

        print(render(result, missed))
    return 1 if missed else 0


def diff_files(a: Path, b: Path, limit: int) -> dict[str, Any]:
    """Return the comparison of two APRT files, as plain JSON types.

    Raises:
        SourceError: a file is damaged, or layer or element count differ.
    """
    from pytest_aprt.sources.aprt import WHOLE_MODEL, read_header, read_tensor

    (layer, count), (layer_b, count_b) = read_header(a), read_header(b)
    if layer != layer_b:
        raise _unlike(a, b, "layer", layer, layer_b)
    if count != count_b:
        raise _unlike(a, b, "element count", count, count_b)
    values = read_tensor(a, layer), read_tensor(b, layer)
    return _diff(a, b, None if layer == WHOLE_MODEL else layer, values, limit)


def diff_folders(a: Path, b: Path, limit: int) -> dict[str, Any]:
    """Return the comparison of every stage that both folders hold, as plain JSON types.

    Raises:
        SourceError: a folder or a file is damaged, no stage is in both, an element count differs,
            or the manifests are of different tokens.
    """
    from pytest_aprt.sources.aprt import DumpFolder

    one, two = DumpFolder.open(a), DumpFolder.open(b)
    if one.manifest and two.manifest and one.manifest["tokens"] != two.manifest["tokens"]:
        raise _unlike(a, b, "token ids", one.manifest["tokens"], two.manifest["tokens"])
    left, right = _places(one), _places(two)
    both = [place for place in left if place in right]
    if not both:
        raise SourceError(f"{a} and {b}: expected a stage that both hold, found none in common")
    for place in both:  # sizes first: they are in the headers
        (_, count), (_, count_b) = one.header(*place), two.header(*place)
        if count != count_b:
            raise _unlike(a, b, f"element count of {point_id(*place)}", count, count_b)
    stages = []
    for layer, stage in both:
        values = one.read(layer, stage), two.read(layer, stage)
        paths = one.file(layer, stage), two.file(layer, stage)
        stages.append({"stage": stage} | _diff(*paths, layer, values, limit))
    return {
        "schema": SCHEMA,
        "path_a": str(a),
        "path_b": str(b),
        "stages": stages,
        "only_in_a": [point_id(*place) for place in left if place not in right],
        "only_in_b": [point_id(*place) for place in right if place not in left],
    }


def is_missed(diff: dict[str, Any], threshold: float) -> bool:
    """Return whether a stage misses a threshold: bit-equal ones never do, indices must be equal."""
    if diff["identical"]:
        return False
    if diff["index_payload"]:
        return True
    cosine = diff["cosine_sim"]
    return cosine is None or cosine < threshold


def _places(folder: DumpFolder) -> list[tuple[int | None, str]]:
    return [(layer, stage) for layer in [*folder.layers, None] for stage in folder.stages(layer)]


def _unlike(a: Path, b: Path, what: str, found_a: object, found_b: object) -> SourceError:
    return SourceError(
        f"{a} and {b}: expected the same {what}, found {found_a!s:.60} and {found_b!s:.60}: "
        f"compare dumps of one model and one prompt"
    )


def _diff(
    a: Path,
    b: Path,
    layer: int | None,
    values: tuple[NDArray[np.float32], NDArray[np.float32]],
    limit: int,
) -> dict[str, Any]:
    import numpy as np

    x, y = (v.astype(np.float64) for v in values)
    finite = np.isfinite(x) & np.isfinite(y)
    all_finite = bool(finite.all())
    same = values[0].view(np.uint32) == values[1].view(np.uint32)
    with np.errstate(invalid="ignore"):
        d = np.where(same, 0.0, np.abs(x - y))  # inf where one is infinite, nan where one is NaN
    among_finite = np.where(finite, d, -1.0)
    worst = int(among_finite.argmax()) if finite.any() else None
    norms = [float(np.sqrt(np.square(v).sum())) for v in (x, y)] if all_finite else []
    zero_norm = bool(norms) and 0.0 in norms
    defined = bool(norms) and not zero_norm
    return {
        "schema": SCHEMA,
        "path_a": str(a),
        "path_b": str(b),
        "layer": "whole-model" if layer is None else layer,
        "dim_product": x.size,
        "max_abs_diff": None if worst is None else float(d[worst]),
        "max_abs_diff_index": worst,
        "rms_diff": math.sqrt(float(np.square(d).mean())) if all_finite and x.size else None,
        "cosine_sim": _cosine(x, y, norms) if defined else None,
        "top_diffs": _top(values, d, limit),
        "identical": bool(same.all()),
        "zero_norm": [name for name, norm in zip("ab", norms, strict=False) if not norm],
        "non_finite_a": int((~np.isfinite(x)).sum()),
        "non_finite_b": int((~np.isfinite(y)).sum()),
        "index_payload": a.stem.lower() in STAGES and STAGES[a.stem.lower()].index_payload,
    }


def _cosine(x: NDArray[np.float64], y: NDArray[np.float64], norms: list[float]) -> float:
    cosine = float((x * y).sum() / (norms[0] * norms[1]))
    return max(-1.0, min(1.0, cosine))


def _top(
    values: tuple[NDArray[np.float32], NDArray[np.float32]], d: NDArray[np.float64], limit: int
) -> list[dict[str, Any]]:
    """List the elements that differ most: NaN against a number before all, ties by index."""
    import numpy as np

    order = np.argsort(-np.where(np.isnan(d), np.inf, d), kind="stable")[:limit]
    return [
        {
            "index": int(i),
            "a": _number(values[0][i]),
            "b": _number(values[1][i]),
            "abs_diff": _number(d[i]),
        }
        for i in order
    ]


def _number(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
