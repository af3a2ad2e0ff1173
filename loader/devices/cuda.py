"""A GPU as a device: weights and KV in its memory, shared between processes by descriptor.

Nothing of CUDA is loaded before it is needed: the driver's start and the context take as long as
reading the first stages, so that is done beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.extents import Extent
from coldframe.loader.checkpoints.plan import Layout
from coldframe.loader.devices.base import Arena, Arrived, DeviceReport
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.device_placer import DevicePlacer, buffer_bytes
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.parked import ParkedWeights, Stretch
from coldframe.loader.devices.ring import Ring
from coldframe.loader.devices.scratch import Scratch
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceFull
from coldframe.loader.sources.base import Source

__all__ = ["CudaDevice"]

_SPARE = 4
"""Buffers beside one for each reader, that are copied from meanwhile."""
_AHEAD = 1 << 30
"""Bytes that are read before the device is up, at most. Host memory that is never filled costs
nothing, and buffers that were used last are used first."""
_AHEAD_SHARE = 8
"""Of the host's memory that is available, such a part at most."""


class CudaDevice:
    """One GPU.

    Args:
        ordinal: Which, of those that this process sees.
        api: See `Driver`; None takes the bindings.
    """

    layout = Layout.ALIGNED

    def __init__(self, ordinal: int = 0, api: Any = None) -> None:
        self.name = f"cuda:{ordinal}"
        self._ordinal = ordinal
        self._api = api
        self._opening = threading.Lock()
        self._context: Context | None = None
        self._starting: list[threading.Thread] = []

    @property
    def context(self) -> Context:
        """The GPU's context; made by whoever asks first, while the others wait.

        Raises:
            NoDevice: There is no such GPU, no driver or no bindings.
            DeviceError: The driver is too old, or no context can be made.
        """
        with self._opening:
            if self._context is None:
                self._context = Context(Driver.open(self._api), self._ordinal)
            return self._context

    def start(self, done: Callable[[], None] = lambda: None) -> bool:
        def come_up() -> None:
            with suppress(ColdframeError):  # whoever uses it is told
                _ = self.context
            done()

        thread = threading.Thread(target=come_up, name="cuda-context", daemon=True)
        self._starting.append(thread)
        thread.start()
        return False

    def available(self) -> int:
        return self.context.available()

    def report(self) -> DeviceReport:
        context = self.context
        free, total = context.memory()
        return DeviceReport(context.driver.device_name(self._ordinal), total, free)

    def arena(self, purpose: str, nbytes: int, base: int | None = None, *, now: bool) -> Arena:
        """See `Device.arena`. What is not filled at once has no memory until it grows."""
        context = self.context
        left = context.available()
        if now and nbytes > left:
            raise DeviceFull(
                f"not enough memory for the {purpose}",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=f"{left:,} bytes available",
                hint="Free memory of the GPU (nvidia-smi) or take a smaller model.",
            )
        arena = DeviceArena(context, nbytes, base, writable=not now)
        if now:
            try:
                arena.grow(arena.size)
            except BaseException:
                arena.close()
                raise
        return arena

    def mapping(
        self, size: int, base: int | None = None, *, exact: bool = False
    ) -> DeviceReservation:
        return DeviceReservation(self.context, size, base, exact=exact)

    def scratch(self) -> Scratch:
        """Memory for this process alone, at an address that is the same in every process."""
        return Scratch(self.context)

    def land(
        self,
        source: Source,
        nbytes: int,
        base: int,
        *,
        readers: int,
        chunk: int,
        ready: Callable[[Arena], None],
    ) -> _Landing:
        size = buffer_bytes(chunk)
        ahead = min(_AHEAD, memory_available() // _AHEAD_SHARE) // size
        ring = Ring(max(readers + _SPARE, ahead), size)

        def come_up(landing: _Landing) -> None:
            arena = self.arena("weights", nbytes, base, now=True)
            landing.transfer.base = arena.address
            ready(arena)
            ring.connect(self.context)

        return _Landing(source, ring, come_up)

    def parked(self, arena: Arena | None, stages: Sequence[Sequence[Stretch]]) -> ParkedWeights:
        from coldframe.loader.devices.pinned import PinnedWeights

        assert isinstance(arena, DeviceArena)
        return PinnedWeights(arena, stages)

    def close(self) -> None:
        """Lets the context go; arenas, mappings and landings must be closed."""
        for thread in self._starting:
            thread.join()
        with self._opening:
            if self._context is not None:
                self._context.close()
                self._context = None


class _Landing:
    """A ring for one stream, that is emptied from when the device is up.

    Args:
        source: Where the bytes come from.
        ring: To be connected; closed with this.
        come_up: Brings the device up and connects the ring, in a thread of its own.
    """

    def __init__(self, source: Source, ring: Ring, come_up: Callable[[_Landing], None]) -> None:
        self.transfer = ring.transfer()
        self._ring = ring
        self._placer = DevicePlacer(source, self.transfer)
        self._come_up = come_up
        self._thread = threading.Thread(target=self._connect, name="cuda-land", daemon=True)
        self._thread.start()

    @property
    def note(self) -> str:
        return self._ring.note

    def fetch(self, extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
        self._placer.fetch(extent, start, stop, arrived)

    def _connect(self) -> None:
        try:
            self._come_up(self)
        except ColdframeError as error:
            self._ring.fail(error)
        except Exception as error:  # noqa: BLE001 - readers wait, and must hear of it
            self._ring.fail(DeviceError("the device does not come up", got=repr(error)))

    def cancel(self) -> None:
        # Nothing can be copied behind it, and the arena is not to be made any more behind this.
        self._thread.join()
        self.transfer.cancel()

    def close(self) -> None:
        self.cancel()
        self._ring.close()
