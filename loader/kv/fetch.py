"""KV blocks read by several threads at once, as far as they are there without a gap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

__all__ = ["ORDER_NS", "Fetch"]

ORDER_NS = 1000
"""By how much a block is said to have been used before the one that it continues."""


class Fetch:
    """What one request wants, being read.

    Args:
        load: Reads a block to its place; None where it is not there.
        keys: What is wanted.
        places: Where each is to go.
        done: Called by the last thread with what `load` has returned for those that are there.
    """

    def __init__(
        self,
        load: Callable[[str, int, int], str | None],
        keys: Sequence[str],
        places: Sequence[int],
        done: Callable[[Sequence[str]], None],
    ) -> None:
        self._load = load
        self._keys = keys
        self._places = places
        self._done = done
        self._lock = threading.Lock()
        self._next = 0
        self._end = len(keys)
        """Where there is nothing any more."""
        self._loaded = [""] * len(keys)
        self._reading = 0
        self._over = False
        self._used_ns = time.time_ns()

    def run(self) -> None:
        """Reads what no other thread does; to be called by as many as are to help."""
        while True:
            with self._lock:
                if self._over:
                    return
                if self._next >= self._end:
                    if self._reading:
                        return  # the last of them goes on
                    self._over = True
                    break
                place, self._next = self._next, self._next + 1
                self._reading += 1
            loaded = self._try(place)
            with self._lock:
                self._reading -= 1
                if loaded is None:
                    self._end = min(self._end, place)
                else:
                    self._loaded[place] = loaded
        self._done(self._loaded[: self._end])

    def _try(self, place: int) -> str | None:
        try:
            used_ns = self._used_ns - place * ORDER_NS
            return self._load(self._keys[place], self._places[place], used_ns)
        except Exception:  # noqa: BLE001 - whatever it is, the block is computed then
            return None
