"""What was asked: the options' values, validated.

Command line beats ini beats default. Nothing here opens a file or imports numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pytest_aprt.arithmetic import profile_named
from pytest_aprt.engines import require
from pytest_aprt.engines.command_line import CommandLine
from pytest_aprt.errors import SettingsError
from pytest_aprt.options import (
    DEFAULT_COSINE,
    DEFAULT_DEVICE,
    DEFAULT_ENGINE_TIMEOUT_S,
    DEFAULT_PROMPT,
    DEFAULT_STEPS,
    ENGINES,
    PROMPT_SET_NAMES,
    PYTHON_PREFIX,
)
from pytest_aprt.stages import STAGES, Point, StageGraph, stage_named, stages_named

Kind = Literal["gguf", "huggingface", "dump", "python", "file"]

ENGINE_DEVICE = "device"
"""Engine option of the oracle's that is for its engine what --aprt-device is for the model's."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What runs one side, and on what.

    ``weights`` are the GGUF or the Hugging Face model behind it, which is the source itself where
    that is one; None where they are not known, of a dump or of what only a program reads.
    """

    flag: str
    source: str
    kind: Kind
    weights: str | None
    engine: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)
    command: CommandLine | None = None
    timeout_s: float = DEFAULT_ENGINE_TIMEOUT_S
    device: str = DEFAULT_DEVICE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The validated settings of one run.

    ``thresholds`` gives each stage its cosine and where that was set. A dump may know its own
    prompts, so none may be asked for.
    """

    model_side: Side
    oracle_side: Side
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
    def model(self) -> str:
        """The model under test, as it was named."""
        return self.model_side.source

    @property
    def oracle(self) -> str:
        """The oracle, as it was named."""
        return self.oracle_side.source

    @property
    def model_kind(self) -> Kind:
        """What the model is."""
        return self.model_side.kind

    @property
    def oracle_kind(self) -> Kind:
        """What the oracle is."""
        return self.oracle_side.kind

    @property
    def weights(self) -> str | None:
        """The weights behind the model, if they are known."""
        return self.model_side.weights

    @property
    def oracle_is_engine(self) -> bool:
        """Whether another engine is the oracle, and not transformers' code in float32."""
        plain = self.oracle_kind == "huggingface" and self.oracle_side.engine == "auto"
        return self.oracle_kind != "dump" and not plain

    @property
    def has_shadow(self) -> bool:
        """Whether all four errors can be measured: the oracle's code runs the model's weights."""
        known = self.weights is not None
        return known and self.oracle_kind != "dump" and not self.oracle_is_engine

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
    model, oracle = get("aprt_model"), get("aprt_oracle")
    if not oracle:
        raise SettingsError(
            "--aprt-model needs --aprt-oracle: expected the Hugging Face folder or hub id that the "
            "model was made from"
        )
    timeout_s = _seconds("--aprt-engine-timeout", get("aprt_engine_timeout"))
    device = (get("aprt_device") or DEFAULT_DEVICE).strip().lower()
    tested = replace(_side(get, "", model, timeout_s), device=device)
    if tested.kind == "python" and not tested.weights:
        raise SettingsError(
            f"--aprt-model={model} needs --aprt-weights: expected the GGUF or the Hugging Face "
            "model whose weights it runs on"
        )
    other = _side(get, "oracle-", oracle, timeout_s)
    kinds = (tested.kind, other.kind)
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
    settings = Settings(
        model_side=tested,
        oracle_side=other,
        prompts=asked if asked or tokens or sets or "dump" in kinds else (DEFAULT_PROMPT,),
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
    if settings.stop_at_first and (settings.weights is None or not settings.has_shadow):
        raise SettingsError(
            "--aprt-stop-at-first needs a shadow, which this run has not: without the model's "
            "weights, or beside an oracle that is a dump or an engine, leave it out"
        )
    return settings


_RUNS = {
    # engine: what it runs, in words
    "auto": (("gguf", "huggingface", "dump", "python"), ""),
    "builtin": (("gguf", "huggingface"), "GGUF files and Hugging Face models"),
    "llama.cpp": (("gguf",), "GGUF files"),
    "transformers": (("gguf", "huggingface"), "GGUF files and Hugging Face models"),
    "command": (("gguf", "huggingface", "file"), "what a command reads"),
}


def _side(get: Get, of: str, source: str, timeout_s: float) -> Side:
    """Return what the options say of one side; ``of`` is ``oracle-`` for the oracle's."""
    flag, prefix = ("--aprt-oracle" if of else "--aprt-model"), f"--aprt-{of}engine"

    def option(name: str) -> Any:
        return get(f"aprt_{of}{name}".replace("-", "_"))

    engine = _one_of(prefix, option("engine") or "auto", ENGINES)
    kind = _kind(flag, source, engine)
    kinds, runs = _RUNS[engine]
    if kind not in kinds:
        raise SettingsError(f"{prefix}={engine} is not valid with this {flag}: it runs {runs}")
    require(engine)
    options = _engine_options(f"{prefix}-option", option("engine-option") or ())
    own = source if kind in ("gguf", "huggingface") else None
    return Side(
        flag=flag,
        source=source,
        kind=kind,
        weights=own if of else get("aprt_weights") or own,
        engine=engine,
        options={k: v for k, v in options.items() if not (of and k == ENGINE_DEVICE)},
        command=_engine_command(f"{prefix}-command", option("engine-command"), engine, options),
        timeout_s=timeout_s,
        device=options.get(ENGINE_DEVICE, DEFAULT_DEVICE) if of else DEFAULT_DEVICE,
    )


def _engine_command(
    flag: str, text: str | None, engine: str, options: Mapping[str, str]
) -> CommandLine | None:
    """Return the command of the engine ``command``; another engine leaves an ini's alone."""
    which = flag.removesuffix("-command")
    if engine == "command":
        if not text:
            raise SettingsError(
                f"{which}=command needs {flag}: expected a program that writes APRT dumps, "
                "such as 'my-engine {model} --tokens {tokens} --dump {out}'"
            )
        return CommandLine.parse(text, options, flag)
    if text and engine == "auto":
        raise SettingsError(f"{flag} needs {which}=command, which runs it")
    return None


def _seconds(flag: str, text: str | None) -> float:
    try:
        found = DEFAULT_ENGINE_TIMEOUT_S if text is None else float(text)
    except ValueError:
        found = 0
    if not 0 < found < math.inf:
        raise SettingsError(f"{flag}={text} is not valid: expected seconds, such as 600")
    return found


def _engine_options(flag: str, texts: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise SettingsError(
                f"{flag}={text} is not valid: expected KEY=VALUE, such as n_threads=2"
            )
        options[name.strip()] = value.strip()
    return options


def _kind(flag: str, source: str, engine: str) -> Kind:
    if source.startswith(PYTHON_PREFIX):
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", source.removeprefix(PYTHON_PREFIX)):
            raise SettingsError(f"{flag}={source} is not valid: expected python:module:factory")
        return "python"
    path, of_model = Path(source), flag == "--aprt-model"
    if is_dump(source):
        return "dump"
    if path.is_file():
        return "file" if engine == "command" and path.suffix.lower() != ".gguf" else "gguf"
    if (path / "config.json").is_file():
        return "huggingface"
    if path.is_dir() and (of_model or engine == "command"):
        return "file" if engine == "command" else "dump"
    if of_model and not _HUB_ID.fullmatch(source):
        raise SettingsError(
            f"--aprt-model={source}: no such file or folder; expected a GGUF file, a Hugging Face "
            "folder or hub id, a folder of APRT dumps, or python:module:factory"
        )
    return "huggingface"


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.gguf)(@[^@\s]+)?", re.ASCII)


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
