"""What the options accept, which source wins, and what a wrong value is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_aprt.architectures import ARCHITECTURES
from pytest_aprt.arithmetic import PROFILES
from pytest_aprt.errors import SettingsError
from pytest_aprt.options import (
    ARITHMETIC_NAMES,
    DEFAULT_COSINE,
    DEFAULT_PROMPT,
    OPTIONS,
    PROMPT_SET_NAMES,
)
from pytest_aprt.plugin import _option
from pytest_aprt.prompts import PROMPT_SETS
from pytest_aprt.settings import read_settings
from pytest_aprt.stages import STAGES

GRAPH = ARCHITECTURES["qwen2"].graph(4)


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


@pytest.fixture
def read(gguf):
    def read(**given):
        options = {"aprt_model": gguf, "aprt_oracle": "org/oracle", **given}
        return read_settings(options.get, command="pytest")

    return read


def refusal(read, **given):
    with pytest.raises(SettingsError) as error:
        read(**given)
    text = str(error.value)
    assert "\n" not in text
    return text


def names(points):
    return [str(point) for point in points]


# The table of options


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_help_starts_with_a_capital_and_has_no_full_stop(option):
    assert option.help[0].isupper()
    assert not option.help.endswith(".")
    assert "\n" not in option.help
    assert (option.metavar is None) == (option.kind == "flag")


def test_flag_and_key_are_twins():
    assert [option.flag for option in OPTIONS] == [
        "--aprt-model", "--aprt-oracle", "--aprt-weights", "--aprt-engine",
        "--aprt-engine-option", "--aprt-engine-command", "--aprt-oracle-engine",
        "--aprt-oracle-engine-option", "--aprt-oracle-engine-command", "--aprt-device",
        "--aprt-engine-timeout",
        "--aprt-prompt", "--aprt-prompt-set", "--aprt-tokens", "--aprt-stages", "--aprt-layers",
        "--aprt-min-cosine", "--aprt-threshold", "--aprt-arithmetic", "--aprt-decode-steps",
        "--aprt-threads", "--aprt-strict", "--aprt-stop-at-first", "--aprt-contracts",
        "--aprt-run-shell", "--aprt-shell-timeout", "--aprt-ledger", "--aprt-dump",
        "--aprt-report", "--aprt-baseline",
    ]  # fmt: skip
    for option in OPTIONS:
        assert option.key == option.flag.removeprefix("--").replace("-", "_")


def test_the_names_that_help_lists_are_those_of_the_tables():
    assert tuple(PROFILES) == ARITHMETIC_NAMES
    assert tuple(PROMPT_SETS) == PROMPT_SET_NAMES


# Which source wins


class Config:
    """What the plugin asks of pytest's configuration."""

    def __init__(self, rootpath, options=(), ini=()):
        self.rootpath, self._options, self._ini = rootpath, dict(options), dict(ini)

    def getoption(self, key):
        return self._options.get(key)

    def getini(self, key):
        return self._ini.get(key)


@pytest.mark.parametrize(
    ("options", "ini", "expected"),
    [
        ({"aprt_layers": "0"}, {"aprt_layers": "1"}, "0"),
        ({}, {"aprt_layers": "1"}, "1"),
        ({}, {}, None),
        ({}, {"aprt_layers": ""}, None),
    ],
)
def test_command_line_beats_ini_beats_default(tmp_path, options, ini, expected):
    assert _option(Config(tmp_path, options, ini), "aprt_layers") == expected


def test_lists_of_the_command_line_replace_those_of_the_ini(tmp_path):
    config = Config(tmp_path, {"aprt_prompt": ["a"]}, {"aprt_prompt": ["b", "c"]})
    assert _option(config, "aprt_prompt") == ["a"]


def test_a_path_in_an_ini_lies_beside_it(tmp_path):
    (tmp_path / "m.gguf").touch()
    ini = {"aprt_model": "m.gguf", "aprt_oracle": "Qwen/Qwen2-0.5B", "aprt_layers": "m.gguf"}
    config = Config(tmp_path, ini=ini)
    assert _option(config, "aprt_model") == str(tmp_path / "m.gguf")
    assert _option(config, "aprt_oracle") == "Qwen/Qwen2-0.5B"
    assert _option(config, "aprt_layers") == "m.gguf"
    assert _option(Config(tmp_path, {"aprt_model": "m.gguf"}), "aprt_model") == "m.gguf"


