"""What was asked: the options' values, validated.

Command line beats ini beats default. Nothing here opens a file or imports numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_aprt.arithmetic import profile_named
from pytest_aprt.engines import require
from pytest_aprt.engines.command_line import FLAG, CommandLine
from pytest_aprt.errors import SettingsError
from pytest_aprt.options import (
    DEFAULT_COSINE,
    DEFAULT_ENGINE_TIMEOUT_S,
    DEFAULT_PROMPT,
    DEFAULT_STEPS,
    ENGINES,
    PROMPT_SET_NAMES,
    PYTHON_PREFIX,
)
from pytest_aprt.stages import STAGES, Point, StageGraph, stage_named, stages_named

ModelKind = Literal["gguf", "dump", "python", "file"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The validated settings of one run.

    ``thresholds`` gives each stage its cosine and where that was set. ``weights`` is the GGUF
    behind the model, which is the model itself where that is a GGUF; None where it is not known, of
    a dump or of what only a program reads (kind ``file``). A dump may know its own prompts, so none
    may be asked for.
    """

    model: str
    model_kind: ModelKind
    oracle: str
    oracle_kind: Literal["huggingface", "dump"]
    weights: str | None
    engine: str
    engine_options: Mapping[str, str]
    engine_command: CommandLine | None
    engine_timeout_s: float
    prompts: tuple[str, ...]
    prompt_sets: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    stages: frozenset[str]
    layers: str
    thresholds: Mapping[str, tuple[float, str]]
    arithmetic: str
    decode_steps: int
    threads: int  # 0: one per core
    strict: bool
    stop_at_first: bool
    dump: Path | None
    report: Path | None
    baseline: Path | None
    command: str

    @property
    def only_total(self) -> bool:
        """Whether `total` is all that can be measured: no shadow and no replay can be made."""
        return self.weights is None or self.oracle_kind == "dump"

    @property
    def dumps(self) -> tuple[str, ...]:
        """The sides that are dump folders, the model's first."""
        return tuple(
            source
            for source, kind in ((self.model, self.model_kind), (self.oracle, self.oracle_kind))
            if kind == "dump"
        )

    def points(self, graph: StageGraph) -> list[Point]:
        """Return the points to judge, in computation order.

        Raises:
            SettingsError: the selection is empty or names a layer that the model lacks.
        """
        layers = layers_named("--aprt-layers", self.layers, graph.n_layers)
        chosen = [
            p
            for p in graph.points
            if p.stage in self.stages and (p.layer is None or p.layer in layers)
        ]
        if not chosen:
            raise SettingsError(
                "--aprt-stages and --aprt-layers select no point of this model: expected some"
            )
        return chosen


Get = Callable[[str], Any]
"""Looks an option up by its key; None where neither command line nor ini sets it."""


def read_settings(get: Get, *, command: str) -> Settings:
    """Return the settings of a run; ``get("aprt_model")`` must give a model.

    Args:
        get: looks an option up.
        command: the command line, for the report.

    Raises:
        SettingsError: a value is not valid; the message says what is.
    """
    model = get("aprt_model")
    oracle = get("aprt_oracle")
    if not oracle:
        raise SettingsError(
            "--aprt-model needs --aprt-oracle: expected the Hugging Face folder or hub id that the "
            "model was made from"
        )
    engine = _one_of("--aprt-engine", get("aprt_engine") or "auto", ENGINES)
    kind = _kind(model, engine)
    oracle_kind: Literal["huggingface", "dump"] = "dump" if is_dump(oracle) else "huggingface"
    weights = get("aprt_weights") or (model if kind == "gguf" else None)
    if not weights and kind == "python":
        raise SettingsError(
            f"--aprt-model={model} needs --aprt-weights: expected the GGUF whose weights it runs on"
        )
    engine_options = _engine_options(get("aprt_engine_option") or ())
    asked, tokens = tuple(get("aprt_prompt") or ()), tuple(get("aprt_tokens") or ())
    sets = tuple(dict.fromkeys(get("aprt_prompt_set") or ()))
    default = get("aprt_min_cosine")
    cosine = DEFAULT_COSINE if default is None else cosine_named("--aprt-min-cosine", default)
    source = "default" if default is None else "--aprt-min-cosine"
    dump, report, baseline = get("aprt_dump"), get("aprt_report"), get("aprt_baseline")
    if dump and get("aprt_stop_at_first"):
        raise SettingsError(
            "--aprt-dump needs the whole run, which --aprt-stop-at-first may end: leave out one"
        )
    return Settings(
        model=model,
        model_kind=kind,
        oracle=oracle,
        oracle_kind=oracle_kind,
        weights=weights,
        engine=_engine(engine, kind),
        engine_options=engine_options,
        engine_command=_engine_command(get("aprt_engine_command"), engine, engine_options),
        engine_timeout_s=_seconds("--aprt-engine-timeout", get("aprt_engine_timeout")),
        prompts=asked
        if asked or tokens or sets or "dump" in (kind, oracle_kind)
        else (DEFAULT_PROMPT,),
        prompt_sets=tuple(_one_of("--aprt-prompt-set", name, PROMPT_SET_NAMES) for name in sets),
        tokens=tuple(token_ids("--aprt-tokens", text) for text in tokens),
        stages=frozenset(stage.name for stage in stages_named(get("aprt_stages") or "all")),
        layers=get("aprt_layers") or "all",
        thresholds=_thresholds(cosine, source, get("aprt_threshold") or ()),
        arithmetic=profile_named(get("aprt_arithmetic") or "auto").name,
        decode_steps=_count("decode-steps", get("aprt_decode_steps"), DEFAULT_STEPS),
        threads=_count("threads", get("aprt_threads"), 0),
        strict=bool(get("aprt_strict")),
        stop_at_first=bool(get("aprt_stop_at_first")),
        dump=Path(dump) if dump else None,
        report=Path(report) if report else None,
        baseline=Path(baseline) if baseline else None,
        command=command,
    )


