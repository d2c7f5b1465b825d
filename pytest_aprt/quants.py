"""How far each quantisation type may move a tensor: the bounds of the weights rung."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class QuantType:
    """One GGUF tensor type.

    ``measured`` is the worst relative L2 distance seen between a dequantised tensor and the tensor
    it was made from, over trained tensors and heavy-tailed random ones, with and without an
    importance matrix (``tests/benchmarks/quant_bounds.py`` prints them). ``bound`` is what the
    weights rung allows: 1.5 times that, less than a tensor of zeros shows. A permuted or swapped
    tensor lies at 1.4 and beyond. ``block_bound`` is that of any block of 32 in a row: 4 times
    ``measured``, where the worst block seen lies at 1.2 (IQ2_XXS) to 3.6 times (Q2_K). A block of
    zeros lies at 1, one that is scaled by 1.5 at a half: from Q2_K down no block is seen alone.
    """

    name: str
    measured: float
    bound: float
    block_bound: float


_MEASURED = {
    "F64": 0.0, "F32": 0.0, "F16": 0.0002, "BF16": 0.0017, "Q8_0": 0.0118, "Q6_K": 0.0350,
    "Q5_K": 0.0512, "Q5_1": 0.0520, "Q5_0": 0.0852, "Q4_K": 0.0985, "Q4_1": 0.1131, "Q4_0": 0.1290,
    "IQ4_NL": 0.1140, "IQ4_XS": 0.1150, "MXFP4": 0.1650, "NVFP4": 0.1250, "Q3_K": 0.1960,
    "IQ3_S": 0.3160, "IQ3_XXS": 0.3600, "Q2_K": 0.3528, "IQ2_S": 0.6470, "IQ2_XS": 0.6360,
    "IQ2_XXS": 0.8540, "IQ1_M": 0.6320, "IQ1_S": 0.7410, "TQ2_0": 0.8527, "TQ1_0": 0.8527,
    # of transformers' quantisers, the coarsest of a width: int8 by rows and float8 by tensors; nf4,
    # int4, int3 and int2 in blocks of 128 (tests/benchmarks/transformers_quants.py)
    "8-bit": 0.0480, "4-bit": 0.2419, "3-bit": 0.5121, "2-bit": 0.9124, "quantised": 0.9124,
}  # fmt: skip
_ZEROS = 0.95  # a tensor of zeros lies at 1
_EXACT = 1e-6  # F32 tensors of a converted checkpoint hold its very numbers

QUANT_TYPES: dict[str, QuantType] = {
    name: QuantType(
        name=name,
        measured=worst,
        bound=min(1.5 * worst, _ZEROS) or _EXACT,
        block_bound=4 * (worst or _EXACT),
    )
    for name, worst in _MEASURED.items()
}


_WIDTHS = {"load_in_8bit": 8, "load_in_4bit": 4}
_METHODS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "eetq": 8}
_BITS = ("bits", "nbits", "weight_bits", "w_bit")


def type_of(quantisation: Mapping[str, Any]) -> str:
    """Return the type of the matrices that a ``quantization_config`` of transformers describes."""
    stated = [width for key, width in _WIDTHS.items() if quantisation.get(key)]
    stated += [quantisation[key] for key in _BITS if isinstance(quantisation.get(key), int)]
    stated += [_METHODS.get(str(quantisation.get("quant_method")), 0)]
    name = f"{stated[0]}-bit"
    return name if name in QUANT_TYPES else "quantised"
