"""The Python in README.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent.parent / "README.md"
BLOCKS = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README.read_text("utf-8"), re.S))


def test_every_example_names_its_file():
    assert len(BLOCKS) == README.read_text("utf-8").count("```python") >= 2


def test_the_examples(healthy):
    for name, text in BLOCKS.items():
        (healthy.path / name).write_text(text)
    # The engine shows the ends of all layers but the last, the final norm and the logits.
    shown, points = 4, 54
    suite = healthy("-k", "L00 or L01 or L02 or final_norm or lm_head")
    suite.assert_outcomes(passed=shown, skipped=points - shown, deselected=None)
    suite.stdout.fnmatch_lines(["PARITY: *"])
    own = healthy("test_parity.py")
    own.assert_outcomes(passed=2 + shown, skipped=points - shown)
