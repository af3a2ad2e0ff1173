"""Replicas whose processes find an emulated GPU in place of a real one.

Every child takes the emulator (`tests/loader/devices/emulator.py`) in the place of the driver's
bindings. Memory and addresses of its GPU are the host's, so torch computes over them on the CPU:
what is proven is that the processes agree on who maps, copies and waits for what, not how fast.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What only tests need is not imported in the processes that are emulated.
if TYPE_CHECKING:
    import pytest

__all__ = ["emulate", "install", "replays"]

_ROOT = str(Path(__file__).parents[2])
_MUTEX = 64
"""Bytes that are enough for one of libc's; as zeros it is free."""
_FROZEN = 8
"""Steps that a worker captures which is to be frozen."""


def emulate(patch: pytest.MonkeyPatch, **faults: Any) -> None:
    """Has all processes that are started from now on find an emulated GPU.

    Args:
        patch: Undoes it.
        faults: By role, `memory`, `worker` or `frozen` (one that is to be frozen, and its clones),
            what `install` is called with there.
    """
    from coldframe.runtime.frozen import freezing
    from coldframe.runtime.replica import launch
    from coldframe.runtime.start import early

    entries = (
        (early, "_MAIN", "memory"),
        (launch, "_WORKER", "worker"),
        (freezing, "FREEZE", "frozen"),
    )
    for module, name, role in entries:
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
    alike: bool = False,
    delay: float = 0.0,
    fail: tuple[str, int, str] | None = None,
    fail_too: tuple[str, int, str] | None = None,
    lose_at_copy: int | None = None,
    dies_at: tuple[str, int] | None = None,
    missing: Iterable[str] = (),
    slow_s: float = 0.0,
    context_bytes: int = 0,
    ledger: str | None = None,
    slow: tuple[str, float] | None = None,
    graphs: str | None = None,
    lose_at_capture: str | None = None,
    drivers: str | None = None,
    threads: int = 0,
    lose_at_replay: bool = False,
) -> None:
    """Puts emulated GPUs into this process.

    Args:
        memory: Bytes that each of them has.
        devices: How many there are.
        alike: Whether they are all of one kind.
        delay: See `Emulator`.
        fail: A call that fails: its name, the how many-th, and the driver's name for the error.
        fail_too: Another one.
        lose_at_copy: The how many-th copy is the end of the GPU.
        dies_at: A call under which the process ends, and the how many-th it is.
        missing: Calls that the driver lacks.
        slow_s: What a checkpoint of a context takes in seconds, and a restore.
        context_bytes: What each process's context takes of its GPU.
        ledger: See `Emulator`.
        slow: A call that takes so many seconds more.
        graphs: A directory: decode steps are captured, and what is replayed is counted there.
        lose_at_capture: A file that is not there: the capture that makes it is the end of the GPU.
        drivers: A directory, as `graphs`; what is captured are graphs of the driver.
        threads: How many the driver has of its own, from the first context on.
        lose_at_replay: Whether each replay is the end of the GPU: with `drivers` only of what was
            put together.
    """
    from coldframe.loader.devices.driver import Driver
    from coldframe.loader.devices.vmm import DeviceReservation
    from coldframe.loader.packages import add_site_packages

    add_site_packages()
    from tests.loader.devices.emulator import Emulator

    emulator = Emulator(
        memory,
        devices=devices,
        alike=alike,
        delay=delay,
        missing=missing,
        context_bytes=context_bytes,
        ledger=ledger,
    )
    emulator.dies_at, emulator.slow_s = dies_at, slow_s
    from coldframe.snapshot import cuda

    cuda.CONTEXT_BYTES = context_bytes  # which is known here
    for fault in (fail, fail_too):
        if fault is not None:
            emulator.fail(*fault)
    if lose_at_copy is not None:
        emulator.fail_copy(lose_at_copy)
    if slow is not None:
        _slow_down(emulator, *slow)
    # Not in the place of the bindings themselves: torch imports those, too.
    really_open = Driver.open
    Driver.open = lambda api=None: really_open(api or emulator)  # type: ignore[method-assign]
    # As DLPack calls the host's memory, which is what this GPU's is.
    DeviceReservation.dlpack_device = property(lambda self: (1, 0))  # type: ignore[assignment]
    if graphs is not None:
        _capture_steps(graphs, lose_at_capture, lose_at_replay)
    if drivers is not None:
        _capture_graphs(drivers, lose_at_replay)
    if threads:
        _start_threads(emulator, threads)


