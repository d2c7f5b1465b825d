"""Forward-pass parity bisection for language models, as a pytest plugin."""

from typing import TYPE_CHECKING, Any

from pytest_aprt.contracts.bindings import falsifier as falsifier

if TYPE_CHECKING:
    from pytest_aprt.modules import from_module as from_module

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what few runs use; pytest imports this module in all of them."""
    if name == "from_module":
        from pytest_aprt.modules import from_module

        return from_module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
