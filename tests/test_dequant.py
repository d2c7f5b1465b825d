"""The fast decoders against gguf-py, bit for bit, on every pattern that a block can hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pytest_aprt.sources.dequant import KERNELS, UNPACK, unpacked_by

QUANTISED = sorted(set(UNPACK) - {"F32"})
HALVES = {  # where a block keeps its float16 scales
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "F16": (0,), "BF16": (),
}  # fmt: skip


def same_bits(kind: str, blocks: np.ndarray, unpack=None) -> bool:
    values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32)
    found = torch.full((len(blocks), values), torch.nan)
    (unpack or UNPACK[kind])(torch.from_numpy(blocks), found)
    a, b = found.numpy().reshape(-1), expected.reshape(-1)
    nan = np.isnan(a) & np.isnan(b)
    return bool((nan | (a.view(np.int32) == b.view(np.int32))).all())


def random_blocks(kind: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return rng.integers(0, 256, (count, size), dtype=np.uint8)


@pytest.mark.parametrize("kind", QUANTISED)
def test_random_bytes(kind):
    assert same_bits(kind, random_blocks(kind, 4096, seed=1))


@pytest.mark.parametrize("kind", sorted(KERNELS))
def test_where_torch_compiles_nothing(kind):
    assert same_bits(kind, random_blocks(kind, 4096, seed=4), unpacked_by(KERNELS[kind]))


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_single_block(kind):
    """As when one row of a narrow matrix is read; a slice of it counts as contiguous."""
    assert all(same_bits(kind, random_blocks(kind, 1, seed)) for seed in range(20))


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_byte_everywhere(kind):
    """Each byte of a block takes each of its 256 values, among random and among zero bytes."""
    for around in (random_blocks(kind, 1, seed=2), random_blocks(kind, 1, seed=2) * 0):
        size = around.shape[1]
        blocks = np.repeat(around, 256 * size, axis=0)
        blocks.reshape(size, 256, size)[np.arange(size), :, np.arange(size)] = np.arange(256)
        assert same_bits(kind, blocks)


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if HALVES[kind]])
def test_every_scale(kind):
    """Denormal, largest, infinite and NaN scales: all 65,536 float16 numbers."""
    for at in HALVES[kind]:
        blocks = random_blocks(kind, 1 << 16, seed=3)
        blocks[:, at : at + 2] = np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8)
        assert same_bits(kind, blocks)


def test_every_bfloat16():
    assert same_bits("BF16", np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8))
