"""Where one worker's context is, as the front knows it; see `contexts` for the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coldframe.runtime.replica.launch import WorkerProcess

__all__ = ["Place", "WorkerContext"]

Place = Literal["here", "asked", "ready", "leaving", "away", "coming", "waiting"]


@dataclass(slots=True, eq=False)
class WorkerContext:
    """One worker's.

    Attributes:
        place: Where it is, or on its way to.
        number: Of the last order to rest: an answer to another one is late.
        failed: In which rest it could not leave.
        must_come: Whether it was told to come back while it was leaving.
        own_bytes: What it said that it has of the device for itself, when it let go of the rest.
        frozen: What the memory service said of it: bytes, and the GPUs' UUIDs.
        since: When it was first to come back, in seconds.
        due: Until when its place lasts, or when it is looked at again; None is for ever.
    """

    worker: WorkerProcess
    place: Place = "here"
    number: int = 0
    failed: int = 0
    must_come: bool = False
    own_bytes: int = 0
    frozen: dict[str, Any] | None = None
    since: float = 0.0
    due: float | None = None

    def goes(self, place: Place, due: float | None = None) -> None:
        self.place, self.due = place, due