def _engine(engine: str, kind: ModelKind) -> str:
    if engine != "auto" and kind not in ("gguf", "file"):
        raise SettingsError(
            f"--aprt-engine={engine} is not valid with this --aprt-model: it runs "
            f"{'what a command reads' if engine == 'command' else 'GGUF files'}"
        )
    require(engine)
    return engine


def _engine_command(
    text: str | None, engine: str, options: Mapping[str, str]
) -> CommandLine | None:
    """Return the command of the engine ``command``; another engine leaves an ini's alone."""
    if engine == "command":
        if not text:
            raise SettingsError(
                f"--aprt-engine=command needs {FLAG}: expected a program that writes APRT dumps, "
                "such as 'my-engine {model} --tokens {tokens} --dump {out}'"
            )
        return CommandLine.parse(text, options)
    if text and engine == "auto":
        raise SettingsError(f"{FLAG} needs --aprt-engine=command, which runs it")
    return None


def _seconds(flag: str, text: str | None) -> float:
    try:
        found = DEFAULT_ENGINE_TIMEOUT_S if text is None else float(text)
    except ValueError:
        found = 0
    if not 0 < found < math.inf:
        raise SettingsError(f"{flag}={text} is not valid: expected seconds, such as 600")
    return found


def _engine_options(texts: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise SettingsError(
                f"--aprt-engine-option={text} is not valid: expected KEY=VALUE, such as n_threads=2"
            )
        options[name.strip()] = value.strip()
    return options


def _kind(model: str, engine: str) -> ModelKind:
    if model.startswith(PYTHON_PREFIX):
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", model.removeprefix(PYTHON_PREFIX)):
            raise SettingsError(
                f"--aprt-model={model} is not valid: expected python:module:factory"
            )
        return "python"
    path = Path(model)
    if engine == "command" and path.exists() and not is_dump(model):
        return "gguf" if path.is_file() and path.suffix.lower() == ".gguf" else "file"
    if path.is_dir():
        return "dump"
    if path.is_file():
        return "gguf"
    raise SettingsError(
        f"--aprt-model={model}: no such file or folder; expected a GGUF file, a folder of APRT "
        "dumps, or python:module:factory"
    )


def is_dump(source: str) -> bool:
    """Return whether a folder is one of APRT dumps: no Hugging Face model, and with stages."""
    folder = Path(source)
    try:
        if not folder.is_dir() or (folder / "config.json").exists():
            return False
        names = [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return False
    stages = {f"{name}.bin" for name in STAGES}
    return any(
        re.match(r"(layer|prompt)-\d", name) or name.lower() in stages or name in _OF_A_DUMP
        for name in names
    )


_OF_A_DUMP = ("manifest.json", "INCOMPLETE")


def _one_of(flag: str, value: str, valid: Sequence[str]) -> str:
    if value not in valid:
        raise SettingsError(f"{flag}={value} is not valid: expected one of {', '.join(valid)}")
    return value


def cosine_named(flag: str, text: str) -> float:
    """Return the cosine that ``text`` says.

    Raises:
        SettingsError: it is no number from -1 to 1; ``flag`` is named.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise SettingsError(f"{flag}={text} is not valid: expected a cosine such as 0.999")
    return value


def _thresholds(
    cosine: float, source: str, overrides: Sequence[str]
) -> dict[str, tuple[float, str]]:
    thresholds = dict.fromkeys(STAGES, (cosine, source))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(
                f"--aprt-threshold={text} is not valid: expected STAGE=COS, such as lm_head=0.99"
            )
        flag = f"--aprt-threshold={name.strip()}"
        thresholds[stage_named(name).name] = (cosine_named(flag, value), flag)
    return thresholds


def _count(option: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,4}", text.strip(), re.ASCII):
        what = option.rpartition("-")[2]
        raise SettingsError(
            f"--aprt-{option}={text} is not valid: expected a number of {what} such as 3, or 0"
        )
    return int(text)


def token_ids(flag: str, text: str) -> tuple[int, ...]:
    """Return the token ids that ``text`` lists.

    Raises:
        SettingsError: it is no list of ids; ``flag`` is named.
    """
    if not re.fullmatch(r"\s*\d+(\s*[,\s]\s*\d+)*\s*", text):
        raise SettingsError(f"{flag}={text} is not valid: expected token ids such as 3838,374,220")
    return tuple(int(part) for part in re.findall(r"\d+", text))


def layers_named(flag: str, text: str, count: int) -> range | set[int]:
    """Return the layers that a selection names; ``A..B`` excludes B, as ``apr trace`` does.

    Raises:
        SettingsError: it is no selection among ``count`` layers; ``flag`` is named.
    """
    wrong = SettingsError(
        f"{flag}={text} is not valid: expected all, A..B with 0 <= A < B <= {count}, or "
        f"numbers below {count} such as 0,{count - 1}"
    )
    text = text.strip().lower()
    if text == "all":
        return range(count)
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        start, stop = int(span[1]), int(span[2])
        if not start < stop <= count:
            raise wrong
        return range(start, stop)
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        raise wrong
    chosen = {int(part) for part in text.split(",")}
    if max(chosen) >= count:
        raise wrong
    return chosen
