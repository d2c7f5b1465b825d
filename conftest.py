"""Makes pytest's own plugin-testing fixture known to the tests."""

import numpy  # noqa: F401 - numpy cannot be loaded twice in a process by inner pytest runs
import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Keep torch from competing with other workers for the same cores."""
    import torch

    torch.set_num_threads(1)
