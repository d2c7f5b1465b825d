"""How engines round, and so what local error is normal: tables, and the profiles made of them.

An *arithmetic* says how one stage is computed; a *profile* is what an engine as a whole may do,
so it offers some arithmetics to every kind of stage. Data only: ``rounding`` has the functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pytest_aprt.errors import SettingsError

FLOAT32_ULP = 2.0**-24
"""Half the spacing of float32 at 1: the relative error of one rounding."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bound on ``|model - replay| / scale`` of a slice of n elements: base * (1 + spread/sqrt(n)).

    A slice's scale is its norm, or its response to one-ulp changes of its inputs in ulps where
    that is larger (``compare.judge``).
    """

    base: float
    spread: float
    source: str


STORAGE = {
    # dtype that activations are kept in: what a healthy stage may be off by
    "float32": Tolerance(
        base=1e-5,  # 168 roundings
        spread=0.0,
        source="healthy float32 engines stay below half of it (three orders of summation, 1 to "
        "512 tokens) and every planted fault exceeds it: tests/test_faults.py",
    ),
    "float16": Tolerance(
        base=2.0 * 2.0**-11,
        spread=3.0,
        source="two roundings to float16 of a slice, more for few elements: "
        "tests/benchmarks/local_error.py",
    ),
    "bfloat16": Tolerance(
        base=2.0 * 2.0**-8,
        spread=3.0,
        source="two roundings to bfloat16 of a slice, more for few elements: "
        "tests/benchmarks/local_error.py",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How one stage is computed.

    ``first`` and ``second`` are the roundings of a product's two operands (of a projection: its
    inputs and its weights; of scores and of the mix: Q or the probabilities, and the cached K or
    V), by their names in ``rounding``. ``first`` may be ``ggml``: whatever llama.cpp's CPU kernels
    do for the weight's type. ``storage`` is the dtype in which the result is kept.
    """

    name: str
    first: str = "none"
    second: str = "none"
    storage: str = "float32"
    note: str = ""

    @property
    def tolerance(self) -> Tolerance:
        """What local error the arithmetic leaves once the replay has emulated it."""
        tolerance = STORAGE[self.storage]
        if "q8_1" in (self.first, self.second):
            # The sum of a block's inputs, kept in float16, meets the minimum of a block of weights.
            return replace(tolerance, base=max(tolerance.base, 1e-3))
        return tolerance

    @property
    def rounds_to_blocks(self) -> bool:
        """Whether an operand is rounded to 8-bit blocks."""
        return any(name == "ggml" or name.startswith("q8") for name in (self.first, self.second))

    def stored(self, storage: str) -> Arithmetic:
        """Return the same with its result kept in another dtype."""
        if storage == self.storage:
            return self
        name = storage if self.name == "float32" else f"{self.name}, stored as {storage}"
        return replace(self, name=name, storage=storage)


EXACT = Arithmetic(name="float32")

_MATMUL = {
    row.name: row
    for row in (
        EXACT,
        Arithmetic(name="q8", first="ggml", note="inputs as llama.cpp's CPU kernels round them"),
        Arithmetic(name="q8_k", first="q8_k", note="inputs in blocks of 256 int8, scale float32"),
        Arithmetic(name="q8_0", first="q8_0", note="inputs in blocks of 32 int8, scale float16"),
        Arithmetic(name="q8_1", first="q8_1", note="the same with the block's sum in float16"),
        Arithmetic(name="float16 operands", first="float16", second="float16"),
        Arithmetic(name="float16 inputs", first="float16"),
        Arithmetic(name="bfloat16 operands", first="bfloat16", second="bfloat16"),
        Arithmetic(name="bfloat16 inputs", first="bfloat16"),
        Arithmetic(name="tf32", first="tf32", second="tf32"),
        Arithmetic(name="truncated tf32", first="tf32_cut", second="tf32_cut"),
    )
}
_ATTENTION = {
    row.name: row
    for row in (
        EXACT,
        Arithmetic(name="float16 operands", first="float16", second="float16"),
        Arithmetic(name="float16 cache", second="float16"),
        Arithmetic(name="bfloat16 operands", first="bfloat16", second="bfloat16"),
        Arithmetic(name="bfloat16 cache", second="bfloat16"),
        Arithmetic(name="q8_0 cache", second="q8_0"),
        Arithmetic(name="q8_0 operands", first="q8_0", second="q8_0"),
        _MATMUL["tf32"],
        _MATMUL["truncated tf32"],
    )
}
_ROUNDS_OPERANDS = {"matmul": _MATMUL, "scores": _ATTENTION, "mix": _ATTENTION}

