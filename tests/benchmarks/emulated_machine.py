"""A machine whose GPU is emulated in every process, as `make gpu` and `tests/gpu` find it.

Processes of a replica are told by `tests.runtime.emulated.emulate`. All others that these start
themselves take the emulator when they start, by a `sitecustomize` on their path.
"""

from __future__ import annotations

import os
from pathlib import Path

from coldframe.snapshot.gpus import FOLDER
from tests.snapshot.nvidia import kernel_says

__all__ = ["HERE", "environment"]

ROOT = Path(__file__).parent.parent.parent

HERE = """
import sys
import pytest
import emulated_site
emulated_site.take()
emulated_site.tell()
sys.exit(pytest.main(sys.argv[1:]))
"""
"""A process that runs tests with the emulator for its GPU, as all that it starts do."""

_TAKEN = """
import os

_all = {
    "memory": 4 << 30,
    "ledger": os.environ["EMULATED_LEDGER"],
    "context_bytes": 64 << 20,
}


def take():
    from tests.runtime.emulated import install

    install(**_all)


def tell():
    # To processes of replicas that this one starts.
    from tests.runtime.emulated import emulate

    class Patch:
        setattr = staticmethod(setattr)

    counted = os.environ["EMULATED_GRAPHS"]
    worker = {**_all, "drivers": counted}
    emulate(Patch(), memory=_all, worker=worker, frozen={**_all, "graphs": counted})


def record():
    from coldframe.runtime.graphs import graphing
    from tests.runtime.engine.recording import RecordingCapturer

    graphing.capturer_for = lambda *_: RecordingCapturer()
"""

_SITE = """
import sys

said = " ".join(sys.orig_argv)
command = "bin/coldframe" in said or "coldframe.runtime.cli" in said
if command or "coldframe.benchmarks.gpu" in said or "coldframe.loader.devices" in said:
    import emulated_site

    emulated_site.take()
    if command or "gpu.part" in said:
        emulated_site.tell()
    if "gpu.engine" in said:
        emulated_site.record()
"""


def environment(folder: Path) -> dict[str, str]:
    """What processes on such a machine find in their environment.

    Args:
        folder: An empty one of the test's own.
    """
    site = folder / "site"
    for made in (site, folder / "graphs", folder / "ledger"):
        made.mkdir()
    (site / "emulated_site.py").write_text(_TAKEN)
    (site / "sitecustomize.py").write_text(_SITE)
    return {
        **os.environ,
        "PYTHONPATH": f"{site}:{ROOT}",
        "COLDFRAME_TEST_DEVICE": "cuda:0",
        "COLDFRAME_TEST_BESIDE": "cpu",
        "EMULATED_GRAPHS": str(folder / "graphs"),
        "EMULATED_LEDGER": str(folder / "ledger"),
        FOLDER: str(kernel_says(folder / "nvidia")),
    }
