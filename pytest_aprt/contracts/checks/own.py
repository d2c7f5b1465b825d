"""Checks on this package's own tables and on contracts."""

from __future__ import annotations

from pytest_aprt.contracts.subject import BlockedError, Finding, Subject
from pytest_aprt.stages import STAGES, stages_named


def stage_order(subject: Subject, *, stages: list[str]) -> Finding:
    """Look the stages up in other spellings, and compare their order with that of the table."""
    problems = []
    for name in stages:
        for spelling in (name, name.upper(), f"  {name.title()} "):
            found = [stage.name for stage in stages_named(spelling)]
            if found != [name]:
                problems.append(f"{spelling!r} is read as {found}")
    order = [name for name in STAGES if name in stages]
    if order != stages:
        problems.append(f"computed in the order {', '.join(order)}")
    detail = "; ".join(problems) or f"{len(stages)} stages known, in this order: {', '.join(order)}"
    return Finding(held=not problems, detail=detail, values={"stages": len(STAGES)})


def contract_validates(subject: Subject, *, paths: list[str] | None) -> Finding:
    """Validate the contract itself or those named."""
    from pytest_aprt.contracts.validate import validate

    files = [subject.root / path for path in paths or ()] or [subject.contract.path]
    for path in files:
        if not path.exists():
            raise BlockedError(f"{path} is not there")
    result = validate(files)
    errors = [str(v) for v in result.violations if v.severity == "error"]
    detail = "; ".join(errors[:3] + result.declined) or (
        f"{len(result.contracts)} contract(s) without error, {result.warnings} warning(s)"
    )
    return Finding(
        held=not errors and not result.declined,
        detail=detail,
        values={"errors": result.errors, "warnings": result.warnings},
    )


def command_line(subject: Subject, *, command: str, options: list[str]) -> Finding:
    """Look the options up in the help of a command of ``aprt``."""
    import subprocess
    import sys

    ran = subprocess.run(
        [sys.executable, "-m", "pytest_aprt", command, "--help"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    words = ran.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split()
    missing = [option for option in options if option not in words]
    detail = f"aprt {command} has {', '.join(options)}"
    if ran.returncode:
        detail = f"aprt {command} --help ended with {ran.returncode}: {ran.stderr.strip()[-200:]}"
    elif missing:
        detail = f"aprt {command} has no {', '.join(missing)}"
    return Finding(held=not missing and not ran.returncode, detail=detail)
