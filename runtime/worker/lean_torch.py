"""torch imported without what only its compiler and numpy's users need.

Two things that a worker never uses cost a quarter of the import and an eighth of what it dirties:
the shape functions of two thousand operators (`torch._meta_registrations`, for tracing with fake
tensors), and numpy, which torch does without where it is not installed. In such a process tensors
do not become arrays, and whoever wants to trace imports `torch._meta_registrations` before that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings

__all__ = ["import_torch"]

_META = "torch._meta_registrations"
_KNOWN = ("2.11.", "2.12.", "2.13.")
"""Versions of torch that were seen to need nothing of it; any other is imported as it is."""


def import_torch() -> None:
    """Imports torch; another `import torch` finds it there."""
    if "torch" in sys.modules or not _version().startswith(_KNOWN):
        importlib.import_module("torch")
        return
    left_out: dict[str, types.ModuleType | None] = {_META: types.ModuleType(_META)}
    if "numpy" not in sys.modules:
        left_out["numpy"] = None  # says that there is none
    sys.modules.update(left_out)  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
            importlib.import_module("torch")
    finally:
        for name in left_out:
            sys.modules.pop(name, None)


def _version() -> str:
    """torch's version, without importing it or anything slow."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    with open(os.path.join(os.path.dirname(spec.origin), "version.py")) as file:
        for line in file:
            if line.startswith("__version__"):
                return line.split("'")[1] if "'" in line else line.split('"')[1]
    return ""
