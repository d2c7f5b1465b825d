"""Each rounding on numbers that can be worked out by hand, and against what others write."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from faults import engines
from gguf import GGMLQuantizationType

from pytest_aprt.rounding import ROUNDINGS, Rounded, fits, kept_as

ULP = 2.0**-23


def rounded(name, *values, off=None):
    off = None if off is None else torch.tensor([off])
    return ROUNDINGS[name](torch.tensor([values]), off)


def block(*values, size=32):
    """One block: these values, then zeros."""
    return (*map(float, values), *[0.0] * (size - len(values)))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("none", 1 + ULP, 1 + ULP),
        ("bfloat16", 1 + 2**-8, 1.0),  # half way: to the even one
        ("bfloat16", 1 + 3 * 2**-8, 1 + 2**-6),
        ("bfloat16", 1 + 2**-8 + ULP, 1 + 2**-7),
        ("float16", 1 + 2**-11, 1.0),
        ("float16", 1 + 3 * 2**-11, 1 + 2**-9),
        ("float16", 70000.0, float("inf")),
        ("float16", 2**-25, 0.0),
        ("tf32", 1 + 2**-11, 1 + 2**-10),  # half way: away from zero
        ("tf32", -1 - 2**-11, -1 - 2**-10),
        ("tf32", 1 + 2**-11 - ULP, 1.0),
        ("tf32_cut", 1 + 2**-10 - ULP, 1.0),
        ("tf32_cut", -1 - 2**-10 + ULP, -1.0),
    ],
)
def test_a_value(name, value, expected):
    found = rounded(name, value)
    assert found.value.item() == expected
    assert found.doubt is None


def test_a_cast_of_what_is_not_known_exactly():
    """1.003 is 1 or 1 + 2^-7 in bfloat16 if it may be off by 0.001; 1.001 is 1."""
    found = rounded("bfloat16", 1.003, 1.001, off=(0.001, 0.001))
    assert found.doubt.tolist() == [[2.0**-7, 0.0]]


def test_a_block_of_q8_0():
    """The peak of 127 makes the step 1; 2.5 lies between two levels, and either is right."""
    found = rounded("q8_0", *block(127, -3, 0.4, 0.6, 2.5, -1.5))
    assert found.value[0, :4].tolist() == [127, -3, 0, 1]
    assert found.value[0, 4] in (2, 3) and found.value[0, 5] in (-1, -2)
    assert found.doubt[0].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 26]


def test_the_step_of_q8_0_is_kept_in_float16():
    step = float(np.float16(1 / 127))
    assert step != 1 / 127
    found = rounded("q8_0", *block(1.0, 0.5, -1.0))
    assert found.value[0, :3].tolist() == pytest.approx([127 * step, 64 * step, -127 * step])


def test_a_step_between_two_float16_puts_the_whole_block_in_doubt():
    between = (1 + 2.0**-11) * 127  # its step is half way between 1 and the next float16
    found = rounded("q8_0", *block(between, 10 * (1 + 2.0**-11)))
    assert found.doubt[0, :3].tolist() == [127 * 2.0**-10, 10 * 2.0**-10, 0]


def test_a_block_of_q8_k():
    """The largest value becomes -127 times the step, whatever its sign; the step is a float32."""
    for peak in (12.7, -12.7):
        found = rounded("q8_k", *block(1.04, peak, -0.06, size=256))
        assert found.value[0, :3].tolist() == pytest.approx([1.0, peak, -0.1])
        assert not found.doubt.any()


def test_each_block_has_its_own_step():
    found = rounded("q8_0", *block(127, 1.2), *block(12710, 120))
    step = 100.0625  # of 12710 / 127, in float16
    assert found.value[0, [0, 1, 32, 33]].tolist() == [127, 1, 127 * step, step]


def test_zeros_stay_zeros():
    for name in ("q8_0", "q8_1 sums", "q8_k"):
        found = rounded(name, *[0.0] * 256)
        assert not found.value.any() and not found.doubt.any()


@pytest.mark.parametrize(("name", "size"), [("q8_0", 32), ("q8_1", 32), ("q8_k", 256)])
def test_blocks_that_do_not_fit(name, size):
    assert rounded(name, *[1.0] * (size + 1)) is None
    assert rounded(name, *[1.0] * size) is not None


def test_what_may_be_off_widens_the_edge():
    """2.4 is 2, but if it may be off by 0.2 it may be 3 too."""
    values = block(127, 2.4, 2.2)
    assert not rounded("q8_0", *values).doubt.any()
    off = block(0, 0.2, 0.2)
    assert rounded("q8_0", *values, off=off).doubt[0, :3].tolist() == [0, 1, 0]


def test_the_sums_that_q8_1_keeps():
    """Of 127 and 64 steps of 1/127 ggml keeps 191 / 127 as a float16; the values have a step of
    their own, rounded to float16 too."""
    step = float(np.float16(1 / 127))
    found = rounded("q8_1 sums", *block(1.0, 64 / 127))
    kept = float(np.float16(np.float32(191) / np.float32(127)))
    assert found.sums.value.tolist() == [[pytest.approx(kept - 191 * step, abs=1e-6)]]
    assert rounded("q8_1", *block(1.0)).sums is None


def random(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_q8_0_is_what_gguf_py_writes():
    x = random(64, 256)
    kind = GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    ours = ROUNDINGS["q8_0"](torch.from_numpy(x), None)
    differ = ours.value.numpy() != theirs
    assert not (differ & (ours.doubt.numpy() == 0)).any()
    assert differ.mean() < 1e-3


@pytest.mark.parametrize("name", ["bfloat16", "float16", "q8_0", "q8_k"])
def test_the_engines_of_the_corpus_round_alike(name):
    """They are written apart; what they do otherwise must be in doubt."""
    x = random(64, 512, seed=1) * np.exp(random(64, 1, seed=2) * 3)
    ours = ROUNDINGS[name](torch.from_numpy(x), None)
    off = np.abs(ours.value.numpy() - getattr(engines, name)(x))
    doubt = 0 if ours.doubt is None else ours.doubt.numpy()
    assert (off <= doubt).all()


def test_other_layouts():
    both = Rounded(torch.ones(2, 3), torch.zeros(2, 3)).rearranged(lambda x: x.T)
    assert both.value.shape == both.doubt.shape == (3, 2)
    assert Rounded(torch.ones(2, 3)).rearranged(lambda x: x.T).doubt is None


def test_storage():
    value = torch.tensor([1.0, 1 + 2**-9, float("nan")], dtype=torch.float64)
    assert kept_as(value, "bfloat16")[:2].tolist() == [1.0, 1.0]
    assert kept_as(value, "float32") is value
    assert kept_as(value, "float16").dtype == torch.float64
    assert fits(value, "float16") and not fits(value, "bfloat16")
    assert fits(value[[0, 2]], "bfloat16")
    assert not fits(torch.tensor([1e6]), "float16")
