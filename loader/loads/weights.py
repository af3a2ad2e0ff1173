"""The weights of one load: where they lie."""

from __future__ import annotations

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import Device
from coldframe.loader.devices.base import Arena
from coldframe.loader.devices.parked import ParkableMemory, ParkedWeights, stretches_of

__all__ = ["Weights"]


class Weights:
    """Weights that stay in the arena that they were loaded into.

    Args:
        plan: How they lie in it.
        device: Whose memory it is.

    Attributes:
        plan: How they lie now.
        segments: What workers map.
        mode: `mapped` or `copied`; empty as long as they have no place.
        why: Why they were not mapped, or not read from the first place, where they might have been.
        verified: What vouches for the bytes; in a mapped file, from when they have been read once.
    """

    def __init__(self, plan: Plan, device: Device) -> None:
        self.plan = plan
        self.segments: list[Segment] = []
        self.mode = ""
        self.why: str | None = None
        self.verified = "not verified yet"
        self._device = device
        self._arena: Arena | None = None
        self._memory: ParkableMemory | None = None
        self._parked: ParkedWeights | None = None

    def lie_in(self, arena: Arena) -> None:
        """They come to lie in an arena, which is this object's from now on."""
        self.mode, self._arena, self.segments = "copied", arena, arena.segments

    def view(self) -> memoryview | None:
        """The arena's bytes, where the host can look at them; once they are being filled."""
        return None if self._arena is None else self._arena.view(0, self.plan.arena_bytes)

    def memory(self) -> ParkableMemory:
        """The arena, for who reads it as long as the replica lives; to be asked for once."""
        assert self._arena is not None
        self._memory = ParkableMemory(self._arena)
        return self._memory

    def parked(self) -> ParkedWeights:
        """What has them leave the device and come back; once, when all of them are in."""
        self._parked = weights = self._device.parked(self._arena, stretches_of(self.plan))
        if self._memory is not None:
            self._memory.weights = weights
        return weights

    def close(self) -> None:
        """Gives their memory back. Nobody reads it here any more."""
        for thing in (self._parked, self._arena):
            if thing is not None:
                thing.close()
