"""The front's loop: calls whoever has something to read. It outlives the replicas that use it."""

from __future__ import annotations

import selectors
from collections.abc import Callable

__all__ = ["Loop"]


class Loop:
    """Descriptors, and what is called when one of them is readable."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Has `poll` call something whenever a descriptor is readable."""
        self.selector.register(fd, selectors.EVENT_READ, ready)

    def unwatch(self, fd: int) -> None:
        self.selector.unregister(fd)

    def poll(self, timeout: float) -> None:
        """Calls whoever can read; waits for the first of them at most so many seconds."""
        for key, _ in self.selector.select(timeout):
            # Handling one may have ended the process at the other end of the next.
            if self.selector.get_map().get(key.fd) == key:
                key.data()

    def close(self) -> None:
        self.selector.close()