def _start_threads(emulator: Any, count: int) -> None:
    """Threads that Python knows nothing of. A checkpoint leaves them where they are."""
    import ctypes

    libc = ctypes.CDLL(None)
    really = emulator.cuDevicePrimaryCtxRetain
    started: list[Any] = []

    def retain(device: Any) -> Any:
        if not started:
            # Held for good by whoever has the context. To wait for it no signal interrupts.
            mutex = ctypes.create_string_buffer(_MUTEX)
            started.append(mutex)
            libc.pthread_mutex_lock(mutex)
            for _ in range(count):
                name = ctypes.c_ulong()
                code = libc.pthread_create(ctypes.byref(name), None, libc.pthread_mutex_lock, mutex)
                assert code == 0, os.strerror(code)
        return really(device)

    emulator.cuDevicePrimaryCtxRetain = retain


def _slow_down(emulator: Any, name: str, seconds: float) -> None:
    really = getattr(emulator, name)

    def call(*arguments: Any) -> Any:
        time.sleep(seconds)
        return really(*arguments)

    setattr(emulator, name, call)


def replays(graphs: Path) -> dict[int, int]:
    """How many steps each process has replayed, by its id."""
    return {int(file.name): file.stat().st_size for file in graphs.iterdir()}


def _lost() -> Exception:
    import torch

    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700
    return error


def _capture_steps(graphs: str, lose_at_capture: str | None, lose_at_replay: bool) -> None:
    """Has workers capture what ATen is asked for (`tests/runtime/engine/recording.py`)."""
    from coldframe.runtime.frozen import worker as frozen_worker
    from coldframe.runtime.worker.decode_steps import DecodeSteps

    really, really_warm = DecodeSteps.graphs, frozen_worker._warm

    def record() -> None:
        # Torch is there only now.
        from coldframe.runtime.graphs import graphing

        sys.path.insert(0, _ROOT)
        from tests.runtime.engine.recording import RecordingCapturer

        sys.path.remove(_ROOT)

        def replayed() -> None:
            with open(os.path.join(graphs, str(os.getpid())), "ab") as file:
                file.write(b".")
            if lose_at_replay:
                raise _lost()

        def capturing() -> None:
            if lose_at_capture is None:
                return
            try:
                os.close(os.open(lose_at_capture, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            raise _lost()

        capturer = RecordingCapturer(replayed=replayed, capturing=capturing)
        graphing.capturer_for = lambda *_: capturer  # type: ignore[assignment]

    def step_graphs(steps: DecodeSteps) -> Any:
        record()
        return really(steps)

    def warm(order: Any) -> Any:
        from coldframe.runtime.worker.lean_torch import import_torch

        import_torch()
        record()
        from coldframe.runtime.graphs import graphing

        # What was written down keeps all that a step makes: an image is to have few of them.
        few = functools.partial(graphing.StepGraphs, limit=_FROZEN)
        graphing.StepGraphs = few  # type: ignore[assignment,misc]
        return really_warm(order)

    DecodeSteps.graphs = step_graphs  # type: ignore[method-assign]
    frozen_worker._warm = warm


def _capture_graphs(counted: str, lose_at_replay: bool) -> None:
    """Has workers capture, and put together, graphs of the driver's.

    See `tests/runtime/engine/emulated_capture.py`.
    """
    from coldframe.runtime.worker.decode_steps import DecodeSteps

    really = DecodeSteps.graphs

    def step_graphs(steps: DecodeSteps) -> Any:
        # Torch is there only now.
        from coldframe.loader.devices import open_device
        from coldframe.loader.devices.graph_calls import GraphCalls
        from coldframe.runtime.graphs import graphing
        from coldframe.runtime.graphs import worker as graph_worker

        sys.path.insert(0, _ROOT)
        from tests.runtime.engine.emulated_capture import EmulatedCapturer, launch

        sys.path.remove(_ROOT)

        def count(kind: bytes) -> None:
            with open(os.path.join(counted, str(os.getpid())), "ab") as file:
                file.write(kind)

        def launcher(_: Any, driver: Any) -> Any:
            def run(made: Any) -> None:
                count(b"r")
                if lose_at_replay:
                    raise _lost()
                launch(GraphCalls(driver), made)

            return run

        gpu: Any = open_device(steps.worker.device)
        capturer = EmulatedCapturer(gpu, lambda: count(b"c"))
        graphing.capturer_for = lambda *_: capturer  # type: ignore[assignment]
        graph_worker.launcher_for = launcher
        return really(steps)

    DecodeSteps.graphs = step_graphs  # type: ignore[method-assign]
