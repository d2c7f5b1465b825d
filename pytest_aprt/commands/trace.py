"""``aprt trace``: runs a model and saves its stages, with the options of ``apr trace``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_aprt.commands.progress import Progress
from pytest_aprt.errors import SettingsError
from pytest_aprt.options import DEFAULT_PROMPT
from pytest_aprt.settings import layers_named, token_ids
from pytest_aprt.stages import StageGraph, stages_named

if TYPE_CHECKING:
    from pytest_aprt.capture import LayerStages
    from pytest_aprt.facts import Facts


class _Model(NamedTuple):
    """An opened model: how to run it and what the manifest says of it."""

    name: str
    run: Any  # has layers(tokens)
    facts: Facts
    graph: StageGraph
    tokenizer: Path | None
    fields: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of ``apr trace`` have its names."""
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a Hugging Face folder or "
                        "hub id")  # fmt: skip
    parser.add_argument("--save-tensor", metavar="STAGES", default="all",
                        help="all (default), or a list such as attn_norm,q_post_rope")  # fmt: skip
    parser.add_argument("--save-tensor-dir", metavar="DIR", type=Path,
                        help="folder to write; default <model>-trace beside the model")  # fmt: skip
    parser.add_argument("--save-tensor-layers", metavar="A..B", default="all",
                        help="layers, B excluded; default all")  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", default=DEFAULT_PROMPT,
                        help="default %(default)r")  # fmt: skip
    prompt.add_argument("--tokens", metavar="IDS", help="token ids such as 3838,374,220")
    parser.add_argument("--tokenizer", metavar="HF", help="Hugging Face folder or hub id whose "
                        "tokenizer splits the prompt of a GGUF")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write the dump.

    Raises:
        AprtError: the model, the prompt or the folder cannot be used.
    """
    from pytest_aprt.dump import as_array
    from pytest_aprt.sources.aprt_writer import DumpWriter, refuse_foreign

    folder = arguments.save_tensor_dir or _default_folder(arguments.model)
    refuse_foreign(folder)
    stages = stages_named(arguments.save_tensor)
    model = _open(arguments.model)
    layers = layers_named(
        "--save-tensor-layers", arguments.save_tensor_layers, model.graph.n_layers
    )
    wanted = _wanted(model.graph, {stage.name for stage in stages}, set(layers), arguments)
    prompt = "" if arguments.tokens is not None else arguments.prompt
    tokens = _tokens(arguments, model)
    count = 0
    with DumpWriter(folder, tokens, {**model.fields, "prompt": prompt}) as writer:
        for captured in _run(model, tokens, last=max(wanted, key=_place), of=arguments.model):
            for stage in wanted.get(captured.layer, ()):
                writer.write(captured.layer, stage, as_array(captured.stages[stage]))
                count += 1
    print(f"{folder}: {count} tensors, {len(tokens)} tokens")
    return 0


def _default_folder(model: str) -> Path:
    path = Path(model)
    if path.exists():
        name = (path.name or path.resolve().name).removesuffix(".gguf")
        return path.parent / f"{name}-trace"
    return Path(re.sub(r"\W+", "-", model).strip("-") + "-trace")


def _wanted(
    graph: StageGraph, stages: set[str], layers: set[int], arguments: argparse.Namespace
) -> dict[int | None, list[str]]:
    """Return the stages to save by layer; a stage that is asked for by name must exist."""
    wanted: dict[int | None, list[str]] = {}
    for point in graph.points:
        if point.stage in stages and (point.layer is None or point.layer in layers):
            wanted.setdefault(point.layer, []).append(point.stage)
    absent = stages - {stage.name for stage in graph.stages}
    if not wanted or (absent and arguments.save_tensor.strip().lower() != "all"):
        known = ", ".join(stage.name for stage in graph.stages)
        raise SettingsError(
            f"--save-tensor={arguments.save_tensor}: expected stages that this model has in "
            f"layers {arguments.save_tensor_layers}: {known}"
        )
    return wanted


def _place(layer: int | None) -> float:
    return float("inf") if layer is None else layer


def _run(
    model: _Model, tokens: tuple[int, ...], last: int | None, of: str
) -> Iterable[LayerStages]:
    """Yield the layers up to ``last``; one thread, so that the bits do not depend on the cores."""
    import torch

    progress, total = Progress("trace"), model.graph.n_layers + 1
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for done, captured in enumerate(model.run.layers(tokens), start=1):
                yield captured
                name = "final norm and head" if captured.layer is None else f"layer {done - 1}"
                ends = captured.layer == last
                progress(f"{of}: {name}", done, done if ends else total)
                if ends:
                    return
    finally:
        torch.set_num_threads(before)


def _open(model: str) -> _Model:
    return _open_gguf(model) if Path(model).is_file() else _open_hugging_face(model)


def _open_gguf(path: str) -> _Model:
    from pytest_aprt.architectures import architecture_of
    from pytest_aprt.checkpoints import GgufCheckpoint
    from pytest_aprt.sources.gguf import GgufFile

    file = GgufFile.open(path)
    architecture = architecture_of(file.architecture, None)
    checkpoint = GgufCheckpoint(file, architecture)
    checkpoint.check()
    facts = checkpoint.facts

    from pytest_aprt.forward import BuiltinRunner  # loads torch, so only for a file that is right
    from pytest_aprt.weights import GgufWeights

    return _Model(
        name=path,
        run=BuiltinRunner(GgufWeights(file, architecture, facts), facts, architecture),
        facts=facts,
        graph=architecture.graph(facts.layers),
        tokenizer=None,
        fields=_fields("gguf", file.sha256(), architecture.name, "builtin"),
    )


def _open_hugging_face(source: str) -> _Model:
    from pytest_aprt.architectures import architecture_of
    from pytest_aprt.checkpoints import read_config
    from pytest_aprt.facts import Facts
    from pytest_aprt.sources.hf import HfFolder

    folder = HfFolder.open(source)
    architecture = architecture_of(None, str(folder.config.get("model_type")))
    config = read_config(folder)
    facts = Facts.from_config(config)

    from pytest_aprt.oracle import TransformersRunner
    from pytest_aprt.weights import HfWeights

    return _Model(
        name=source,
        run=TransformersRunner(config, HfWeights(folder, architecture, facts)),
        facts=facts,
        graph=architecture.graph(facts.layers),
        tokenizer=folder.path,
        fields={
            **_fields("huggingface", folder.sha256(), architecture.name, "transformers"),
            "config": folder.config,
        },
    )


def _fields(kind: str, sha256: str, architecture: str, engine: str) -> dict[str, Any]:
    side = "model" if kind == "gguf" else "oracle"
    return {
        f"{side}_sha256": sha256,
        "architecture": architecture,
        "engine": engine,
        "arithmetic": "float32",
    }


def _tokens(arguments: argparse.Namespace, model: _Model) -> tuple[int, ...]:
    if arguments.tokens is not None:
        tokens = token_ids("--tokens", arguments.tokens)
    else:
        tokens = _split(arguments, model)
    for token in tokens:
        if token >= model.facts.vocab:
            raise SettingsError(
                f"token id {token} is outside the vocabulary: expected 0 to {model.facts.vocab - 1}"
            )
    return tokens


def _split(arguments: argparse.Namespace, model: _Model) -> tuple[int, ...]:
    from pytest_aprt.pair import tokenizer_of
    from pytest_aprt.sources.hf import HfFolder

    folder = model.tokenizer
    if arguments.tokenizer:
        folder = HfFolder.open(arguments.tokenizer).path
    if folder is None:
        raise SettingsError(
            f"{model.name}: expected --tokenizer with the Hugging Face model that it was made "
            "from, to split the prompt, or --tokens with token ids"
        )
    tokens = tuple(tokenizer_of(folder)(arguments.prompt)["input_ids"])
    if not tokens:
        raise SettingsError(f"--prompt={arguments.prompt!r} has no tokens: expected some text")
    return tokens
