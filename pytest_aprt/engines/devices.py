"""Where an engine may run, as torch names it."""

from __future__ import annotations

from pytest_aprt.errors import SettingsError


def require_device(name: str) -> None:
    """Make sure that a device is there; imports torch for any but the CPU.

    Raises:
        SettingsError: torch knows no such device, or none is there.
    """
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ["cpu", *(f"cuda:{index}" for index in range(count))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise SettingsError(
            f"--aprt-device={name}: torch {torch.__version__} cannot use it ({said:.120}); here "
            f"are {', '.join(here)}"
        ) from error
