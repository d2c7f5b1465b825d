"""What ``aprt diff`` prints for people, drawn from its JSON alone."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

_PLACES = "{:.6g}".format


def render(result: dict[str, Any], missed: list[dict[str, Any]]) -> str:
    """Return the text of a comparison; ``missed`` are the stages below the threshold."""
    text = _folders(result, missed) if "stages" in result else _files(result)
    if "threshold" not in result:
        return text
    names = ", ".join(_name(stage) for stage in missed)
    if missed:
        return f"{text}\n\nMISSED: cosine {result['threshold']:g}, by {names}"
    return f"{text}\n\nmet: cosine {result['threshold']:g}"


def _files(d: dict[str, Any]) -> str:
    rows = [
        ("a", d["path_a"]),
        ("b", d["path_b"]),
        ("layer", d["layer"]),
        ("elements", d["dim_product"]),
        ("max abs diff", _maximum(d)),
        ("rms diff", _value(d["rms_diff"])),
        ("cosine", _cosine(d)),
    ]
    if remarks := _remarks(d):
        rows.append(("note", remarks))
    top = [[t["index"], _value(t["a"]), _value(t["b"]), _value(t["abs_diff"])]
           for t in d["top_diffs"]]  # fmt: skip
    headers = ["index", "a", "b", "abs diff"]
    return (
        tabulate(rows, tablefmt="plain", disable_numparse=True)
        + "\n\n"
        + tabulate(top, headers, tablefmt="plain", disable_numparse=True)
    )


def _folders(result: dict[str, Any], missed: list[dict[str, Any]]) -> str:
    rows = [
        ["!" if stage in missed else "", _name(stage), stage["dim_product"], _cosine(stage),
         _value(stage["max_abs_diff"]), _value(stage["rms_diff"]), _remarks(stage)]
        for stage in result["stages"]
    ]  # fmt: skip
    headers = ["", "stage", "elements", "cosine", "max abs diff", "rms diff", "note"]
    lines = [f"a  {result['path_a']}", f"b  {result['path_b']}", ""]
    lines.append(tabulate(rows, headers, tablefmt="plain", disable_numparse=True))
    for side in ("a", "b"):
        if only := result[f"only_in_{side}"]:
            lines.append(f"only in {side}: {', '.join(only)}")
    return "\n".join(line.rstrip() for text in lines for line in text.split("\n"))


def _name(stage: dict[str, Any]) -> str:
    from pytest_aprt.stages import point_id

    if "stage" not in stage:
        return str(stage["path_b"])
    return point_id(None if stage["layer"] == "whole-model" else stage["layer"], stage["stage"])


def _maximum(d: dict[str, Any]) -> str:
    if d["max_abs_diff"] is None:
        return "none"
    return f"{_value(d['max_abs_diff'])} at {d['max_abs_diff_index']}"


def _cosine(d: dict[str, Any]) -> str:
    return "none" if d["cosine_sim"] is None else f"{d['cosine_sim']:.9f}"


def _value(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "none"
    return _PLACES(value)


def _remarks(d: dict[str, Any]) -> str:
    """Say why a number has no value, and what equality hides."""
    found = []
    if d["identical"]:
        found.append("bit for bit equal")
    found += [
        f"{d[f'non_finite_{side}']} NaN or Inf in {side}"
        for side in ("a", "b")
        if d[f"non_finite_{side}"]
    ]
    if d["zero_norm"]:
        found.append(f"all zero in {' and '.join(d['zero_norm'])}")
    if d["index_payload"]:
        found.append("indices, compared by equality")
    if not d["dim_product"]:
        found.append("no elements")
    return "; ".join(found)
