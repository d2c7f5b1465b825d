"""Makes pytest's own plugin-testing fixture known to the tests."""

import numpy  # noqa: F401 - numpy cannot be loaded twice in a process by inner pytest runs

pytest_plugins = ["pytester"]
