"""What a falsifier refers to in its repository: a pytest node, a file of evidence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pytest_aprt.contracts.contract import Falsifier

_NODE = re.compile(r"(?:pytest\s+)?(?P<path>[\w./-]+\.py)(?P<inside>(?:::[\w.\[\]-]+)*)")
_EVIDENCE = re.compile(r"(?:^|[\s`'\"(])(?P<path>(?:evidence|tests|fixtures)/[\w./*-]*[\w*])")


def pytest_node(text: str) -> str | None:
    """Return the pytest node id that a ``test:`` line consists of, None if it is none."""
    match = _NODE.fullmatch(text.strip())
    return match["path"] + match["inside"] if match else None


def root_of(contract: Path, path: str) -> Path | None:
    """Return the nearest folder above the contract that holds ``path``."""
    return next((p for p in contract.resolve().parents if any(p.glob(path))), None)


def missing_references(falsifier: Falsifier, contract: Path) -> Iterator[tuple[str, str]]:
    """Yield the key and the path of every reference to a file or test that is not there."""
    node = pytest_node(falsifier.test)
    if node is not None and not _exists(node, contract):
        yield "test", node
    check = falsifier.check
    if (
        check
        and check.get("kind") == "pytest"
        and not _exists(str(check.get("node", "")), contract)
    ):
        yield "check", str(check.get("node", ""))
    for text in falsifier.evidence:
        for match in _EVIDENCE.finditer(text):
            if root_of(contract, match["path"]) is None:
                key = next((k for k in falsifier.data if "evidence" in k), "evidence")
                yield key, match["path"]


def _exists(node: str, contract: Path) -> bool:
    path, _, inside = node.partition("::")
    root = root_of(contract, path) if path and not path.startswith("/") else None
    if root is None:
        return False
    text = (root / path).read_text(encoding="utf-8", errors="replace")
    names = [re.sub(r"\[.*", "", name) for name in inside.split("::") if name]
    return all(re.search(rf"\b(def|class)\s+{re.escape(name)}\b", text) for name in names)
