"""Weights that leave a device while nobody asks, from the front: see `memory_service.parking`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coldframe.loader.errors import ColdframeError, DeviceFull

__all__ = ["Resting", "RestingTogether"]

_AGAIN_S = 0.25
_PATIENCE_S = 30.0
"""For how long the device's memory may be others' while somebody asks, in seconds."""


class Resting:
    """Whether a replica's weights are to be on its device, and whether they are.

    Args:
        to_memory: Sends a message to the memory service.
        fail: Told why they will not come back.
        clock: Seconds, monotonic.
        warn: Told why they cannot leave.
    """

    def __init__(
        self,
        to_memory: Callable[[dict[str, Any]], None],
        fail: Callable[[ColdframeError], None],
        clock: Callable[[], float],
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.left = False
        """Whether they have left, so that others may have the device's memory."""
        self.leaving = False
        """Whether they were told to, and nothing was heard of it since."""
        self.coming = False
        """Whether they were told to come back, and are not yet."""
        self.told: dict[str, Any] = {}
        """What was said last of the way there or back: `seconds`, `note`, and `why` it failed."""
        self._to_memory = to_memory
        self._fail = fail
        self._clock = clock
        self._warn = warn
        self._parked = False
        self._kept = False
        self._again_at: float | None = None
        self._since = 0.0

    def keep(self) -> None:
        """Has them kept beside the device, once, so that they can leave it at once."""
        if not self._kept:
            self._kept = True
            self._to_memory({"type": "keep"})

    def park(self) -> None:
        """Has them leave."""
        self._parked = self.leaving = True
        self.left = self.coming = False  # some may have come back since that was heard
        self._again_at = None
        self._to_memory({"type": "park"})

    def wake(self) -> None:
        """Has them come back, where they were told to leave."""
        if self._parked:
            self._parked = self.leaving = False
            self.coming = True
            self._since = self._clock()
            self._to_memory({"type": "wake"})

    @property
    def wait_s(self) -> float | None:
        """How long nothing is to be done, in seconds; None where that is up to others."""
        return None if self._again_at is None else max(0.0, self._again_at - self._clock())

    def tick(self) -> None:
        """Asks again for memory that others had; to be called when `wait_s` is over."""
        if self._again_at is not None and self._clock() >= self._again_at:
            self._again_at = None
            self._to_memory({"type": "wake"})

    def heard(self, kind: str, body: dict[str, Any]) -> None:
        """The memory service says `parked` or `woken`."""
        error = None if body["error"] is None else ColdframeError.from_wire(body["error"])
        if kind == "woken" and self._parked:
            return  # it has been told otherwise since
        self.leaving = False
        self.left = kind == "parked" and error is None and body.get("left", False)
        self.told = {"seconds": body.get("seconds"), "note": body.get("note")}
        self.told["why"] = None if error is None else str(error)
        if error is None:
            self.coming = self.coming and kind == "parked"
            return
        if kind == "parked":
            self._warn(f"the weights stay on the device: {error}")
            return
        self.left = True
        if not isinstance(error, DeviceFull) or self._clock() - self._since > _PATIENCE_S:
            self._fail(error)
        else:
            self._again_at = self._clock() + _AGAIN_S


class RestingTogether:
    """Whether the weights of a replica are on all its devices: they leave and come back together.

    Args:
        devices: One for each of them.
    """

    def __init__(self, devices: Sequence[Resting]) -> None:
        self._devices = devices

    @property
    def left(self) -> bool:
        """Whether they have left all of them, so that others may have the memory."""
        return all(device.left for device in self._devices)

    @property
    def leaving(self) -> bool:
        """Whether they were told to, and not all has been heard of it since."""
        return any(device.leaving for device in self._devices)

    @property
    def coming(self) -> bool:
        """Whether they were told to come back, and some are not yet."""
        return any(device.coming for device in self._devices)

    @property
    def told(self) -> dict[str, Any]:
        """As `Resting.told`: of the one that took longest, and the first `why` that there is."""
        if not all(device.told for device in self._devices):
            return {}
        slowest = max(self._devices, key=lambda device: device.told["seconds"] or 0.0)
        failed = (device.told["why"] for device in self._devices if device.told["why"])
        return {**slowest.told, "why": next(failed, None)}

    def keep(self) -> None:
        """Has them kept beside their devices, once."""
        for device in self._devices:
            device.keep()

    def park(self) -> None:
        """Has them leave."""
        for device in self._devices:
            device.park()

    def wake(self) -> None:
        """Has them come back, where they were told to leave."""
        for device in self._devices:
            device.wake()

    @property
    def wait_s(self) -> float | None:
        """How long nothing is to be done, in seconds; None where that is up to others."""
        waits = [device.wait_s for device in self._devices if device.wait_s is not None]
        return min(waits, default=None)

    def tick(self) -> None:
        """Asks again for memory that others had; to be called when `wait_s` is over."""
        for device in self._devices:
            device.tick()
