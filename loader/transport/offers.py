"""What a memory service has to give: blocks under tokens, and who reads them at the moment.

An offer ends once: when it was taken, when its time is over, or when it is withdrawn. Its blocks
are somebody else's only when nobody reads them any more; who still does is broken off, where that
can be done, and waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from coldframe.loader.errors import TransferRefused

__all__ = ["Offer", "Offers"]


@dataclass(eq=False, slots=True)
class Offer:
    """Blocks that may be taken.

    Args:
        token: By whom.
        request: Whose they are.
        blocks: Of the arena, in the order of their tokens.
        ends: When it is over, by the monotonic clock.
    """

    token: str
    request: str
    blocks: tuple[int, ...]
    ends: float
    taken: bool = False
    over: bool = False
    readers: list[Callable[[], None]] = field(default_factory=list)
    """What breaks each of them off."""


class Offers:
    """All of them. For several threads.

    Args:
        ended: Called once of each, by whichever thread ended it or read it last.
    """

    def __init__(self, ended: Callable[[Offer], None]) -> None:
        self._ended = ended
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}

    def add(self, offer: Offer) -> None:
        with self._lock:
            self._offers[offer.token] = offer

    @contextmanager
    def reading(self, token: str, stop: Callable[[], None]) -> Iterator[Offer]:
        """The blocks under a token, which stay what they are until the end of the context.

        Args:
            token: What the reader has shown.
            stop: Breaks the reader off; called by another thread, where the offer ends meanwhile.

        Raises:
            TransferRefused: There is nothing under it, or no longer.
        """
        offer = self.begin(token, stop)
        try:
            yield offer
        finally:
            self.end(offer, stop)

    def begin(self, token: str, stop: Callable[[], None]) -> Offer:
        """See `reading`, for who cannot have a context; `end` is to follow."""
        with self._lock:
            offer = self._offers.get(token)
            if offer is None:
                raise TransferRefused("there is no such KV, or no longer")
            offer.readers.append(stop)
            return offer

    def end(self, offer: Offer, stop: Callable[[], None]) -> None:
        """A reader looks at the blocks no more."""
        with self._lock:
            offer.readers.remove(stop)
            over = offer.over and not offer.readers
        if over:
            self._ended(offer)

    def take(self, token: str) -> bool:
        """All of it has been taken. Whether it was there to be taken."""
        return self._end(token, taken=True)

    def withdraw(self, token: str) -> None:
        """Nobody is to take it any more."""
        self._end(token, taken=False)

    def expire(self) -> None:
        """Ends those whose time is over."""
        with self._lock:
            late = [o.token for o in self._offers.values() if o.ends <= time.monotonic()]
        for token in late:
            self.withdraw(token)

    def _end(self, token: str, *, taken: bool) -> bool:
        with self._lock:
            offer = self._offers.pop(token, None)
            if offer is None:
                return False
            offer.over, offer.taken = True, taken
            readers = list(offer.readers)
        if not readers:
            self._ended(offer)
        elif not taken:
            for stop in readers:
                stop()
        return True
