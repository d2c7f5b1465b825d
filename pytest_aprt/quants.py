"""How far each quantisation type may move a tensor: the bounds of the weights rung."""

from __future__ import annotations

from dataclasses import dataclass


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