def test_defaults(read, gguf):
    s = read()
    assert (s.model, s.weights, s.oracle) == (gguf, gguf, "org/oracle")
    assert (s.model_kind, s.model_side.engine, s.arithmetic) == ("gguf", "auto", "auto")
    assert (s.prompts, s.tokens) == ((DEFAULT_PROMPT,), ())
    assert (s.stages, s.layers) == (frozenset(STAGES), "all")
    assert (s.strict, s.report, s.command) == (False, None, "pytest")
    assert set(s.thresholds) == set(STAGES)
    assert set(s.thresholds.values()) == {(DEFAULT_COSINE, "default")}


# Models


def test_a_folder_is_a_dump(read, tmp_path, gguf):
    s = read(aprt_model=str(tmp_path), aprt_weights=gguf)
    assert (s.model_kind, s.weights) == ("dump", gguf)


def test_a_factory_is_named_with_python(read, gguf):
    s = read(aprt_model="python:mine:make", aprt_weights=gguf)
    assert (s.model_kind, s.model) == ("python", "python:mine:make")


def test_weights_of_its_own_beat_those_of_the_model(read):
    assert read(aprt_weights="other.gguf").weights == "other.gguf"


def test_a_missing_model_is_told(read):
    assert refusal(read, aprt_model="nowhere.gguf") == (
        "--aprt-model=nowhere.gguf: no such file or folder; expected a GGUF file, a Hugging "
        "Face folder or hub id, a folder of APRT dumps, or python:module:factory"
    )


def test_a_model_needs_an_oracle(read):
    text = refusal(read, aprt_oracle=None)
    assert "--aprt-model needs --aprt-oracle" in text
    assert "folder or hub id" in text


def test_an_engine_of_ones_own_needs_weights(read):
    text = refusal(read, aprt_model="python:mine:make")
    assert "--aprt-model=python:mine:make needs --aprt-weights" in text
    assert "GGUF" in text


def test_of_a_dump_without_weights_total_alone_is_judged(read, tmp_path):
    settings = read(aprt_model=str(tmp_path))
    assert (settings.weights, settings.has_shadow, settings.prompts) == (None, False, ())
    assert settings.dumps == (str(tmp_path),)
    assert read(aprt_model=str(tmp_path), aprt_weights="a.gguf").has_shadow


def test_a_run_that_may_stop_early_has_a_shadow_and_no_dump(read, tmp_path):
    dump = tmp_path / "dump"
    dump.mkdir()
    with pytest.raises(SettingsError, match="needs a shadow, which this run has not"):
        read(aprt_model=str(dump), aprt_stop_at_first=True)
    with pytest.raises(SettingsError, match="--aprt-dump needs the whole run"):
        read(aprt_dump=str(dump), aprt_stop_at_first=True)
    assert read(aprt_stop_at_first=True).stop_at_first


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["layer-0/embedding.bin"], "dump"),
        (["lm_head.bin"], "dump"),
        (["manifest.json", "INCOMPLETE"], "dump"),
        (["prompt-0/manifest.json"], "dump"),
        (["config.json", "pytorch_model.bin"], "huggingface"),
        (["config.json", "layer-0/embedding.bin"], "huggingface"),
        (["pytorch_model.bin"], "huggingface"),
        ([], "huggingface"),
    ],
)
def test_an_oracle_that_is_a_dump(read, tmp_path, files, kind):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    settings = read(aprt_oracle=str(tmp_path))
    assert settings.oracle_kind == kind
    assert settings.has_shadow == (kind == "huggingface")


# Programs as engines

COMMAND = {"aprt_engine": "command", "aprt_engine_command": "true {model} {out}"}


@pytest.mark.parametrize(
    ("name", "kind"), [("model.apr", "file"), ("model", "file"), ("a.GGUF", "gguf")]
)
def test_a_command_reads_what_it_likes(read, tmp_path, name, kind):
    (tmp_path / name).touch()
    path = str(tmp_path / name)
    settings = read(aprt_model=path, **COMMAND)
    assert settings.model_kind == kind
    assert settings.weights == (path if kind == "gguf" else None)
    assert read(aprt_model=path, aprt_weights="a.gguf", **COMMAND).weights == "a.gguf"
    assert settings.model_side.command.arguments == ("true", "{model}", "{out}")
    assert settings.model_side.timeout_s == 600


