"""``aprt validate PATH...``: every rule over files and folders, as text or JSON.

Exit codes are those of the field's validator: 0 valid (warnings allowed), 1 errors, 2 declined:
a path that is not there, or nowhere a contract.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_aprt.contracts.contract import Contract, contracts_in, load, parse
from pytest_aprt.contracts.ladder import height, rung_of
from pytest_aprt.contracts.rules import Violation, violations
from pytest_aprt.errors import ContractError
from pytest_aprt.sources._files import one_line

VALID, INVALID, DECLINED = 0, 1, 2
SCHEMA = "aprt-validate-v1"


@dataclass
class Validation:
    """What was found in all files; ``other`` says of files that are no contracts what they are."""

    contracts: list[Contract] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    other: list[tuple[Path, str]] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many errors there are."""
        return sum(1 for v in self.violations if v.severity == "error")

    @property
    def warnings(self) -> int:
        """How many warnings there are."""
        return len(self.violations) - self.errors

    @property
    def exit_code(self) -> int:
        """0 valid, 1 errors, 2 declined."""
        if self.errors:
            return INVALID
        return DECLINED if self.declined or not self.contracts else VALID


def validate(paths: Sequence[Path], base: str | None = None) -> Validation:
    """Judge files, and all files of folders.

    Args:
        paths: files and folders.
        base: a revision in git: a status that was raised since then needs a new version.
    """
    result = Validation()
    for path in _files(paths, result):
        try:
            loaded = load(path)
        except ContractError as error:
            result.broken.append(path)
            result.violations.append(_of_error(path, error))
            continue
        except Exception as error:  # SourceError: not there, no plain file
            result.declined.append(str(error))
            continue
        if isinstance(loaded, str):
            result.other.append((path, loaded))
        else:
            result.contracts.append(loaded)
            result.violations += violations(loaded)
    result.violations += _reused(result.contracts)
    if base is not None:
        for contract in result.contracts:
            result.violations += _promoted(contract, base)
    if not (result.contracts or result.broken or result.declined):
        result.declined.append("no contract there")
    result.violations.sort(key=lambda v: (str(v.path), v.line))
    return result


def _files(paths: Sequence[Path], result: Validation) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            result.declined.append(f"{one_line(path)}: no such file or folder")
        elif path.is_dir():
            found = contracts_in(path)
            if not found:
                result.declined.append(f"{one_line(path)}: a folder without YAML files")
            yield from found
        else:
            yield path


def _of_error(path: Path, error: ContractError) -> Violation:
    text = str(error).removeprefix(one_line(path))
    line, colon, message = text.removeprefix(":").partition(": ")
    if not (colon and line.isdigit()):
        line, message = "1", text.removeprefix(": ")
    return Violation(path, int(line), "SCHEMA-020", "error", message)


def _reused(contracts: Iterable[Contract]) -> Iterator[Violation]:
    first: dict[str, Contract] = {}
    for contract in contracts:
        for f in contract.falsifiers:
            other = first.setdefault(f.id, contract)
            if other is not contract:
                text = f"falsifier id {f.id!r} is used in {other.path} too"
                yield Violation(contract.path, f.line, "APRT-006", "warning", text)


def _promoted(contract: Contract, base: str) -> Iterator[Violation]:
    """Compare with the file as it was: a raised status or a new falsifier needs a new version."""
    before = _at(contract.path, base)
    if before is None or before.version != contract.version:
        return
    old = {f.id: f for f in before.falsifiers}
    for f in contract.falsifiers:
        was = old.get(f.id)
        if was is None:
            what = f"{f.id} is new"
        elif height(rung_of(f.status)) > height(rung_of(was.status)):
            what = f"{f.id} rose from {was.status or 'no status'} to {f.status}"
        else:
            continue
        text = f"{what} since {base}, and the version is {contract.version} still"
        yield Violation(contract.path, f.line, "APRT-007", "warning", text)


def _at(path: Path, base: str) -> Contract | None:
    """Return the contract as of a revision, None where it did not exist.

    Raises:
        ContractError: git is not there, or does not know the revision.
    """
    path = path.resolve()

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                ["git", "-C", str(path.parent), *args],
                capture_output=True, text=True, encoding="utf-8", timeout=60,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
            raise ContractError(f"{one_line(path)}: git cannot be run: {error}") from None

    known = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    if known.returncode:
        raise ContractError(f"revision {one_line(base)} is unknown to git in {path.parent}")
    shown = git("show", f"{known.stdout.strip()}:./{path.name}")
    if shown.returncode:
        return None
    try:
        loaded = parse(shown.stdout, Path(f"{path.name}@{base}"))
    except ContractError:
        return None
    return None if isinstance(loaded, str) else loaded


def as_text(result: Validation) -> str:
    """Return one line per violation, and the count."""
    lines = [str(v) for v in result.violations]
    lines += [f"{path}: not a contract: {what}" for path, what in result.other]
    lines += result.declined
    lines.append(f"{result.errors} error(s), {result.warnings} warning(s)")
    if result.exit_code == VALID:
        count = len(result.contracts)
        lines.append("Contract is valid." if count == 1 else f"{count} contracts are valid.")
    return "\n".join(lines) + "\n"


def as_json(result: Validation) -> str:
    """Return the same for machines (schema ``aprt-validate-v1``)."""
    files = [
        {
            "path": str(path),
            "kind": contract.kind if contract else None,
            "version": contract.version if contract else None,
            "falsifiers": [f.id for f in contract.falsifiers] if contract else [],
            "violations": [
                {"rule": v.rule, "severity": v.severity, "line": v.line, "message": v.message}
                for v in result.violations
                if v.path == path
            ],
        }
        for path, contract in [
            *((c.path, c) for c in result.contracts),
            *((path, None) for path in result.broken),
        ]
    ]
    report = {
        "schema": SCHEMA,
        "errors": result.errors,
        "warnings": result.warnings,
        "exit_code": result.exit_code,
        "files": sorted(files, key=lambda file: str(file["path"])),
        "not_contracts": [{"path": str(path), "what": what} for path, what in result.other],
        "declined": result.declined,
    }
    return json.dumps(report, indent=1) + "\n"
