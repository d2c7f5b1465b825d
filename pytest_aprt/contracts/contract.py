"""A contract as the field writes it: loose, aliased, with fields that nobody else knows.

Everything is kept in ``data``; the attributes are what this package uses. Nothing here judges:
``rules`` does.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_aprt.contracts.lines import Map, Seq, parse_yaml, read_yaml
from pytest_aprt.errors import ContractError
from pytest_aprt.sources._files import one_line

SUFFIXES = (".yaml", ".yml")
OTHER_FILES = {
    # files that lie among contracts and are none
    "binding.yaml": "a binding registry",
    "binding.yml": "a binding registry",
    "external-corpora.yaml": "a list of corpora",
    "ontology.yaml": "an ontology",
}
ALIASES = {
    "rule": ("rule", "description"),
    "prediction": ("prediction", "expected"),
    "test": ("test", "command"),
    "if_fails": ("if_fails", "fails_if"),
}
"""A falsifier's fields, and the names by which they are written."""

_EVIDENCE = re.compile(
    r"(algorithm_|functional_|live_)?evidence(_discharged_by)?(_v[0-9_]+)?|discharged_by"
)
_VERSIONED = re.compile(r"_v([0-9]+(?:_[0-9]+)*)$")


@dataclass(frozen=True, kw_only=True)
class Falsifier:
    """One entry of ``falsification_tests``; texts are empty where absent.

    ``status`` is the declared one as written, ``evidence`` its lines as text, ``check`` the
    mapping that binds it to a built-in check, ``line`` where the entry begins.
    """

    id: str
    rule: str
    prediction: str
    test: str
    if_fails: str
    status: str | None
    evidence: tuple[str, ...]
    binds_to: str | None
    check: Map | None
    line: int
    data: Map


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One contract file."""

    path: Path
    data: Map
    metadata: Map
    falsifiers: tuple[Falsifier, ...]
    problems: tuple[tuple[int, str], ...] = field(repr=False)

    @property
    def version(self) -> str:
        """``metadata.version`` as written, empty where absent."""
        return _text(self.metadata.get("version"))

    @property
    def kind(self) -> str:
        """``metadata.kind``; ``kernel`` where absent, ``registry`` where that flag is set."""
        kind = _text(self.metadata.get("kind")) or "kernel"
        return "registry" if kind == "kernel" and self.metadata.get("registry") is True else kind

    @property
    def status(self) -> str | None:
        """The status of the whole contract as written."""
        for holder in (self.metadata, self.data):
            for key in ("status", "discharge_status"):
                if key in holder:
                    return _text(holder[key])
        return None

    @property
    def models(self) -> tuple[str, ...]:
        """Patterns of the model that the claims are about; empty where none is named."""
        named = self.metadata.get("model")
        return tuple(_text(item) for item in named) if isinstance(named, list) else (
            (_text(named),) if named else ()
        )  # fmt: skip

    def named(self, falsifier_id: str) -> Falsifier:
        """Return the falsifier with this id."""
        return next(f for f in self.falsifiers if f.id == falsifier_id)


def not_a_contract(path: Path, data: Any) -> str | None:
    """Return what the file is if it is no contract, None if it is one."""
    if path.name in OTHER_FILES:
        return OTHER_FILES[path.name]
    if path.name.startswith("."):
        return "a hidden file"
    if data is None:
        return "an empty file"
    if not isinstance(data, Map):
        return "a list or text, where a contract is a mapping"
    if "bindings" in data and "metadata" not in data:
        return "a binding registry"
    if "metadata" not in data and "falsification_tests" not in data:
        return "a mapping with neither metadata nor falsification_tests"
    return None


def load(path: Path) -> Contract | str:
    """Return the contract in a file, or in words what the file is instead.

    Raises:
        ContractError: it cannot be read, or is no valid YAML; the message has file and line.
    """
    data = read_yaml(path)
    return not_a_contract(path, data) or contract_of(path, data)


def parse(text: str, path: Path) -> Contract | str:
    """Return the contract in a text, as ``load`` does; ``path`` names it."""
    data = parse_yaml(text, str(path))
    return not_a_contract(path, data) or contract_of(path, data)


def contract_of(path: Path, data: Map) -> Contract:
    """Return the contract that a mapping holds; what has no usable shape is in ``problems``."""
    problems: list[tuple[int, str]] = []
    metadata = data.get("metadata")
    if not isinstance(metadata, Map):
        problems.append((data.line_of("metadata"), "metadata: expected a mapping"))
        metadata = Map(data.line)
    entries = data.get("falsification_tests")
    if not isinstance(entries, (Seq, type(None))):
        line = data.line_of("falsification_tests")
        problems.append((line, "falsification_tests: expected a list of entries"))
        entries = None
    falsifiers = []
    for entry, line in zip(entries or (), entries.lines if entries else (), strict=True):
        problem = _entry_problem(entry)
        if problem:
            problems.append((line, problem))
        else:
            falsifiers.append(_falsifier(entry, line, data, problems))
    return Contract(
        path=path,
        data=data,
        metadata=metadata,
        falsifiers=tuple(falsifiers),
        problems=tuple(problems),
    )


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, Map):
        return "falsification_tests: expected a mapping with id, rule and prediction"
    falsifier_id = entry.get("id")
    if not isinstance(falsifier_id, (str, int)) or not str(falsifier_id).strip():
        return "falsification_tests: an entry has no id: expected such as FALSIFY-ROPE-001"
    if re.search(r"[\[\]\s]|::", str(falsifier_id)):
        return f"id {one_line(falsifier_id)!r}: expected no space, bracket or '::' in it"
    return None


def _falsifier(entry: Map, line: int, data: Map, problems: list[tuple[int, str]]) -> Falsifier:
    texts = {}
    for name, keys in ALIASES.items():
        key = next((key for key in keys if key in entry), name)
        texts[name] = _text(entry.get(key))
        if isinstance(entry.get(key), (Map, Seq)):
            problems.append((entry.line_of(key), f"{entry['id']}: {key}: expected text"))
    check = entry.get("check")
    if check is not None and not isinstance(check, Map):
        problems.append((entry.line_of("check"), f"{entry['id']}: check: expected a mapping"))
    return Falsifier(
        id=str(entry["id"]).strip(),
        **texts,
        status=_status(entry),
        evidence=_evidence(entry, str(entry["id"]), data),
        binds_to=_text(entry["binds_to"]) if "binds_to" in entry else None,
        check=check if isinstance(check, Map) else None,
        line=line,
        data=entry,
    )


def _status(entry: Map) -> str | None:
    """Return the declared status: of the newest versioned key, else the plain one."""
    versioned = []
    for key in entry:
        match = _VERSIONED.search(key)
        if match and key.startswith(("status_v", "discharge_status_v")):
            versioned.append((tuple(int(n) for n in match[1].split("_")), key))
    keys = [max(versioned)[1]] if versioned else []
    for key in (*keys, "status", "discharge_status"):
        if key in entry:
            return _text(entry[key])
    for key, value in entry.items():
        if _EVIDENCE.fullmatch(key) and isinstance(value, Map) and "status" in value:
            return _text(value["status"])
    return None


def _evidence(entry: Map, falsifier_id: str, data: Map) -> tuple[str, ...]:
    """Return every line of evidence, whatever its form: list, map, or map with a status."""
    found = []
    for key, value in entry.items():
        if _EVIDENCE.fullmatch(key):
            found += [text for text in _texts(value) if text]
    for obligation in _maps(data.get("proof_obligations")):
        by = obligation.get("discharged_by")
        if falsifier_id in (by if isinstance(by, list) else [by]):
            found.append(_text(obligation.get("property") or obligation.get("statement")))
    return tuple(found)


def _texts(value: Any) -> list[str]:
    if isinstance(value, Map):
        return [t for key, v in value.items() if key != "status" for t in _texts(v)]
    if isinstance(value, Seq):
        return [text for item in value for text in _texts(item)]
    return [_text(value)]


def _maps(value: Any) -> list[Map]:
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, Map)]


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def text_hash(*parts: object) -> str:
    """Return a short hash of what is given, in order."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def contracts_in(folder: Path) -> list[Path]:
    """Return the YAML files of a folder and below, hidden ones aside, in order of path.

    Raises:
        ContractError: the folder cannot be listed.
    """
    try:
        found = [p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    except OSError as error:
        raise ContractError(f"{one_line(folder)}: cannot be listed: {error.strerror}") from None
    hidden = [p for p in found if any(s.startswith(".") for s in p.relative_to(folder).parts)]
    return sorted(set(found) - set(hidden))