def test_a_folder_may_be_what_a_command_reads(read, tmp_path):
    (tmp_path / "weights.npz").touch()
    assert read(aprt_model=str(tmp_path), **COMMAND).model_kind == "file"
    (tmp_path / "lm_head.bin").touch()
    assert "engine=command is not valid with this" in refusal(
        read, aprt_model=str(tmp_path), **COMMAND
    )


def test_a_command_of_an_ini_does_not_stand_in_the_way_of_another_engine(read):
    assert read(**{**COMMAND, "aprt_engine": "builtin"}).model_side.command is None
    assert refusal(read, aprt_engine_command="true {out}") == (
        "--aprt-engine-command needs --aprt-engine=command, which runs it"
    )
    assert refusal(read, aprt_engine="command").startswith(
        "--aprt-engine=command needs --aprt-engine-command: expected a program that writes APRT "
    )


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_time_limit_is_a_number_of_seconds(read, value):
    assert refusal(read, aprt_engine_timeout=value) == (
        f"--aprt-engine-timeout={value} is not valid: expected seconds, such as 600"
    )
    assert read(aprt_engine_timeout="1.5").model_side.timeout_s == 1.5


# Wrong values


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("aprt_engine", "ollama", "--aprt-engine=ollama is not valid: expected one of auto, bu"),
        ("aprt_arithmetic", "f8", "--aprt-arithmetic=f8 is not valid: expected one of auto, flo"),
        ("aprt_min_cosine", "high", "--aprt-min-cosine=high is not valid: expected a cosine such "),
        ("aprt_min_cosine", "1.01", "--aprt-min-cosine=1.01 is not valid: expected a cosine such "),
        ("aprt_min_cosine", "nan", "--aprt-min-cosine=nan is not valid: expected a cosine such a"),
        ("aprt_min_cosine", "-inf", "--aprt-min-cosine=-inf is not valid: expected a cosine such"),
        ("aprt_min_cosine", "", "--aprt-min-cosine= is not valid: expected a cosine such as 0.9"),
        ("aprt_threshold", ["0.9"], "--aprt-threshold=0.9 is not valid: expected STAGE=COS, such"),
        ("aprt_threshold", ["lm_head=x"], "--aprt-threshold=lm_head=x is not valid: expected a c"),
        ("aprt_threshold", ["lm_head="], "--aprt-threshold=lm_head= is not valid: expected a cosi"),
        ("aprt_threshold", ["head=0.9"], "stage 'head' is unknown: expected 'all' or one of embe"),
        ("aprt_threshold", ["=0.9"], "stage '' is unknown: expected 'all' or one of embedding, a"),
        ("aprt_stages", "attn_norm,", "stage '' is unknown: expected 'all' or one of embedding, "),
        ("aprt_stages", "rope", "stage 'rope' is unknown: expected 'all' or one of embedding, at"),
        ("aprt_tokens", ["1,two"], "--aprt-tokens=1,two is not valid: expected token ids such as"),
        ("aprt_tokens", ["1,,2"], "--aprt-tokens=1,,2 is not valid: expected token ids such as 3"),
        ("aprt_tokens", ["-1"], "--aprt-tokens=-1 is not valid: expected token ids such as 3838,"),
        ("aprt_tokens", [""], "--aprt-tokens= is not valid: expected token ids such as 3838,374"),
    ],
)
def test_a_wrong_value_is_told_what_is_valid(read, key, value, said):
    assert refusal(read, **{key: value}).startswith(said)


# Layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", {0, 1, 2, 3, None}),
        (" ALL ", {0, 1, 2, 3, None}),
        ("0..4", {0, 1, 2, 3, None}),
        ("1..3", {1, 2, None}),
        ("0..1", {0, None}),
        ("2", {2, None}),
        ("3, 0", {0, 3, None}),
        ("1,1", {1, None}),
    ],
)
def test_layers(read, text, layers):
    assert {point.layer for point in read(aprt_layers=text).points(GRAPH)} == layers


