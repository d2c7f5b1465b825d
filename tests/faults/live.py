"""Faults in llama.cpp itself: in its parameters, or in the file that it reads.

A fault in the file may be in the one that the run is given, and then a rung before the stages names
it; or in one that the engine alone reads, as a bug in its loading or its kernels would have it, and
then the stage that computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from harness import FIXTURES, TOKENS, fixture_pair, verdict_of

from faults.files import GONE, rewritten
from pytest_aprt.engines.llamacpp import LlamaCpp
from pytest_aprt.sources.gguf import GgufFile
from pytest_aprt.verdict import Verdict

LAYERS = range(4)
Change = Callable[[GgufFile], dict[str, Any]]
"""What ``rewritten`` is to change of a file: ``metadata`` or ``tensors``."""


def metadata(key: str, value: Any) -> Change:
    return lambda file: {"metadata": {f"{file.architecture}.{key}": value}}


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the bytes of a tensor, (rows, bytes of a row); vectors are (n,) of float32."""
    return partial(_tensors, names=(name,), change=lambda raw: (change(raw),))


def swapped(a: str, b: str) -> Change:
    return partial(_tensors, names=(a, b), change=lambda x, y: (y, x))


def _tensors(
    file: GgufFile, names: tuple[str, ...], change: Callable[..., tuple[np.ndarray, ...]]
) -> dict[str, Any]:
    kinds = [file.tensors[name].type for name in names]
    values = [_rows(file, name) for name in names]
    put = zip(names, change(*values), kinds, strict=True)
    return {"tensors": {name: (raw.view(np.uint8), kind) for name, raw, kind in put}}


def _rows(file: GgufFile, name: str) -> np.ndarray:
    raw, shape = file.raw(name).copy(), file.tensors[name].shape
    return raw.view(np.float32).reshape(shape) if len(shape) == 1 else raw.reshape(shape[0], -1)


def unpermuted(file: GgufFile) -> dict[str, Any]:
    """Q and K as Hugging Face has them: 64 channels a head, in two halves and not in pairs."""
    found = {}
    for layer in LAYERS:
        for name, heads in (("attn_q", 4), ("attn_k", 2)):
            name = f"blk.{layer}.{name}.weight"
            rows = _rows(file, name).reshape(heads, 32, 2, -1)
            put = np.ascontiguousarray(rows.swapaxes(1, 2)).view(np.uint8)
            found[name] = put.reshape(heads * 64, -1), file.tensors[name].type
    return {"tensors": found}


def embedding_as_head(file: GgufFile) -> dict[str, Any]:
    raw = file.raw("token_embd.weight").copy()
    return {"tensors": {"output.weight": (raw, file.tensors["token_embd.weight"].type)}}


def one_scale_doubled(rows: np.ndarray) -> np.ndarray:
    """In the first block of row 9: Q4_K begins with two scales, of values and of minima."""
    rows[9, :4] = (2 * rows[9, :4].view(np.float16)).view(np.uint8)
    return rows


