"""Who reads from a node, and whom it sends on to one of those instead.

A node's uplink is what its readers share: one reader gets all of it, two get half each, and both
are ready after twice the time. So a node has few seats, one by default, and whoever comes when they
are taken is told to ask one of the readers. That one does the same. Nodes that start together are
thus in a row, each behind the one that came before it, and nobody plans it.

A seat is a lease: a reader that is not heard of for a while has lost it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

__all__ = ["LEASE_S", "Reader", "Seats"]

LEASE_S = 10.0


@dataclass(slots=True)
class Reader:
    """Who has a seat.

    Attributes:
        node: Its id.
        serves: `HOST:PORT` where others can read from it, or None.
        until: When its lease ends, by the clock of the seats.
        named: How many were told to ask it.
    """

    node: str
    serves: str | None
    until: float
    named: int = 0


class Seats:
    """The seats of one node. Safe for several threads.

    Args:
        most: How many there are. More are given only where there is nobody to send a reader on to.
        lease_s: For how long a reader has one that is not heard of.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        most: int = 1,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._readers: dict[str, Reader] = {}

    @property
    def taken(self) -> int:
        """How many there are who have one."""
        with self._lock:
            self._sweep()
            return len(self._readers)

    def take(self, node: str, serves: str | None, avoid: Collection[str] = ()) -> Reader | None:
        """Gives a seat, or keeps one; see the module on who is sent on instead.

        Args:
            node: Who asks.
            serves: `HOST:PORT` where it serves itself, or None.
            avoid: Nodes that it has tried in vain.

        Returns:
            None where it has a seat now, else the reader that it should ask.
        """
        with self._lock:
            self._sweep()
            until = self._clock() + self._lease_s
            reader = self._readers.get(node)
            if reader is None:
                others = [other for other in self._readers.values() if other.node not in avoid]
                able = [other for other in others if other.serves is not None]
                # Without anybody to be sent on to it is better off with a part of our uplink than
                # with none.
                if len(others) >= self._most and able:
                    other = min(able, key=lambda reader: reader.named)
                    other.named += 1
                    return other
                reader = self._readers[node] = Reader(node, serves, until)
            reader.serves, reader.until = serves, until
            return None

    def leave(self, node: str) -> None:
        """Takes a seat back, if the node has one."""
        with self._lock:
            self._readers.pop(node, None)

    def _sweep(self) -> None:
        now = self._clock()
        for node in [reader.node for reader in self._readers.values() if reader.until <= now]:
            del self._readers[node]
