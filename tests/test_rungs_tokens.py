"""The tokens rung on the fixture pairs, on faults planted in their metadata, and on its parts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.files import rewritten
from faults.ladder import TOKEN_FAULTS
from harness import FIXTURES, fixture_pair

from pytest_aprt.checkpoints import GgufCheckpoint
from pytest_aprt.errors import SourceError
from pytest_aprt.rungs import ROW_STATUSES, TOKENS
from pytest_aprt.rungs.tokenizer import SPLITTINGS, GgufTokenizer, merges_of
from pytest_aprt.rungs.tokens import PROMPTS, token_rows
from pytest_aprt.sources.gguf import GgufFile


@pytest.fixture(scope="module")
def pairs():
    return {family: fixture_pair(family) for family in ("qwen2", "llama", "qwen3")}


def with_gguf(pair, path):
    """The pair with another GGUF's metadata, the oracle's tokenizer kept."""
    changed = dataclasses.replace(
        pair, model=GgufCheckpoint(GgufFile.open(path), pair.architecture)
    )
    changed.__dict__["tokenizer"] = pair.tokenizer
    return changed


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_clean_pair_passes_every_test(pairs, family):
    rows = token_rows(pairs[family], ("What is 2+2?",))
    assert [row.name for row in rows] == list(TOKENS)
    assert {row.name: row.status for row in rows} == dict.fromkeys(TOKENS, "pass")


@pytest.mark.parametrize("fault", TOKEN_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_breaks_its_tests_and_no_others(pairs, fault, tmp_path):
    clean = pairs[fault.family]
    source = FIXTURES / f"tiny-{fault.family}" / "q4_k_m.gguf"
    path = rewritten(source, tmp_path / "faulty.gguf", fault.metadata(clean.model.file.metadata))
    rows = token_rows(with_gguf(clean, path), ("What is 2+2?",))
    broken = {row.name for row in rows if row.broken}
    prompts = {*PROMPTS, "special", "user"}
    assert broken - prompts == fault.found
    assert bool(broken & prompts) == fault.in_prompts
    assert fault.says in next(row.reason for row in rows if row.broken)


def test_the_first_differing_prompt_and_position_are_named(pairs, tmp_path):
    clean = pairs["qwen2"]
    tokens = list(clean.model.file.metadata["tokenizer.ggml.tokens"])
    at = tokens.index("?")
    tokens[at], tokens[0] = tokens[0], tokens[at]
    path = rewritten(clean.model.file.path, tmp_path / "x.gguf", {"tokenizer.ggml.tokens": tokens})
    rows = {row.name: row for row in token_rows(with_gguf(clean, path), ("2+2", "What is 2+2?"))}
    ids = clean.tokenizer("What is 2+2?")["input_ids"]
    found = rows["user"].figures
    assert (found["prompt"], found["position"]) == ("What is 2+2?", len(ids) - 1)
    assert rows["user"].reason.endswith(f"0 '?' in the model, {at} '!' in the oracle")


def test_a_text_that_the_oracle_composes_first_says_so(pairs):
    rows = {row.name: row for row in token_rows(pairs["qwen2"], ("cafe\u0301",))}
    assert rows["user"].broken
    assert rows["user"].reason.endswith("normalises the text before, which GGUF cannot say")
    assert not any(row.broken for name, row in rows.items() if name != "user")


def test_an_end_at_which_the_oracle_stops_too_is_no_fault(pairs, tmp_path):
    path = rewritten(
        FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", tmp_path / "x.gguf",
        {"tokenizer.ggml.eos_token_id": 1022},
    )  # fmt: skip
    pair = with_gguf(pairs["qwen2"], path)
    config = SimpleNamespace(eos_token_id=[1021, 1022])
    rows = {row.name: row for row in token_rows(dataclasses.replace(pair, config=config), ())}
    assert rows["eos"].status == "differs"
    assert "1022 in the model, 1021 in the oracle; the oracle stops there too" in rows["eos"].reason
    assert rows["user"].status == "unavailable"


def test_without_a_tokenizer_on_either_side_the_reason_is_given(pairs):
    pair = pairs["qwen2"]
    file = SimpleNamespace(metadata={"general.architecture": "qwen2"}, path=Path("empty.gguf"))
    empty = GgufCheckpoint(file, pair.architecture)
    rows = token_rows(dataclasses.replace(pair, model=empty), ())
    assert [row.name for row in rows] == list(TOKENS)
    assert {row.status for row in rows} == {"unavailable"}
    assert ROW_STATUSES["unavailable"] == "skipped"
    assert "the GGUF holds no tokenizer" in rows[0].reason


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_an_oracle_without_tokenizer_files(pairs, tmp_path, kind):
    """For some families transformers 5.0 raises ImportError, for want of protobuf."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    folder = SimpleNamespace(path=tmp_path)
    pair = dataclasses.replace(pairs["qwen2"], oracle=folder)
    with pytest.raises(SourceError, match="give token ids instead"):
        _ = pair.tokenizer
    rows = token_rows(pair, ())
    assert {row.status for row in rows} == {"unavailable"}
    assert "no tokenizer that transformers can load" in rows[0].reason


def test_an_unknown_pre_tokenizer_leaves_the_vocabulary_to_be_judged(pairs, tmp_path):
    path = rewritten(
        FIXTURES / "tiny-qwen2" / "q4_k_m.gguf", tmp_path / "x.gguf",
        {"tokenizer.ggml.pre": "of-tomorrow"},
    )  # fmt: skip
    rows = {row.name: row for row in token_rows(with_gguf(pairs["qwen2"], path), ("a",))}
    assert rows["texts"].status == rows["merges"].status == "pass"
    for name in ("pre_tokenizer", "user", *PROMPTS):
        assert rows[name].status == "unavailable"
        assert "'of-tomorrow', which is not in the table" in rows[name].reason


def test_every_split_pattern_compiles_and_keeps_the_text():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    texts = [text for texts in PROMPTS.values() for text in texts]
    for name in SPLITTINGS:
        backend = GgufTokenizer({**metadata, "tokenizer.ggml.pre": name}).backend
        for text in texts:
            ends = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
            assert ends[0][0] == 0 and ends[-1][1] == len(text)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


def test_sentencepiece_merges_follow_the_scores():
    texts = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    scores = [0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    vocabulary = {text: number for number, text in enumerate(texts)}
    merges = merges_of(texts, scores, vocabulary)
    assert merges == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_a_sentencepiece_vocabulary_is_encoded_as_llama_cpp_does():
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = {"▁": -5.0, "h": -6.0, "i": -7.0, "hi": -2.0, "▁hi": -1.0}
    tokenizer = GgufTokenizer({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts + list(words),
        "tokenizer.ggml.token_type": types + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * len(texts) + list(words.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    })  # fmt: skip
    number = tokenizer.texts.index
    assert tokenizer.encode("hi") == [1, number("▁hi")]
    assert tokenizer.encode("hi hi") == [1, number("▁hi"), number("▁hi")]
    assert tokenizer.encode("é") == [1, number("▁"), number("<0xC3>"), number("<0xA9>")]
    assert tokenizer.encode("hi</s>")[-1] == 2
