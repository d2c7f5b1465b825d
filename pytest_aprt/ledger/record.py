"""One line of a ledger: one falsifier in one run; appended, never changed.

A ledger is JSON lines. Writers hold a lock on the file and write whole lines at once, so that two
runs at a time lose nothing; a line that a killed run left unfinished is closed by the next writer,
told by every reader, and counts for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_aprt.contracts.evaluate import Evaluated
from pytest_aprt.errors import ContractError
from pytest_aprt.sources._files import file_size, one_line, reason

if TYPE_CHECKING:
    from pytest_aprt.report import Report

SCHEMA = "aprt-ledger-v1"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One falsifier in one run.

    ``model`` is what it was held against: source, sha256, parameters and so on, None where the
    check needs none. ``host`` is a fingerprint of the machine's kind: it cannot be read back, and
    two machines of one kind have the same. ``git`` is the revision, with ``+`` where files differ.
    """

    schema: str = SCHEMA
    run: str
    time_utc: str
    contract: str
    version: str
    id: str
    claim: str  # hash of rule and prediction
    check: str  # hash of what evaluated it
    declared: str | None
    outcome: str
    detail: str
    by: str
    byte_equal: bool
    values: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    oracle: Mapping[str, Any] | None = None
    arithmetic: str | None = None
    verdict: str | None = None
    host: str = ""
    git: str | None = None
    writer: str = ""


@dataclass(frozen=True)
class Problem:
    """A line that counts for nothing, and why."""

    line: int
    text: str


def records_of(
    outcomes: Sequence[Evaluated], claims: Mapping[tuple[str, str], str], report: Report | None,
    run: str, git: str | None,
) -> list[Record]:  # fmt: skip
    """Return the records of one run.

    Args:
        outcomes: of the run.
        claims: hash of rule and prediction by contract and id.
        report: of the model under test, None without one.
        run: the run's id.
        git: the repository's revision.
    """
    from pytest_aprt import __version__

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    host = host_fingerprint()
    found = []
    for outcome in outcomes:
        looked = report is not None and outcome.needs != "nothing"
        found.append(
            Record(
                run=run,
                time_utc=now,
                contract=outcome.contract,
                version=outcome.version,
                id=outcome.id,
                claim=claims.get((outcome.contract, outcome.id), ""),
                check=outcome.check_hash,
                declared=outcome.declared,
                outcome=outcome.outcome,
                detail=outcome.detail,
                by=outcome.by,
                byte_equal=outcome.byte_equal,
                values=outcome.values,
                model=_model(report) if report and looked else None,
                oracle=dict(report["oracle"]) if report and looked else None,
                arithmetic=report["model"]["arithmetic"] if report and looked else None,
                verdict=report["verdict"]["status"] if report and looked else None,
                host=host,
                git=git,
                writer=f"pytest-aprt {__version__}",
            )
        )
    return found


def _model(report: Report) -> dict[str, Any]:
    keys = ("source", "kind", "engine", "architecture", "quantisation", "sha256")
    model: Mapping[str, Any] = report["model"]
    parameters = 0
    for tensor in report["ladder"]["weights"]:
        count = 1
        for size in tensor["shape"]:
            count *= size
        parameters += count
    return {**{key: model[key] for key in keys}, "parameters": parameters}


def append(path: Path, records: Sequence[Record]) -> None:
    """Append records as whole lines; the file is made where absent.

    Raises:
        ContractError: the file cannot be written.
    """
    lines = "".join(json.dumps(asdict(r), allow_nan=False) + "\n" for r in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file, _locked(file):
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # what a killed writer left: close its line
                    lines = "\n" + lines
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ContractError(f"{one_line(path)}: cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        file.flush()
        fcntl.flock(file, fcntl.LOCK_UN)


def read(path: Path) -> tuple[list[Record], list[Problem]]:
    """Return the records of a ledger in order, and the lines that count for nothing.

    Raises:
        ContractError: there is no such file, or it cannot be read.
    """
    file_size(path, "a ledger")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ContractError(f"{one_line(path)}: cannot be read: {reason(error)}") from error
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _record(line)
        if isinstance(found, Record):
            records.append(found)
        else:
            cut = number == len(lines) and found == _BROKEN
            problems.append(Problem(number, "was cut off while it was written" if cut else found))
    return records, problems


_BROKEN = "is no JSON object: a killed run left it, or somebody edited it"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "contract": (str,), "id": (str,), "version": (str,), "outcome": (str,), "check": (str,),
    "claim": (str,), "run": (str,), "time_utc": (str,), "host": (str,), "byte_equal": (bool,),
    "model": (dict, type(None)), "declared": (str, type(None)), "verdict": (str, type(None)),
}  # fmt: skip


def _record(line: bytes) -> Record | str:
    try:
        data = json.loads(line.decode())
    except (ValueError, RecursionError):
        return _BROKEN
    if not isinstance(data, dict):
        return _BROKEN
    if data.get("schema") != SCHEMA:
        found = one_line(data.get("schema"))
        return f"has schema {found!r:.60}, which this version does not know; it is kept"
    known = {item.name for item in fields(Record)}
    for name, types in _TYPES.items():
        if not isinstance(data.get(name), types):
            return f"has no valid {name}"
    try:
        return Record(**{key: value for key, value in data.items() if key in known})
    except TypeError as error:
        return f"lacks fields: {error}"


def host_fingerprint() -> str:
    """Return a hash of the machine's kind: system, processor, cores and memory.

    Names and addresses are left out: they are nobody's business, and a container has new ones in
    every run, which would make one machine look like many.
    """
    memory = 0
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    kind = (platform.system(), platform.machine(), _processor(), os.cpu_count(), memory)
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:12]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def git_revision(folder: Path) -> str | None:
    """Return the revision of the repository around a folder, ``+`` behind it if files differ."""

    def git(*args: str) -> str | None:
        try:
            ran = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
