"""How far each quantisation type may move a tensor: the bounds of the weights rung."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantType:
    """One GGUF tensor type.

    ``measured`` is the worst relative L2 distance seen between a dequantised tensor and the tensor
    it was made from, over trained tensors and heavy-tailed random ones, with and without an
    importance matrix (``tests/benchmarks/quant_bounds.py`` prints them). ``bound`` is what the
    weights rung allows: 1.5 times that. A permuted or swapped tensor lies at 1.4 and beyond.
    """

    name: str
    measured: float
    bound: float


_MEASURED = {
    "F64": 0.0, "F32": 0.0, "F16": 3e-4, "BF16": 2.4e-3,
    "Q8_0": 0.012, "Q6_K": 0.04, "Q5_K": 0.06, "Q4_K": 0.12, "Q5_0": 0.07, "Q5_1": 0.07,
    "Q4_0": 0.15, "Q4_1": 0.15, "Q3_K": 0.2, "Q2_K": 0.35, "IQ4_NL": 0.12, "IQ4_XS": 0.12,
}  # fmt: skip
_EXACT = 1e-6  # F32 tensors of a converted checkpoint hold its very numbers

QUANT_TYPES: dict[str, QuantType] = {
    name: QuantType(name=name, measured=worst, bound=1.5 * worst or _EXACT)
    for name, worst in _MEASURED.items()
}
