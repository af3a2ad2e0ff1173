"""A GPU as a device: weights and KV in its memory, shared between processes by descriptor.

Nothing of CUDA is loaded before it is needed: the driver's start and the context take as long as
reading the first stages, so that is done beside it (`feed`).
"""

from __future__ import annotations

import os
import threading
from typing import Any

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.ring import Ring
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceFull

__all__ = ["CudaDevice"]


class CudaDevice:
    """One GPU.

    Args:
        ordinal: Which, of those that this process sees.
        api: See `Driver`; None takes the bindings.
    """

    def __init__(self, ordinal: int = 0, api: Any = None) -> None:
        self.name = f"cuda:{ordinal}"
        self._ordinal = ordinal
        self._api = api
        self._opening = threading.Lock()
        self._context: Context | None = None
        self._feeding: list[threading.Thread] = []

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

    def available(self) -> int:
        return self.context.available()

    def allocate(self, purpose: str, nbytes: int, *, now: bool) -> int:
        context = self.context
        left = context.available()
        if nbytes > left:
            raise DeviceFull(
                f"not enough memory for the {purpose}",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=f"{left:,} bytes available",
                hint="Free memory of the GPU (nvidia-smi) or take a smaller model.",
            )
        # What is filled at once need not be zeroed first.
        arena = DeviceArena(context, nbytes, writable=True, zeroed=not now)
        try:
            return os.dup(arena.grow(arena.size).fd)
        finally:
            arena.close()

    def discard(self, fd: int, nbytes: int) -> None:
        raise DeviceError(
            "memory of a GPU cannot be given back while it is mapped",
            where=self.name,
            expected=f"{nbytes:,} bytes",
            hint="Shrink the arena, and have whoever has attached it let go.",
        )

    def feed(self, ring: Ring, *, streams: int = 1) -> None:
        """Has a ring emptied into this device, as soon as there is a context; returns at once.

        Where there will be none the ring ends with the reason.
        """

        def connect() -> None:
            try:
                ring.connect(self.context, streams=streams)
            except ColdframeError as error:
                ring.fail(error)  # which may have ended meanwhile

        thread = threading.Thread(target=connect, name="cuda-context", daemon=True)
        self._feeding.append(thread)
        thread.start()

    def close(self) -> None:
        """Lets the context go; arenas and rings must be closed."""
        for thread in self._feeding:
            thread.join()
        with self._opening:
            if self._context is not None:
                self._context.close()
                self._context = None
