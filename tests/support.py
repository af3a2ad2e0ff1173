"""What tests of every package use."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """This machine lacks what the test needs: a skip, but in CI, where nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def without_settings() -> dict[str, str]:
    """This process's environment without what coldframe is told by it, but for the device."""
    return {
        name: value
        for name, value in os.environ.items()
        if "COLDFRAME" not in name or name == "COLDFRAME_DEVICE"
    }
