"""Which fields of a contract are lists, mappings or text, as one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pytest_aprt.contracts.contract import Contract
from pytest_aprt.contracts.lines import Map, Seq
from pytest_aprt.sources._files import one_line

_SHAPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "equations": ((Map, Seq), "a mapping of names to equations"),
    "proof_obligations": ((Seq,), "a list of obligations"),
    "kani_harnesses": ((Seq,), "a list of harnesses"),
    "qa_gate": ((Map,), "a mapping"),
    "verification_summary": ((Map,), "a mapping"),
}
_METADATA_SHAPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "version": ((str, int, float), "text"),
    "description": ((str,), "text"),
    "kind": ((str,), "text"),
    "references": ((Seq,), "a list"),
    "depends_on": ((Seq,), "a list"),
    "registry": ((bool,), "true or false"),
}


def equations(contract: Contract) -> Map:
    """Return the equations by name; a list is promoted to a mapping, as upstream does."""
    value = contract.data.get("equations")
    if isinstance(value, Map):
        return value
    promoted = Map(contract.data.line_of("equations"))
    if isinstance(value, Seq):
        for index, (item, line) in enumerate(zip(value, value.lines, strict=True)):
            name = str(item.get("id", f"equation_{index}")) if isinstance(item, Map) else str(item)
            promoted[name] = item
            promoted.lines[name] = line
    return promoted


def misshapen(c: Contract) -> Iterator[tuple[int, str]]:
    """Yield line and message of every field that is no list, mapping or text, as it should be."""
    yield from c.problems
    for holder, prefix, shapes in (
        (c.data, "", _SHAPES), (c.metadata, "metadata.", _METADATA_SHAPES),
    ):  # fmt: skip
        for key, (kinds, expected) in shapes.items():
            if not isinstance(holder.get(key), (*kinds, type(None))):
                yield holder.line_of(key), f"{prefix}{key}: expected {expected}"
    for key in ("proof_obligations", "kani_harnesses"):
        value = c.data.get(key)
        if isinstance(value, Seq):
            for item, line in zip(value, value.lines, strict=True):
                if not isinstance(item, Map):
                    yield line, f"{key}: expected a mapping, found {one_line(item)!r:.60}"
    found = equations(c)
    for name, equation in found.items():
        if not isinstance(equation, Map):
            yield (
                found.line_of(name),
                f"equation {one_line(name)}: expected a mapping with a formula",
            )
