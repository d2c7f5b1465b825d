"""Measures what a vocabulary of the size that people use costs.

    PYTHONPATH=tests python tests/benchmarks/large_vocabulary.py [FOLDER]

Writes a random Qwen2 pair of two narrow layers with 151,936 tokens and 151,672 merges (as many as
Qwen2.5 has), made of bytes put together at random, and prints the time and the peak of memory of
what reads them, each in a process of its own (Linux). With FOLDER the pair is kept there.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from families import qwen2
from faults.files import rewritten
from tabulate import tabulate
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pytest_aprt.rungs.tokenizer import SPLITTINGS
from pytest_aprt.testing import write_random_pair

TOKENS = 151_936
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNUSED = 5  # rows of the embedding behind the vocabulary: llama.cpp calls them [PAD...]


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write the pair: the GGUF and the Hugging Face folder."""
    config = qwen2(vocab_size=TOKENS, hidden_size=64, num_hidden_layers=2,
                   tie_word_embeddings=True)  # fmt: skip
    plain, hf = write_random_pair(folder, config)
    tokens, merges = vocabulary(TOKENS - len(SPECIAL) - UNUSED)
    built = Tokenizer(models.BPE({text: n for n, text in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLITTINGS["qwen2"].patterns[0]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    built.save(str(hf / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}
    (hf / "tokenizer_config.json").write_text(json.dumps(stated))
    padding = [f"[PAD{TOKENS - UNUSED + n}]" for n in range(UNUSED)]
    gguf = rewritten(plain, folder / "large.gguf", {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *SPECIAL, *padding],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(SPECIAL) + [5] * UNUSED,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": len(tokens),
        "tokenizer.ggml.add_bos_token": False,
    })  # fmt: skip
    plain.unlink()
    return gguf, hf


def vocabulary(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return tokens and the merges that make them, the bytes first."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges, chosen = set(tokens), [], random.Random(0)
    letters = [token for token in tokens if token.isascii() and token.isalpha()]
    while len(tokens) < count:
        left, right = chosen.choice(tokens), chosen.choice(letters)
        text = left + right
        if text not in known and len(text) < 16:
            known.add(text)
            tokens.append(text)
            merges.append((left, right))
    return tokens, merges


_MEASURED = {
    "oracle's tokenizer": "AutoTokenizer.from_pretrained(hf)",
    "headers": "from pytest_aprt.pair import open_headers; open_headers(gguf, hf)",
    "tokens rung": (
        "from pytest_aprt.pair import open_headers, open_pair; pair = open_pair(open_headers(gguf, "
        "hf)); pair.tokenizer; begin(); from pytest_aprt.rungs.tokens import token_rows; "
        "rows = token_rows(pair, ('What is 2+2?',)); "
        "assert {row.status for row in rows} == {'pass'}, rows"
    ),
}
_FRAME = """
import re, sys, time
gguf, hf = sys.argv[1:]
import numpy, torch, transformers, tokenizers
from transformers import AutoTokenizer
def peak():  # getrusage's is at least that of the parent before it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
def begin():
    global started, before
    started, before = time.perf_counter(), peak()
begin()
{code}
print(time.perf_counter() - started, before, peak())
"""


def measured(name: str, gguf: Path, hf: Path) -> tuple[float, float, float]:
    """Return seconds, and the peak of memory in MB before and after."""
    ran = subprocess.run(
        [sys.executable, "-c", _FRAME.format(code=_MEASURED[name]), str(gguf), str(hf)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds, before, after = map(float, ran.stdout.split())
    return seconds, before, after


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pair = write_pair(folder)
        rows = [[name, *measured(name, *pair)] for name in _MEASURED]
        head = ["what", "seconds", "MB before", "MB peak"]
        print(tabulate(rows, head, floatfmt=(None, ".2f", ".0f", ".0f")))


if __name__ == "__main__":
    main()
