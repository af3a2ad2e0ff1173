"""Ranges that take much longer than their peers are asked for a second time.

Some requests of a store are slow for no reason that the next one shares: a busy disk, a lossy path.
What such a range still misses is fetched once more, over another connection and into a buffer of
its own; who is first wins. Only the thread that reads the range ever writes to the caller's memory:
either it receives to the end, or its connection is ended under it and it copies what the other one
has brought. So a loser cannot come late and write over what somebody uses already.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from coldframe.loader.errors import SourceError
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.connection import Connection
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.parts import Parts

__all__ = ["Flight", "Hedger"]

_TICK_S = 0.05
_FEWEST_PEERS = 5
_PEERS = 64
_LEAST = 1 << 20
"""A shorter range counts as one of so many bytes: of those, most of the time is the request's."""
_LARGEST = 32 << 20
_FREE = 32 << 20


class Flight:
    """One attempt to read a range. `rescue` and `used_by` are for the helper, the rest is the
    reader's.

    Args:
        name: The file.
        version: The one that is read.
        size: The file's.
        end: The offset behind the range.
        parts: Where the range is put; its bytes left tell how far it is.
        now: Monotonic seconds.
    """

    def __init__(
        self, name: str, version: str, size: int, end: int, parts: Parts, now: float
    ) -> None:
        self.name = name
        self.version = version
        self.size = size
        self.end = end
        self.parts = parts
        self.length = parts.left
        self.began = now
        self.hedged = False
        self._lock = threading.Lock()
        self._over = False
        self._reader: Connection | None = None
        self._helper: Connection | None = None
        self._rescue: memoryview | None = None

    def reads_from(self, connection: Connection | None) -> None:
        """The reader has a connection, or none any more.

        Raises:
            Broken: It needs none: the helper was faster already.
        """
        with self._lock:
            self._reader = connection
            if connection is not None and self._rescue is not None:
                raise Broken("another connection was faster")

    def landed(self) -> None:
        """The reader is done, whichever way. The helper is ended."""
        with self._lock:
            self._over = True
            if self._helper is not None:
                self._helper.shut_down()

    def take_rescue(self) -> bool:
        """Copies what the helper has brought to where it belongs; whether there is such a thing.

        To be called after `landed`.
        """
        with self._lock:
            rescue, self._rescue = self._rescue, None
        if rescue is None:
            return False
        self.parts.put(rescue[len(rescue) - self.parts.left :])
        return True

    def helped_by(self, connection: Connection | None) -> None:
        """The helper has a connection, or none any more."""
        with self._lock:
            self._helper = connection
            if self._over and connection is not None:
                connection.shut_down()

    def rescue(self, content: memoryview) -> bool:
        """The helper has all bytes up to the end; whether it was in time."""
        with self._lock:
            if self._over:
                return False
            self._rescue = content
            if self._reader is not None:
                self._reader.shut_down()
            return True


Fetch = Callable[[Flight, int, memoryview], None]


class Hedger:
    """Watches the ranges that are being read, with a thread of its own.

    Args:
        limits: When, and how often.
        fetch: Reads a flight's file from an offset on into a buffer, in one attempt, telling the
            flight its connection.
        may: Whether now is a time for more requests.
        clock: Monotonic seconds.

    Attributes:
        hedges: Ranges that were asked for twice.
        won: Those of them where the second was first.
    """

    def __init__(
        self,
        limits: Limits,
        fetch: Fetch,
        may: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._fetch = fetch
        self._may = may
        self._clock = clock
        self._changed = threading.Condition()
        self._flights: set[Flight] = set()
        self._paces: deque[float] = deque(maxlen=_PEERS)  # seconds per byte
        self._watch: threading.Thread | None = None
        self._helpers: set[threading.Thread] = set()
        self._closed = False
        self._read = 0
        self._asked_twice = 0
        self.hedges = 0
        self.won = 0

    def began(self, flight: Flight) -> None:
        """A range is being read."""
        if not self._limits.hedges:
            return
        with self._changed:
            if self._closed:
                return
            self._flights.add(flight)
            if self._watch is None:
                self._watch = threading.Thread(target=self._run, name="hedger", daemon=True)
                self._watch.start()
            elif len(self._flights) == 1:
                self._changed.notify()

    def ended(self, flight: Flight, *, complete: bool) -> None:
        """It is not any more."""
        with self._changed:
            self._flights.discard(flight)
            self._read += flight.length - flight.parts.left
            if complete:
                elapsed = self._clock() - flight.began
                self._paces.append(elapsed / max(_LEAST, flight.length))

    def close(self) -> None:
        """Waits for its threads. No range is being read any more, and no connection waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            watch, helpers = self._watch, list(self._helpers)
        for thread in [watch, *helpers]:
            if thread is not None:
                thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._flights and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                for flight in self._stragglers():
                    self._help(flight)
                self._changed.wait(_TICK_S)

    def _stragglers(self) -> list[Flight]:
        """Those that are to be asked for again now, slowest first."""
        free = self._limits.hedges - len(self._helpers)
        if free <= 0 or len(self._paces) < _FEWEST_PEERS or not self._may():
            return []
        pace = self._limits.hedge_factor * sorted(self._paces)[len(self._paces) // 2]
        now = self._clock()
        slow = []
        for flight in self._flights:
            usual = max(self._limits.hedge_after_s, pace * max(_LEAST, flight.length))
            if not flight.hedged and flight.parts.left and now - flight.began > usual:
                slow.append(flight)
        slow.sort(key=lambda flight: flight.began)
        return slow[:free]

    def _help(self, flight: Flight) -> None:
        left = flight.parts.left
        budget = _FREE + self._limits.hedge_share * self._read
        if not 0 < left <= _LARGEST or self._asked_twice + left > budget:
            return
        flight.hedged = True
        self._asked_twice += left
        self.hedges += 1
        helper = threading.Thread(target=self._fly, args=(flight, left), name="hedge", daemon=True)
        self._helpers.add(helper)
        helper.start()

    def _fly(self, flight: Flight, left: int) -> None:
        won = False
        try:
            content = memoryview(bytearray(left))
            self._fetch(flight, flight.end - left, content)
            won = flight.rescue(content)
        except (Broken, SourceError):
            pass  # the range is still being read, and tells what is wrong
        finally:
            with self._changed:
                self.won += won
                self._helpers.discard(threading.current_thread())
