"""How long a wait for weights may go on without a single byte coming in."""

from __future__ import annotations

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import SourceUnreachable
from coldframe.loader.memory_service.board import Progress

__all__ = ["STALL_S", "StallWatch"]

STALL_S = 60.0
"""How long, in seconds."""


class StallWatch:
    """Looks at the progress of a load for somebody who waits for it. For one thread.

    Args:
        stall_s: See `STALL_S`.
    """

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s
        self._clock = AwakeClock()
        self._seen = -1
        self._seen_at = self._clock()

    def begin(self) -> None:
        """A wait begins."""
        self._seen_at = self._clock()

    def check(self, progress: Progress, what: str | None) -> None:
        """To be called now and then.

        Args:
            progress: How far the load is.
            what: What is waited for, for the message.

        Raises:
            SourceUnreachable: Nothing has come in for too long.
        """
        done, total = progress
        if done != self._seen:
            self._seen, self._seen_at = done, self._clock()
        elif self._clock() - self._seen_at > self.stall_s:
            raise SourceUnreachable(
                f"no byte of the weights came in for {self.stall_s:g} s",
                where=what,
                got=f"{done:,} of {total:,} bytes",
                hint="Check the disk or the network that the weights come from.",
            )