@pytest.mark.parametrize(
    "text", ["4", "0,4", "2..2", "3..1", "0..5", "..3", "1..", "0-3", "-1", "0,", "a", "1..2..3"]
)
def test_wrong_layers(read, text):
    with pytest.raises(SettingsError) as error:
        read(aprt_layers=text).points(GRAPH)
    assert str(error.value) == (
        f"--aprt-layers={text} is not valid: expected all, A..B with 0 <= A < B <= 4, or numbers "
        "below 4 such as 0,3"
    )


# Stages and points


def test_points_are_those_of_stages_and_layers_in_computation_order(read):
    s = read(aprt_stages="lm_head,attn_norm,embedding", aprt_layers="2,1")
    assert names(s.points(GRAPH)) == ["L01-attn_norm", "L02-attn_norm", "lm_head"]
    assert len(read().points(GRAPH)) == 71


@pytest.mark.parametrize(
    ("stages", "layers"), [("embedding", "1"), ("moe_router,moe_ffn_out", "all")]
)
def test_an_empty_selection_is_an_error(read, stages, layers):
    s = read(aprt_stages=stages, aprt_layers=layers)
    with pytest.raises(SettingsError, match="select no point of this model"):
        s.points(GRAPH)


# Thresholds, prompts, report


def test_min_cosine_sets_every_stage_and_threshold_overrides_one(read):
    s = read(aprt_min_cosine="0.99", aprt_threshold=["lm_head=0.9", " Layer_Output =-1"])
    assert s.thresholds["lm_head"] == (0.9, "--aprt-threshold=lm_head")
    assert s.thresholds["post_ffn_residual"] == (-1.0, "--aprt-threshold=Layer_Output")
    assert s.thresholds["attn_norm"] == (0.99, "--aprt-min-cosine")


def test_the_last_of_two_thresholds_wins(read):
    s = read(aprt_threshold=["lm_head=0.9", "lm_head=0.8"])
    assert s.thresholds["lm_head"][0] == 0.8


@pytest.mark.parametrize(
    ("text", "ids"),
    [("7", (7,)), ("1,2,3", (1, 2, 3)), ("1 2 3", (1, 2, 3)), (" 1 , 2 ", (1, 2))],
)
def test_tokens(read, text, ids):
    s = read(aprt_tokens=[text])
    assert s.tokens == (ids,)
    assert s.prompts == ()  # the default prompt is only for those who ask for nothing


def test_prompts_and_tokens_may_be_mixed(read):
    s = read(aprt_prompt=["a", "b, c"], aprt_tokens=["1", "2"])
    assert (s.prompts, s.tokens) == (("a", "b, c"), ((1,), (2,)))


def test_report_and_strict(read):
    s = read(aprt_report="out/here", aprt_strict=True)
    assert (s.report, s.strict) == (Path("out/here"), True)


def test_every_option_is_read(gguf):
    asked = []

    def get(key):
        asked.append(key)
        return {"aprt_model": gguf, "aprt_oracle": "org/oracle"}.get(key)

    read_settings(get, command="pytest")
    of_contracts = {"aprt_contracts", "aprt_run_shell", "aprt_shell_timeout", "aprt_ledger"}
    assert set(asked) == {option.key for option in OPTIONS} - of_contracts


def test_settings_need_neither_numpy_nor_torch():
    source = Path(read_settings.__code__.co_filename).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(?:import|from) (?:numpy|torch|pytest\b)", source, re.MULTILINE)


# Prompt sets


def test_prompt_sets(read):
    s = read(aprt_prompt_set=["long", "short", "long"])
    assert (s.prompt_sets, s.prompts, s.tokens) == (("long", "short"), (), ())
    s = read(aprt_prompt_set=["short"], aprt_prompt=["mine"], aprt_tokens=["1,2"])
    assert (s.prompt_sets, s.prompts, s.tokens) == (("short",), ("mine",), ((1, 2),))
    assert "--aprt-prompt-set=tall is not valid: expected one of short, long" in refusal(
        read, aprt_prompt_set=["tall"]
    )


def test_steps_to_decode_are_a_number(read):
    assert read().decode_steps == 3
    assert read(aprt_decode_steps="0").decode_steps == 0
    for text in ("-1", "many", "1.5", ""):
        with pytest.raises(SettingsError, match="expected a number of steps such as 3, or 0"):
            read(aprt_decode_steps=text)