def rows_swapped(a: int, b: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[[a, b]] = rows[[b, a]]
        return rows

    return change


@dataclass(frozen=True, kw_only=True)
class LiveFault:
    """A fault and what must name it.

    ``change`` is of the file that the run is given (``rung`` is then its name) or, where ``rung``
    is ``stages``, of the one that the engine reads. ``named`` are all origins; or what the
    verdict's sentence says.
    """

    name: str
    family: str
    rung: str = "stages"
    named: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    change: Change | None = None


def everywhere(*stages: str) -> tuple[str, ...]:
    return tuple(f"L{layer:02}-{stage}" for layer in LAYERS for stage in stages)


ROTATED = everywhere("q_post_rope", "k_post_rope")
Q0, Q1, NORM_EPS = "blk.0.attn_q.weight", "blk.1.attn_q.weight", "attention.layer_norm_rms_epsilon"
GATE, UP, K_BIAS = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight", "blk.2.attn_k.bias"
Q_NORM, K_NORM = "blk.1.attn_q_norm.weight", "blk.1.attn_k_norm.weight"
DOWN = "blk.1.ffn_down.weight"

IN_THE_ENGINE = (
    LiveFault(name="rope base by a parameter", family="qwen2", named=ROTATED,
              options={"rope_freq_base": 10_000}),
    LiveFault(name="positions scaled by a parameter", family="llama", named=ROTATED,
              options={"rope_freq_scale": 0.5}),
    LiveFault(name="YaRN by a parameter", family="qwen3", named=ROTATED,
              options={"rope_scaling_type": 2, "rope_freq_scale": 0.25, "yarn_ext_factor": 1.0,
                       "yarn_orig_ctx": 512}),
    LiveFault(name="no causal mask, by a parameter", family="qwen2",
              named=everywhere("attn_softmax"), options={"attention_type": 1}),
    LiveFault(name="K cache in 4 bits, by a parameter", family="llama",
              named=everywhere("attention"), options={"type_k": "q4_0"}),
    LiveFault(name="Q and K not permuted", family="llama", named=everywhere("qkv_matmul"),
              change=unpermuted),
    LiveFault(name="two layers' tensors swapped", family="qwen2",
              named=("L00-qkv_matmul", "L01-qkv_matmul"), change=swapped(Q0, Q1)),
    LiveFault(name="gate and up swapped", family="qwen3", named=("L01-ffn_gate", "L01-ffn_up"),
              change=swapped(GATE, UP)),
    LiveFault(name="eps", family="qwen2", change=metadata(NORM_EPS, 1e-2),
              named=(*everywhere("attn_norm", "ffn_norm"), "final_norm")),
    LiveFault(name="rope base", family="qwen3", named=ROTATED,
              change=metadata("rope.freq_base", 1e4)),
    LiveFault(name="rope factors dropped", family="llama", named=ROTATED,
              change=lambda file: {"tensors": {"rope_freqs.weight": GONE}}),
    LiveFault(name="bias of K dropped", family="qwen2", named=("L02-qkv_bias",),
              change=tensor(K_BIAS, np.zeros_like)),
    LiveFault(name="norms of Q and K swapped", family="qwen3",
              named=("L01-q_post_rope", "L01-k_post_rope"), change=swapped(Q_NORM, K_NORM)),
    LiveFault(name="norm weight plus one", family="llama", named=("L03-attn_norm",),
              change=tensor("blk.3.attn_norm.weight", lambda w: w + np.float32(1))),
    LiveFault(name="one block's scale doubled", family="qwen2", named=("L01-ffn_out",),
              change=tensor(DOWN, one_scale_doubled)),
    LiveFault(name="two rows of the embedding swapped", family="qwen2", named=("L00-embedding",),
              change=tensor("token_embd.weight", rows_swapped(TOKENS[2], 501))),
    LiveFault(name="embedding taken for the head", family="qwen2", named=("lm_head",),
              change=embedding_as_head),
    LiveFault(name="two rows of the head swapped", family="qwen3", named=("lm_head",),
              change=tensor("output.weight", rows_swapped(40, 41))),
)  # fmt: skip
"""Everything that the run is told is right: the stage itself is named."""

IN_THE_FILE = (
    LiveFault(name="Q and K not permuted", family="llama", rung="weights",
              named=("blk.0.attn_q.weight", "permut"), change=unpermuted),
    LiveFault(name="two layers' tensors swapped", family="qwen2", rung="weights",
              named=("blk.0.attn_q.weight", "blk.1.attn_q.weight"), change=swapped(Q0, Q1)),
    LiveFault(name="gate and up swapped", family="qwen3", rung="weights",
              named=("blk.1.ffn_gate.weight", "ffn_up"), change=swapped(GATE, UP)),
    LiveFault(name="eps", family="qwen2", rung="config", named=("norm_eps",),
              change=metadata(NORM_EPS, 1e-2)),
    LiveFault(name="rope base", family="qwen3", rung="config", named=("rope_theta",),
              change=metadata("rope.freq_base", 1e4)),
    LiveFault(name="rope factors dropped", family="llama", rung="config", named=("rope",),
              change=lambda file: {"tensors": {"rope_freqs.weight": GONE}}),
    LiveFault(name="bias of K dropped", family="qwen2", rung="weights",
              named=("blk.2.attn_k.bias", "zero"), change=tensor(K_BIAS, np.zeros_like)),
    LiveFault(name="one block's scale doubled", family="qwen2", rung="weights",
              named=("blk.1.ffn_down.weight", "rows that are wrong: 9 of 256"),
              change=tensor(DOWN, one_scale_doubled)),
)  # fmt: skip
"""The run is given the broken file: the rung that looks at files names it."""


class Found(NamedTuple):
    """How a fault ended: whether what must name it did, and the verdict."""

    right: bool
    verdict: Verdict


def plant(fault: LiveFault, folder: Path) -> Found:
    """Run llama.cpp with the fault; a changed file is written to ``folder``."""
    clean = FIXTURES / f"tiny-{fault.family}" / "q4_k_m.gguf"
    given = read = clean
    if fault.change is not None:
        with GgufFile.open(clean) as file:
            changes = fault.change(file)
        read = rewritten(clean, folder / "broken.gguf", **changes)
        if fault.rung != "stages":
            given = read
    pair = fixture_pair(fault.family, given)
    engine = LlamaCpp(read, pair.model_facts, pair.architecture, fault.options)
    verdict = verdict_of(pair, harness.checked(pair, engine))
    if fault.rung == "stages":
        named = tuple(harness.origins_of(verdict)) == fault.named
    else:
        named = verdict.rung == fault.rung and all(word in verdict.summary for word in fault.named)
    return Found(named and verdict.status == "DIVERGED", verdict)
