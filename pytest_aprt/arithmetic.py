"""How engines round, and so what local error is normal: tables, and the profiles made of them.

An *arithmetic* says how one stage is computed; a *profile* is what an engine as a whole may do,
so it offers some arithmetics to every kind of stage. Data only: ``rounding`` has the functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

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


_EXACT = ("none", "float32")

_LEFT = {
    # field of Arithmetic, and its value: what remains of a product's error when it is emulated
    ("inputs", "q8_1"): 1e-3,  # a float16 sum of a block's inputs meets the minimum of its weights
    # llama.cpp's flash attention leaves at most 2.8e-4 (three families, 7 tokens), and from 64
    # tokens on, where its sums are in float32, 2e-6.
    ("sums", "float16"): 1e-3,
    # Tensor cores cut their sums: 8e-6 to 1.1e-5 of whole products are left on an H200.
    **{(field, how): 1e-4 for field in ("inputs", "queries") for how in ("tf32", "tf32_cut")},
}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How stages are computed: the roundings of products' operands, and what results are kept in.

    ``inputs`` and ``weights`` are the operands of a projection, ``queries`` (Q, or the
    probabilities) and ``cache`` (K, or V) those of attention; each is a name in ``rounding``.
    ``inputs`` may be ``ggml``: whatever llama.cpp's CPU kernels do for the weight's type. ``sums``
    are those over V, which flash attention keeps in float16 for short prompts.
    """

    name: str
    inputs: str = "none"
    weights: str = "none"
    queries: str = "none"
    cache: str = "none"
    sums: str = "none"
    storage: str = "float32"

    @property
    def tolerance(self) -> Tolerance:
        """What local error the arithmetic leaves once the replay has emulated it."""
        tolerance = STORAGE[self.storage]
        left = [bound for (field, how), bound in _LEFT.items() if getattr(self, field) == how]
        return replace(tolerance, base=max([tolerance.base, *left]))

    @property
    def roundings(self) -> frozenset[tuple[str, str]]:
        """What is rounded, and how; empty where nothing is."""
        values = ((f.name, str(getattr(self, f.name))) for f in fields(self) if f.name != "name")
        return frozenset((name, value) for name, value in values if value not in _EXACT)

    def stored(self, storage: str) -> Arithmetic:
        """Return the same with its result kept in another dtype."""
        if storage == self.storage:
            return self
        name = storage if self.name == "float32" else f"{self.name}, stored as {storage}"
        return replace(self, name=name, storage=storage)

    def __add__(self, other: Arithmetic) -> Arithmetic:
        """Return this one for projections and the other for attention."""
        name = f"{self.name} and {other.name}"
        return replace(self, name=name, queries=other.queries, cache=other.cache, sums=other.sums)


EXACT = Arithmetic(name="float32")


def _named(*rows: Arithmetic) -> dict[str, Arithmetic]:
    return {row.name: row for row in rows}


_PROJECTIONS = _named(
    Arithmetic(name="q8", inputs="ggml"),
    Arithmetic(name="q8_k", inputs="q8_k"),
    Arithmetic(name="q8_0", inputs="q8_0"),
    Arithmetic(name="q8_1", inputs="q8_1"),
    Arithmetic(name="float16 operands", inputs="float16", weights="float16"),
    Arithmetic(name="float16 inputs", inputs="float16"),
    Arithmetic(name="float16 weights", weights="float16"),
    Arithmetic(name="bfloat16 operands", inputs="bfloat16", weights="bfloat16"),
    Arithmetic(name="bfloat16 inputs", inputs="bfloat16"),
    Arithmetic(name="bfloat16 weights", weights="bfloat16"),
    Arithmetic(name="tf32", inputs="tf32", weights="tf32"),
    Arithmetic(name="truncated tf32", inputs="tf32_cut", weights="tf32_cut"),
)
_ATTENTION = _named(
    Arithmetic(name="float16 attention", queries="float16", cache="float16"),
    Arithmetic(name="float16 cache", cache="float16"),
    Arithmetic(name="float16 sums", queries="float16", cache="float16", sums="float16"),
    Arithmetic(name="bfloat16 attention", queries="bfloat16", cache="bfloat16"),
    Arithmetic(name="bfloat16 cache", cache="bfloat16"),
    Arithmetic(name="q8_0 attention", queries="q8_0", cache="q8_0"),
    Arithmetic(name="q8_0 cache", cache="q8_0"),
    Arithmetic(name="tf32 attention", queries="tf32", cache="tf32"),
    Arithmetic(name="truncated tf32 attention", queries="tf32_cut", cache="tf32_cut"),
)

