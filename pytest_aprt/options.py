"""The table of options: each is ``--aprt-<name>`` and the ini key ``aprt_<name>``.

pytest loads this in every run, also where nobody uses the plugin, so it imports next to nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

DEFAULT_PROMPT = "What is 2+2?"
DEFAULT_STEPS = 3
DEFAULT_COSINE = 0.999  # the field's habit for Q4_K
DEFAULT_ENGINE_TIMEOUT_S = 600
ENGINES = ("auto", "builtin", "llama.cpp", "transformers", "command")
DEFAULT_DEVICE = "cpu"
ARITHMETIC_NAMES = (
    "auto", "float32", "float16", "bfloat16", "tf32", "q8", "q8_k", "q8_0", "q8_1",
)  # fmt: skip
PROMPT_SET_NAMES = ("short", "long")
PYTHON_PREFIX = "python:"


class Option(NamedTuple):
    """One option and its ini twin."""

    name: str
    kind: Literal["value", "list", "flag"]
    help: str
    metavar: str | None = None
    is_path: bool = False  # a relative path in an ini file is meant from there

    @property
    def flag(self) -> str:
        """The option as typed."""
        return f"--aprt-{self.name}"

    @property
    def key(self) -> str:
        """The ini name, which is also the option's dest."""
        return "aprt_" + self.name.replace("-", "_")


OPTIONS = (
    Option(name="model", kind="value", metavar="SOURCE", is_path=True,
           help="Model under test: a GGUF file, a Hugging Face folder or hub id, a folder of APRT "
           "dumps, python:module:factory, or what a command reads"),
    Option(name="oracle", kind="value", metavar="SOURCE", is_path=True,
           help="Hugging Face model that the model was made from, a folder or a hub id; or what "
           "another engine runs, named as a model is"),
    Option(name="weights", kind="value", metavar="SOURCE", is_path=True,
           help="GGUF or Hugging Face model whose weights a dump or an engine of one's own ran on"),
    Option(name="engine", kind="value", metavar="NAME",
           help=f"What runs the model: {', '.join(ENGINES)}"),
    Option(name="engine-option", kind="list", metavar="KEY=VALUE",
           help="Parameter of the engine, such as n_threads=2 for llama.cpp; repeatable"),
    Option(name="engine-command", kind="value", metavar="COMMAND",
           help="Program that writes APRT dumps to {out}, with its arguments; also {model}, "
           "{tokens}, {prompt}, {stages}, {layers}, {weights}, {oracle}"),
    Option(name="oracle-engine", kind="value", metavar="NAME",
           help="What runs the oracle, where it is no Hugging Face model; as --aprt-engine"),
    Option(name="oracle-engine-option", kind="list", metavar="KEY=VALUE",
           help="Parameter of the oracle's engine; repeatable"),
    Option(name="oracle-engine-command", kind="value", metavar="COMMAND",
           help="Program that runs the oracle; as --aprt-engine-command"),
    Option(name="device", kind="value", metavar="DEVICE",
           help=f"Where transformers runs the model, such as cuda; default {DEFAULT_DEVICE}"),
    Option(name="engine-timeout", kind="value", metavar="SECONDS",
           help=f"Limit for the command, each prompt; default {DEFAULT_ENGINE_TIMEOUT_S}"),
    Option(name="prompt", kind="list", metavar="TEXT",
           help=f"Prompt to run, repeatable; default {DEFAULT_PROMPT!r}"),
    Option(name="prompt-set", kind="list", metavar="NAME",
           help=f"Built-in prompts, repeatable: {', '.join(PROMPT_SET_NAMES)}"),
    Option(name="tokens", kind="list", metavar="IDS",
           help="Token ids to run instead of a prompt, such as 3838,374,220; repeatable"),
    Option(name="stages", kind="value", metavar="STAGES",
           help="Stages to judge: all, or a list such as attn_norm,q_post_rope"),
    Option(name="layers", kind="value", metavar="LAYERS",
           help="Layers to judge: all, 0..4 (end exclusive), or 0,13,27"),
    Option(name="min-cosine", kind="value", metavar="COS",
           help=f"Threshold on cosine of every stage; default {DEFAULT_COSINE}"),
    Option(name="threshold", kind="list", metavar="STAGE=COS",
           help="Threshold on cosine of one stage, repeatable"),
    Option(name="arithmetic", kind="value", metavar="NAME",
           help=f"How the engine rounds: {', '.join(ARITHMETIC_NAMES)}; and ,storage= ,cache= "
           "behind it"),
    Option(name="decode-steps", kind="value", metavar="K",
           help=f"Steps to decode with the KV cache; default {DEFAULT_STEPS}, 0 for none"),
    Option(name="threads", kind="value", metavar="N",
           help="Threads that read and multiply large matrices; default 0, one per core"),
    Option(name="strict", kind="flag",
           help="Fail every point whose total is below its threshold, noise or not"),
    Option(name="stop-at-first", kind="flag",
           help="End the run once the first divergence is certain; what lies behind it is skipped"),
    Option(name="contracts", kind="list", metavar="DIR",
           help="Folder whose contracts become tests, repeatable; default contracts/ if present"),
    Option(name="run-shell", kind="flag",
           help="Let contracts run the shell lines that they hold"),
    Option(name="shell-timeout", kind="value", metavar="SECONDS",
           help="Limit for each shell line; default 60"),
    Option(name="ledger", kind="value", metavar="FILE",
           help="File to which the outcome of every falsifier is appended"),
    Option(name="dump", kind="value", metavar="DIR",
           help="Write all stages of both sides as APRT tensors: DIR/model and DIR/oracle"),
    Option(name="report", kind="value", metavar="DIR",
           help="Folder for report.json, report.md and report.html"),
    Option(name="baseline", kind="value", metavar="JSON", is_path=True,
           help="Earlier report.json of the same model and prompts; only what is worse fails"),
)  # fmt: skip
