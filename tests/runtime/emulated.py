"""Replicas whose processes find an emulated GPU in place of a real one.

Every child takes the emulator (`tests/loader/devices/emulator.py`) in the place of the driver's
bindings. Memory and addresses of its GPU are the host's, so torch computes over them on the CPU:
what is proven is that the processes agree on who maps, copies and waits for what, not how fast.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What only tests need is not imported in the processes that are emulated.
if TYPE_CHECKING:
    import pytest

__all__ = ["emulate", "install", "replays"]

_ROOT = str(Path(__file__).parents[2])


def emulate(patch: pytest.MonkeyPatch, **faults: Any) -> None:
    """Has all processes that are started from now on find an emulated GPU.

    Args:
        patch: Undoes it.
        faults: By role, `memory` or `worker`, what `install` is called with there.
    """
    from coldframe.runtime import early, launch

    for module, name, role in ((early, "_MAIN", "memory"), (launch, "_WORKER", "worker")):
        entry = getattr(module, name)
        order = faults.get(role, {})
        code = (
            f"import sys; sys.path.insert(0, {_ROOT!r})\n"
            f"from tests.runtime.emulated import install; install(**{order!r})\n"
            f"sys.path.remove({_ROOT!r})\n"
            f"{entry}"
        )
        patch.setattr(module, name, f"exec({code!r})")


def install(
    *,
    memory: int = 1 << 30,
    devices: int = 1,
    delay: float = 0.0,
    fail: tuple[str, int, str] | None = None,
    lose_at_copy: int | None = None,
    graphs: str | None = None,
    lose_at_capture: str | None = None,
) -> None:
    """Puts emulated GPUs into this process.

    Args:
        memory: Bytes that each of them has.
        devices: How many there are.
        delay: See `Emulator`.
        fail: A call that fails: its name, the how many-th, and the driver's name for the error.
        lose_at_copy: The how many-th copy is the end of the GPU.
        graphs: A directory: decode steps are captured, and what is replayed is counted there.
        lose_at_capture: A file that is not there: the capture that makes it is the end of the GPU.
    """
    from coldframe.loader.devices.driver import Driver
    from coldframe.loader.devices.vmm import DeviceReservation
    from coldframe.loader.packages import add_site_packages

    add_site_packages()
    from tests.loader.devices.emulator import Emulator

    emulator = Emulator(memory, devices=devices, delay=delay)
    if fail is not None:
        emulator.fail(*fail)
    if lose_at_copy is not None:
        emulator.fail_copy(lose_at_copy)
    # Not in the place of the bindings themselves: torch imports those, too.
    really_open = Driver.open
    Driver.open = lambda api=None: really_open(api or emulator)  # type: ignore[method-assign]
    # As DLPack calls the host's memory, which is what this GPU's is.
    DeviceReservation.dlpack_device = property(lambda self: (1, 0))  # type: ignore[assignment]
    if graphs is not None:
        _capture_steps(graphs, lose_at_capture)


def replays(graphs: Path) -> dict[int, int]:
    """How many steps each process has replayed, by its id."""
    return {int(file.name): file.stat().st_size for file in graphs.iterdir()}


def _capture_steps(graphs: str, lose_at_capture: str | None) -> None:
    """Has workers capture what ATen is asked for (`tests/runtime/engine/recording.py`)."""
    from coldframe.runtime.worker import Worker

    really = Worker.step_graphs

    def step_graphs(worker: Worker) -> Any:
        # Torch is there only now.
        from coldframe.runtime import graphing

        sys.path.insert(0, _ROOT)
        from tests.runtime.engine.recording import RecordingCapturer

        sys.path.remove(_ROOT)

        def replayed() -> None:
            with open(os.path.join(graphs, str(os.getpid())), "ab") as file:
                file.write(b".")

        def capturing() -> None:
            if lose_at_capture is None:
                return
            try:
                os.close(os.open(lose_at_capture, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            import torch

            error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            error.error_code = 700
            raise error

        capturer = RecordingCapturer(replayed=replayed, capturing=capturing)
        graphing.capturer_for = lambda *_: capturer  # type: ignore[assignment]
        return really(worker)

    Worker.step_graphs = step_graphs  # type: ignore[method-assign]
