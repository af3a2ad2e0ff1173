"""Copies KV from the arena into vLLM's cache: a thread, layer by layer, while the engine goes on.

Tokens are written slot by slot, never whole blocks: in a step that has begun its own tokens are in
the cache before the copy of their layer is waited for. On a GPU the copies are queued on a stream
of their own, behind what the engine had queued before; who waits for a layer lets the engine's
stream wait, not itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coldframe.loader.timeline import now
from coldframe.runtime.integrations.vllm.kv_pages import KvPages, checksum
from coldframe.runtime.integrations.vllm.kv_step import Load
from coldframe.runtime.integrations.vllm.kv_tally import KvTally, Loaded
from coldframe.runtime.integrations.vllm.kv_thread import LateThread

__all__ = ["KvCopier", "Layer", "LoadJob"]

_STUCK_S = 60.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of vLLM's that has KV.

    Args:
        name: vLLM's.
        index: Its number in the model.
        cache: Its part of vLLM's cache.
        write: Stores k and v, each `[T, kv_heads, head_dim]`, in a cache at slots `[T]` int64.
    """

    name: str
    index: int
    cache: Tensor
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(eq=False, slots=True)
class LoadJob:
    """Loads that are copied together, and how far that is."""

    loads: Sequence[Load]
    layers: Mapping[str, threading.Event]
    begun: Any = None
    """On a GPU, an event of the engine's stream: what was queued before comes first."""
    events: dict[str, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    failed: dict[str, str] = field(default_factory=dict)


class KvCopier:
    """The thread.

    Args:
        pages: Makes the arena's tensors, when there is something to copy for the first time.
        layers: vLLM's.
        heads: The KV heads that this rank has.
        tally: Counts.
    """

    def __init__(
        self,
        pages: Callable[[], KvPages],
        layers: Sequence[Layer],
        heads: slice,
        tally: KvTally,
    ) -> None:
        self._pages = pages
        self._layers = layers
        self._heads = heads
        self._tally = tally
        device = layers[0].cache.device
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._any_done = threading.Event()
        self._thread = LateThread(self._run, "kv-copier")

    def close(self) -> None:
        """Ends the thread, after what it was given."""
        self._jobs.put(None)
        self._thread.join(5.0)

    def begin(self, loads: Sequence[Load]) -> LoadJob:
        """Has something copied; call it from the thread that computes."""
        job = LoadJob(loads, {layer.name: threading.Event() for layer in self._layers})
        if self._stream is not None:
            job.begun = torch.cuda.current_stream(self._device).record_event()
        self._thread.start()
        self._jobs.put(job)
        return job

    def wait_layer(self, job: LoadJob, name: str) -> None:
        """Waits until a layer's KV is in, or will be before what the engine queues next."""
        event = job.layers.get(name)
        if event is None:
            return
        if not event.wait(_STUCK_S):
            raise TimeoutError(f"no KV of {name} within {_STUCK_S:g} s")
        if self._stream is not None and name in job.events:
            torch.cuda.current_stream(self._device).wait_event(job.events[name])

    def wait_any(self, timeout_s: float) -> None:
        """Waits until a job is done."""
        self._any_done.wait(timeout_s)
        self._any_done.clear()

    def _run(self) -> None:
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                started = now()
                try:
                    if self._stream is None:
                        self._copy(job, started)
                    else:
                        with torch.cuda.stream(self._stream):
                            self._stream.wait_event(job.begun)
                            self._copy(job, started)
                except Exception as error:  # noqa: BLE001 - vLLM computes what did not come
                    for load in job.loads:
                        job.failed.setdefault(load.request, repr(error))
                finally:
                    for event in job.layers.values():
                        event.set()
                    job.done.set()
                    self._any_done.set()

    def _copy(self, job: LoadJob, started: int) -> None:
        for load in job.loads:
            if load.lost is not None:
                job.failed[load.request] = load.lost
        loads = [load for load in job.loads if load.lost is None]
        if not loads:
            return
        pages = self._pages()
        where = [load.slots() for load in loads]
        rows = torch.cat(
            [
                pages.rows(load.blocks, load.start, load.end)[positions - load.start]
                for load, (positions, _) in zip(loads, where, strict=True)
            ]
        )
        slots = torch.cat([slots for _, slots in where]).to(self._device)
        for layer in self._layers:
            k, v = pages.read(layer.index, rows, self._heads)
            self._verify(job, loads, layer.index, pages)
            k, v = (part.to(self._device, non_blocking=True) for part in (k, v))
            layer.write(k, v, layer.cache, slots)
            if self._stream is not None:
                job.events[layer.name] = self._stream.record_event()
            job.layers[layer.name].set()
        if self._stream is not None:
            # Before it is said to be done: then the arena's blocks may be somebody else's.
            self._stream.synchronize()
        nbytes = pages.token_bytes // pages.layers * len(self._layers)
        for load, (positions, _) in zip(loads, where, strict=True):
            if load.request not in job.failed:
                tokens = len(positions)
                self._tally.loaded(Loaded(load.name, tokens, tokens * nbytes, started, now()))

    def _verify(self, job: LoadJob, loads: Sequence[Load], layer: int, pages: KvPages) -> None:
        """Notes which loads are not what their maker has written, where it says what that was."""
        for load in loads:
            if load.checksums and load.request not in job.failed:
                rows = pages.rows(load.blocks, 0, load.end)
                found = checksum(*pages.read(layer, rows, slice(0, pages.heads)))
                if found != load.checksums[layer]:
                    job.failed[load.request] = f"the KV of layer {layer} is not what was written"
