"""The fast decoders against gguf-py, bit for bit, on every pattern that a block can hold."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from harness import PROCESSORS

from pytest_aprt import compiled
from pytest_aprt.scripted import scripted
from pytest_aprt.sources.dequant import KERNELS, unpack_of, unpacked_by

WAYS = {
    # how kernels are run: what returns the decoder of a type
    "TorchScript": lambda kind: unpacked_by(scripted(KERNELS[kind])),
    "torch": lambda kind: unpacked_by(KERNELS[kind]),  # where torch compiles nothing
    **{name: partial(compiled.unpack_of, processor=name) for name in PROCESSORS},
}
ALL = [*product(sorted(KERNELS), WAYS), ("F16", "dtype"), ("BF16", "dtype")]
every_way = pytest.mark.parametrize(("kind", "way"), ALL)
HALVES = {  # where a block keeps its float16 scales
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "F16": (0,), "BF16": (),
}  # fmt: skip


def same_bits(kind: str, way: str, blocks: np.ndarray) -> bool:
    values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float32)
    found = torch.full((len(blocks), values), torch.nan)
    unpack = unpack_of(kind) if way == "dtype" else WAYS[way](kind)
    unpack(torch.from_numpy(blocks), found)
    a, b = found.numpy().reshape(-1), expected.reshape(-1)
    nan = np.isnan(a) & np.isnan(b)
    return bool((nan | (a.view(np.int32) == b.view(np.int32))).all())


def random_blocks(kind: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return rng.integers(0, 256, (count, size), dtype=np.uint8)


@every_way
def test_random_bytes(kind, way):
    assert same_bits(kind, way, random_blocks(kind, 4096, seed=1))


@every_way
def test_a_single_block(kind, way):
    """As when one row of a narrow matrix is read; a slice of it counts as contiguous."""
    assert all(same_bits(kind, way, random_blocks(kind, 1, seed)) for seed in range(20))


@every_way
def test_every_byte_everywhere(kind, way):
    """Each byte of a block takes each of its 256 values, among random and among zero bytes."""
    for around in (random_blocks(kind, 1, seed=2), random_blocks(kind, 1, seed=2) * 0):
        size = around.shape[1]
        blocks = np.repeat(around, 256 * size, axis=0)
        blocks.reshape(size, 256, size)[np.arange(size), :, np.arange(size)] = np.arange(256)
        assert same_bits(kind, way, blocks)


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, way in ALL if HALVES[kind]])
def test_every_scale(kind, way):
    """Denormal, largest, infinite and NaN scales: all 65,536 float16 numbers."""
    for at in HALVES[kind]:
        blocks = random_blocks(kind, 1 << 16, seed=3)
        blocks[:, at : at + 2] = np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8)
        assert same_bits(kind, way, blocks)


def test_every_bfloat16():
    assert same_bits("BF16", "dtype", np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8))


@pytest.mark.parametrize("kind", sorted(KERNELS))
def test_files_are_decoded_by_what_is_compiled(kind):
    """Else all would work, and be slow."""
    name = unpack_of(kind).__qualname__
    assert name.startswith("unpack_of" if PROCESSORS else "unpacked_by")


def test_other_types_are_left_to_gguf_py():
    assert unpack_of("Q3_K") is None
