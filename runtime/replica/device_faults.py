"""What becomes of a replica whose GPU fails: it starts anew there, or on the CPU, or it ends.

A GPU that was lost in the middle of something is given another try: new processes have contexts of
their own, and what broke one of them is gone with it. One that cannot be used at all does not get
better by that. Where nobody has asked for it by its name, the CPU stands in, as long as no token
has been made in this start.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceLost, NoDevice
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions

__all__ = ["DeviceFaults"]

_LOSSES = 2
"""So many losses within a window are answered by a new start; the next one is the end."""
_WINDOW_S = 600.0


class DeviceFaults:
    """Counts what has happened to one replica's device, and decides what to do.

    Args:
        warn: Told of it, in one sentence.
        clock: Monotonic seconds.

    Attributes:
        counts: How often the device was `lost`, and how often the CPU has stood in (`fallback`).
        absent: Whether there is no such device at all, so that no later start need ask for it.
    """

    def __init__(
        self, warn: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.absent = False
        self._warn = warn
        self._clock = clock
        self._losses: deque[float] = deque()

    def way_on(
        self, error: ColdframeError, options: ReplicaOptions, *, answered: bool
    ) -> tuple[str, ReplicaOptions] | None:
        """How a replica goes on behind an error.

        Args:
            error: Why it cannot go on as it is.
            options: What it is.
            answered: Whether it has made a token since it was started.

        Returns:
            Why it starts again, and as what; None where the error is its end.
        """
        if options.device == CPU or not isinstance(error, DeviceError):
            return None
        devices = " or ".join(options.devices)
        if isinstance(error, DeviceLost) and self._may_try_again():
            why = f"{devices} was lost: {error}"
            options = replace(options, hold_load=False)
        elif options.fall_back and not answered:
            self.counts["fallback"] += 1
            self.absent = isinstance(error, NoDevice)
            why = f"fell back to the CPU, {devices} cannot be used: {error}"
            options = replace(options.on_cpu(why), hold_load=False)
            if options.kv_bytes is not None and options.kv_bytes > memory_available():
                options = replace(options, kv_bytes=None)  # it was said of the GPU
        else:
            return None
        self._warn(why)
        return why, options

    def _may_try_again(self) -> bool:
        moment = self._clock()
        self.counts["lost"] += 1
        self._losses.append(moment)
        while self._losses[0] < moment - _WINDOW_S:
            self._losses.popleft()
        return len(self._losses) <= _LOSSES
