"""Checks on this package's own tables and on contracts."""

from __future__ import annotations

import contextlib
import io
import re

from pytest_aprt.contracts.checks.settings import Layers
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
    code, text = _aprt(command, "--help")
    words = re.findall(r"[\w-]+", text)
    missing = [option for option in options if option not in words]
    detail = f"aprt {command} has {', '.join(options)}"
    if code:
        detail = f"aprt {command} --help ended with {code}: {' '.join(text.split())[-200:]}"
    elif missing:
        detail = f"aprt {command} has no {', '.join(missing)}"
    return Finding(held=not missing and not code, detail=detail, values={"exit": code})


def trace_command(subject: Subject, *, stages: list[str], layers: Layers | None) -> Finding:
    """Run ``aprt trace`` on the model's file; compare its files with the run's own capture."""
    from pytest_aprt.contracts.checks.dumps import expected_files, file_problems
    from pytest_aprt.sources.aprt import DumpFolder

    model, run = subject.report["model"], subject.report["run"]
    if model["kind"] != "gguf" or model["engine"] != "builtin":
        raise BlockedError(f"aprt trace runs GGUF files; the model is {model['engine']}")
    folder = subject.folder / "dump"
    expected = expected_files(subject, folder, stages, layers)
    arguments = ["trace", model["source"], "--save-tensor", ",".join(stages)]
    arguments += ["--save-tensor-dir", str(folder)]
    arguments += ["--tokens", ",".join(map(str, run["prompts"][0]["tokens"]))]
    if layers is not None:
        chosen = sorted({point.layer for point in expected.values() if point.layer is not None})
        arguments += ["--save-tensor-layers", f"{chosen[0]}..{chosen[-1] + 1}"]
    code, text = _aprt(*arguments)
    if code:
        return Finding(held=False, detail=f"aprt trace ended with {code}: {text.strip()[-200:]}")
    problems = file_problems(subject, folder, expected)
    captured, written = subject.captures("model"), DumpFolder.open(folder)
    for point in expected.values() if not problems else ():
        value = captured[str(point)].ravel()
        if value.tobytes() != written.read(point.layer, point.stage).tobytes():
            problems.append(f"{point} differs from the run's own capture")
    detail = "; ".join(problems[:3]) or f"{len(expected)} files, each as the run captured it"
    return Finding(held=not problems, detail=detail, values={"files": len(expected)})


def _aprt(*arguments: str) -> tuple[int, str]:
    from pytest_aprt.commands.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(arguments)
        except SystemExit as ended:  # argparse, after --help or a wrong option
            code = ended.code if isinstance(ended.code, int) else 2
    return code, out.getvalue()