GGML_INPUTS = {
    # weight type: what llama.cpp's CPU kernels round a matmul's inputs to (vec_dot_type)
    "F32": "none",
    "F16": "float16",
    "BF16": "bfloat16",
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "q8_1"),
    **dict.fromkeys(
        ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
         "IQ3_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"), "q8_k"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What an engine may do: names of arithmetics for products, and dtypes of activations.

    ``products`` are for projections, ``attention`` for scores and the mix of values.
    """

    name: str
    products: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    storage: tuple[str, ...] = ("float32",)

    def arithmetics(self, kinds: Iterable[str]) -> list[Arithmetic]:
        """Return what may have computed a result that stages of these kinds lie behind.

        The exact one comes first: an engine may always be more precise than it says.
        """
        named: dict[str, Arithmetic] = {EXACT.name: EXACT}
        for kind in kinds:
            table = _ROUNDS_OPERANDS.get(kind, {})
            names = self.products if kind == "matmul" else self.attention
            named |= {name: table[name] for name in names if name in table}
        return [a.stored(s) for s in ("float32", *self.storage[1:]) for a in named.values()]


_HALF_CACHES = {
    "float32": (),
    "float16": ("float16 operands", "float16 cache"),
    "bfloat16": ("bfloat16 operands", "bfloat16 cache"),
    "q8_0": ("q8_0 cache", "q8_0 operands"),
}
_TF32 = ("tf32", "truncated tf32")

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="auto", products=tuple(_MATMUL), attention=tuple(_ATTENTION),
                storage=tuple(STORAGE)),
        Profile(name="float32"),
        Profile(name="float16", attention=_HALF_CACHES["float16"],
                products=("float16 operands", "float16 inputs"), storage=("float32", "float16")),
        Profile(name="bfloat16", attention=_HALF_CACHES["bfloat16"],
                products=("bfloat16 operands", "bfloat16 inputs"), storage=("float32", "bfloat16")),
        Profile(name="tf32", products=_TF32, attention=_TF32),
        Profile(name="q8", products=("q8",)),
        Profile(name="q8_k", products=("q8_k",)),
        Profile(name="q8_0", products=("q8_0",)),
        Profile(name="q8_1", products=("q8_1",)),
    )
}  # fmt: skip
"""Profiles by the name that ``--aprt-arithmetic`` and engines give."""


def profile_named(text: str) -> Profile:
    """Return the profile ``NAME[,storage=DTYPE][,cache=DTYPE]``.

    Raises:
        SettingsError: a name is unknown; the message lists the known ones.
    """
    name, *parts = (part.strip().lower() for part in text.split(","))
    wrong = f"--aprt-arithmetic={text} is not valid: expected "
    if name not in PROFILES:
        raise SettingsError(wrong + f"one of {', '.join(PROFILES)}")
    profile = replace(PROFILES[name], name=text.strip().lower())
    for part in parts:
        key, _, value = part.partition("=")
        if key == "storage" and value in STORAGE:
            profile = replace(profile, storage=tuple(dict.fromkeys(("float32", value))))
        elif key == "cache" and value in _HALF_CACHES:
            profile = replace(profile, attention=_HALF_CACHES[value])
        else:
            raise SettingsError(
                wrong + f"storage= one of {', '.join(STORAGE)}, or cache= one of "
                f"{', '.join(_HALF_CACHES)}, after the profile's name"
            )
    return profile