GGML_INPUTS = {
    # weight type: what llama.cpp's CPU kernels round a matmul's inputs to (vec_dot_type)
    "F32": "none",
    "F16": "float16",
    "BF16": "bfloat16",
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "q8_1 sums"),
    **dict.fromkeys(
        ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
         "IQ3_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"), "q8_k"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What an engine may do: arithmetics of projections and of attention, dtypes of activations."""

    name: str
    projections: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()

    def arithmetics(self, kinds: Iterable[str]) -> list[Arithmetic]:
        """Return what may have computed a result that stages of these kinds lie behind.

        The exact one comes first: an engine may always be more precise than it says.
        """
        of_kind = {"matmul": "projections", "scores": "attention", "mix": "attention"}
        found = {of_kind[kind] for kind in kinds if kind in of_kind}
        projections = [_PROJECTIONS[n] for n in self.projections if "projections" in found]
        attention = [_ATTENTION[n] for n in self.attention if "attention" in found]
        both = [p + a for p in projections for a in attention if (p.name, a.name) in _MIXED]
        own = [EXACT, *projections, *attention, *both]
        return [a.stored(s) for s in ("float32", *self.storage) for a in own]


_EIGHT_BIT = ("q8", "q8_k", "q8_0", "q8_1")
_CACHES = {
    "float32": (),
    "float16": ("float16 attention", "float16 cache"),
    "bfloat16": ("bfloat16 attention", "bfloat16 cache"),
    "q8_0": ("q8_0 attention", "q8_0 cache"),
    "flash": ("float16 attention", "float16 cache", "float16 sums"),
}
_TF32 = ("tf32", "truncated tf32")
_MIXED = {
    # met together where the stages between them are missing
    *((p, a) for p in _EIGHT_BIT for cache in ("flash", "q8_0") for a in _CACHES[cache]),
    *((name, f"{name} attention") for name in _TF32),
    *((f"{name} operands", f"{name} attention") for name in ("float16", "bfloat16")),
}

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="auto", projections=tuple(_PROJECTIONS), storage=("bfloat16", "float16"),
                # what is looser than all others must be declared
                attention=tuple(n for n, a in _ATTENTION.items() if a.sums == "none")),
        Profile(name="float32"),
        Profile(name="float16", attention=_CACHES["float16"], storage=("float16",),
                projections=("float16 operands", "float16 inputs", "float16 weights")),
        Profile(name="bfloat16", attention=_CACHES["bfloat16"], storage=("bfloat16",),
                projections=("bfloat16 operands", "bfloat16 inputs", "bfloat16 weights")),
        Profile(name="tf32", projections=_TF32, attention=tuple(f"{n} attention" for n in _TF32)),
        *(Profile(name=name, projections=(name,)) for name in _EIGHT_BIT),
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
            profile = replace(profile, storage=() if value == "float32" else (value,))
        elif key == "cache" and value in _CACHES:
            profile = replace(profile, attention=_CACHES[value])
        else:
            raise SettingsError(
                wrong + f"storage= one of {', '.join(STORAGE)}, or cache= one of "
                f"{', '.join(_CACHES)}, after the profile's name"
            )
    return profile
