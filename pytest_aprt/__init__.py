"""Forward-pass parity bisection for language models, as a pytest plugin."""

from pytest_aprt.contracts.bindings import falsifier as falsifier

__version__ = "0.1.0"
