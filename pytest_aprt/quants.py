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
    tensor lies at 1.4 and beyond.
    """

    name: str
    measured: float
    bound: float


_MEASURED = {
    "F64": 0.0, "F32": 0.0, "F16": 0.0002, "BF16": 0.0017, "Q8_0": 0.0116, "Q6_K": 0.0331,
    "Q5_K": 0.0499, "Q5_1": 0.0505, "Q5_0": 0.0838, "Q4_K": 0.0960, "Q4_1": 0.1131, "Q4_0": 0.1261,
    "IQ4_NL": 0.1106, "IQ4_XS": 0.1122, "MXFP4": 0.1610, "Q3_K": 0.1870, "IQ3_S": 0.2847,
    "IQ3_XXS": 0.3444, "Q2_K": 0.3528, "IQ2_S": 0.5695, "IQ2_XS": 0.5930, "IQ2_XXS": 0.8165,
    "IQ1_M": 0.5550, "IQ1_S": 0.7125, "TQ2_0": 0.8527, "TQ1_0": 0.8527,
}  # fmt: skip
_ZEROS = 0.95  # a tensor of zeros lies at 1
_EXACT = 1e-6  # F32 tensors of a converted checkpoint hold its very numbers

QUANT_TYPES: dict[str, QuantType] = {
    name: QuantType(name=name, measured=worst, bound=min(1.5 * worst, _ZEROS) or _EXACT)
    for name, worst in _MEASURED.items()
}
