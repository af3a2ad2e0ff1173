"""How the emulated driver says no."""

from __future__ import annotations


class Refused(Exception):
    """A call's error, by the driver's name for it."""


def require(condition: bool) -> None:
    """What the documentation demands of arguments."""
    if not condition:
        raise Refused("CUDA_ERROR_INVALID_VALUE")
