"""What a decode worker keeps of its captured steps: looked up at its start, launched, sent away."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.devices import open_device
from coldframe.loader.devices.graph_calls import Executable, GraphCalls
from coldframe.loader.errors import ColdframeError
from coldframe.loader.timeline import now
from coldframe.runtime.graphs.archive import KeptSteps, Launch
from coldframe.runtime.graphs.lookup import Shelved, look_up
from coldframe.snapshot.machine import coldframe_build

if TYPE_CHECKING:
    from coldframe.loader.devices.context import Context
    from coldframe.loader.devices.driver import Driver
    from coldframe.loader.wire import Channel
    from coldframe.runtime.engine.graphs import StepGraphs
    from coldframe.runtime.worker.worker import Worker

__all__ = ["kept_steps", "launcher_for", "shelved_steps"]


def shelved_steps(worker: Worker, root: str) -> Shelved | None:
    """What is kept of a worker's steps; to be read as whoever may read it.

    Args:
        worker: One that is to decode on a GPU, and is attached.
        root: The folder where archives are.

    Returns:
        None where nothing can be kept, for the reason in the worker's spans.
    """
    started = now()
    try:
        assert worker.client.weights is not None
        places = (worker.client.weights.address, worker.kv.reservation.address)
        if places != (WEIGHTS_BASE, KV_BASE):
            why = "weights and KV lie elsewhere than in other processes"
            worker.recorder.add("graph_restore", started, note=f"none: {why}")
            return None
        plan = worker.plan
        model = (
            f"{plan.fingerprint} {plan.layout} {plan.arena_bytes} {worker.spec.dtype} "
            f"{worker.kv.block_bytes} {coldframe_build()}"
        )
        return look_up(root, _context(worker.device), model)
    except ColdframeError as error:
        worker.recorder.add("graph_restore", started, note=f"none: {error}")
        return None


def kept_steps(graphs: StepGraphs, shelved: Shelved, worker: Worker) -> KeptSteps:
    """A worker's steps, with what is kept of them from one start to the next.

    Args:
        graphs: The steps.
        shelved: What there is of them.
        worker: Whose they are.
    """
    context = _context(worker.device)
    return KeptSteps(
        graphs,
        shelved,
        context,
        launcher_for(worker.model.device, context.driver),
        lambda name, raw: _send(worker.control, name, raw),
        worker.recorder,
    )


def launcher_for(where: torch.device, driver: Driver) -> Launch:
    """What runs a graph behind all that torch has queued on a device.

    Args:
        where: The device, as torch calls it.
        driver: Whose the graph is.
    """
    calls = GraphCalls(driver)

    def launch(executable: Executable) -> None:
        stream = torch.cuda.current_stream(where).cuda_stream
        calls.launch(executable, driver.api.CUstream(stream))

    return launch


def _send(control: Channel, name: str, raw: bytes) -> None:
    fd = _in_memory(raw)
    try:
        control.send({"type": "graphs", "name": name}, [fd])
    finally:
        os.close(fd)


def _context(device: str) -> Context:
    from coldframe.loader.devices.cuda import CudaDevice

    gpu = open_device(device)
    assert isinstance(gpu, CudaDevice)
    return gpu.context


def _in_memory(raw: bytes) -> int:
    """A descriptor of a file with these bytes, for a message; the caller's to close."""
    fd = os.memfd_create("graphs", os.MFD_CLOEXEC)
    try:
        left = memoryview(raw)
        while left:
            left = left[os.write(fd, left) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
