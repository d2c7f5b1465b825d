"""The built-in prompts, on the tokenizers of the fixture pairs."""

from __future__ import annotations

from types import SimpleNamespace

import harness
import pytest

from pytest_aprt.prompts import PROMPT_SETS
from pytest_aprt.run import prompts_of


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_long_prompt_is_128_tokens_of_prose_and_code(family):
    settings = SimpleNamespace(tokens=(), prompts=(), prompt_sets=("long",))
    (prompt,) = prompts_of(settings, harness.fixture_pair(family))
    assert len(prompt.tokens) == 128
    assert "A model that was converted by hand" in prompt.text
    assert "def rope(x, base=10000.0):" in prompt.text
    assert PROMPT_SETS["long"][0].text.startswith(prompt.text.lstrip())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_short_prompts_differ_and_none_is_a_single_token(family):
    settings = SimpleNamespace(tokens=((5, 6),), prompts=("Hello",), prompt_sets=("short",))
    asked = prompts_of(settings, harness.fixture_pair(family))
    assert [p.text for p in asked[:2]] == ["", "Hello"]
    short = asked[2:]
    assert [p.text for p in short] == [cut.text for cut in PROMPT_SETS["short"]]
    assert len({p.tokens for p in short}) == len(short) >= 4
    assert all(2 <= len(p.tokens) < 128 for p in short)
