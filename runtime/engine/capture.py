"""What captures a step, so that it can be done again without asking for each of its kernels.

On a GPU that is a CUDA graph: torch queues the step's kernels, and instead of running them the
driver writes them down. Everything that a graph touches must stay where it is, so what the step
computes in comes from a range of the worker's own (`loader/devices/scratch.py`), by way of an
allocator that torch is given for this alone. Where this torch takes no such allocator the memory is
its own: the graphs are as good, but nothing of them holds in another process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from coldframe.loader.devices.scratch import Scratch
from coldframe.loader.errors import ColdframeError, DeviceError
from coldframe.runtime.engine.torch_memory import TorchMemory
from coldframe.runtime.worker.tensors import tensor_over

__all__ = ["Captured", "Capturer", "CudaCapturer", "Replay"]


class Replay(Protocol):
    """A step that can be done again."""

    def replay(self) -> None:
        """Queues all of it on the device's current stream, over the same memory as before."""
        ...

    def close(self) -> None:
        """Gives it up; it may not be under way."""
        ...


class Captured(Replay, Protocol):
    """One that was captured here."""

    @property
    def handle(self) -> int | None:
        """The driver's name for it (CUgraph), where it has one."""
        ...


class Capturer(Protocol):
    """Makes steps that can be done again."""

    @property
    def scratch(self) -> tuple[int, int] | None:
        """Address and length of the memory that steps know of beside weights and KV.

        None where it is not in one place, or not in the same one in every process.
        """
        ...

    @property
    def own_bytes(self) -> int:
        """What it has got of the device for steps, besides what torch counts as its own."""
        ...

    @property
    def note(self) -> str:
        """What there is to say of it; nothing, where all is as it should be."""
        ...

    def place(self, nbytes: int) -> Tensor:
        """Memory that stays where it is: `[nbytes]` uint8. All of it before the first capture.

        Raises:
            DeviceError: There is none.
        """
        ...

    def reach(self, nbytes: int) -> None:
        """Has memory behind the first `nbytes` of `scratch`, for steps that were made elsewhere.

        Raises:
            DeviceError: There is none, or no scratch in one place.
        """
        ...

    def capture(self, work: Callable[[], object]) -> Captured:
        """Writes a step down.

        Args:
            work: Does the step. It was run before, in the same form, so that nothing in it happens
                for the first time. What it writes may or may not be written by this.

        Raises:
            Exception: Whatever `work` raises, and what torch says where it cannot be captured.
        """
        ...

    def drop(self) -> None:
        """Gives up the memory that steps compute in, all of which are closed by now."""
        ...


class CudaCapturer:
    """Captures on a GPU.

    Nothing is asked of torch or the driver before the first `place` or `capture`.

    Args:
        device: Which GPU.
        scratch: Makes the worker's own memory.
    """

    def __init__(self, device: torch.device, scratch: Callable[[], Scratch]) -> None:
        self._device = device
        self._make_scratch = scratch
        self._opened = False
        self._scratch: Scratch | None = None
        self._memory: TorchMemory | None = None
        self._pool: Any = None
        self._spoilt: list[Any] = []
        """Captures that failed, and their pools. Torch counts a pool as such a capture's for good,
        and ends the process where it is given up; and its allocators may go on asking the capture
        which streams are its own."""
        self._stream: Any = None
        self._why = ""

    @property
    def scratch(self) -> tuple[int, int] | None:
        if self._scratch is None or self._memory is None or not self._scratch.fixed:
            return None
        return self._scratch.address, self._scratch.used

    @property
    def own_bytes(self) -> int:
        return 0 if self._scratch is None else self._scratch.grown

    @property
    def note(self) -> str:
        return self._why

    def place(self, nbytes: int) -> Tensor:
        self._open()
        if self._scratch is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        address = self._scratch.take(nbytes)
        self._scratch.fix()
        return tensor_over(address, nbytes, self._scratch.dlpack_device)

    def reach(self, nbytes: int) -> None:
        self._open()
        if self._scratch is None or not self._scratch.fixed:
            raise DeviceError(
                "steps that were captured elsewhere have no memory here",
                where=str(self._device),
                got=self._why,
            )
        self._scratch.reach(nbytes)

    def capture(self, work: Callable[[], object]) -> Captured:
        self._open()
        if self._stream is None:
            # Made for captures alone: what the libraries keep for a stream is then the graphs' own.
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = self._make_pool()
            if self._memory is not None:
                self._memory.stock(self._pool, self._device, self._stream)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _no_collection(), torch.cuda.stream(self._stream):
            # Other threads of this process map memory and make events meanwhile, and may.
            try:
                graph.capture_begin(pool=self._id(), capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        graph.instantiate()
        return _CudaGraph(graph)

    def drop(self) -> None:
        if self._pool is None:
            return
        torch.cuda.synchronize(self._device)
        # They keep a workspace for the stream that is gone, in the pool that is to go.
        self._clear_workspaces()
        self._pool = self._stream = None

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        try:
            self._memory = TorchMemory()
            self._scratch = self._make_scratch()
        except ColdframeError as error:
            self._memory = None
            self._why = f"its memory is torch's own: {error.what}, {error.got}"
            return
        self._memory.use(self._scratch)
        if not self._scratch.fixed:
            self._why = "its memory lies elsewhere than in other processes"
        # Whatever the libraries keep for a stream of captures is to be made within one.
        self._clear_workspaces()

    def _make_pool(self) -> Any:
        if self._memory is None:
            return torch.cuda.graph_pool_handle()
        return self._memory.pool()

    def _id(self) -> Any:
        return getattr(self._pool, "id", self._pool)

    def _clear_workspaces(self) -> None:
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()

    def _abandon(self, graph: Any) -> None:
        """Ends a capture that has failed, and what it may have left unfit for the next one."""
        with suppress(Exception):
            graph.capture_end()
        # Where the driver had given the capture up already, torch stops above before this, and
        # would look for the capture at each allocation from now on.
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._id())
        self._spoilt += [graph, self._pool]
        self._pool = self._stream = None


class _CudaGraph:
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    @property
    def handle(self) -> int | None:
        return int(self._graph.raw_cuda_graph())

    def replay(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        # Recent torch clears the workspaces that cuBLAS has for the stream of captures with this.
        # Nothing else uses them by then, as steps come one after the other and the pool keeps the
        # memory; but what is captured later has others. So archives are taken before.
        self._graph.reset()


@contextmanager
def _no_collection() -> Iterator[None]:
    """What Python would collect meanwhile may ask the driver for what a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
