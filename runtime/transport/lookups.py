"""Where decode workers on other hosts are listed, looked up again and again.

Each place is looked at by a thread of its own, which ends with that look: a name server or a
mount may take its time, and whoever has tokens to pass on waits for neither. What a place said
last counts until it says something else; that it cannot be asked is not that it lists nobody.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from coldframe.loader.errors import ColdframeError, SourceNotFound
from coldframe.loader.peers.directory import PeerDirectory, open_place

__all__ = ["EVERY_S", "Lookups"]

EVERY_S = 2.0
"""How often a place is looked at, in seconds."""


@dataclass(slots=True, eq=False)
class _Place:
    text: str
    directory: PeerDirectory
    addresses: tuple[str, ...] = ()
    thread: threading.Thread | None = None
    not_before: float = -math.inf
    empty: bool = False
    """Whether it was said that it lists nobody."""
    silent: bool = False
    """Whether it was said that it cannot be asked."""


class Lookups:
    """The lists of one replica.

    Args:
        places: `dns://NAME:PORT` or `file:///PATH` of each.
        tell: Told, once of each time, of a place that lists nobody or cannot be asked, and why.
        clock: Monotonic seconds.

    Raises:
        RequestError: One of them is no such place.
    """

    def __init__(
        self,
        places: Sequence[str],
        tell: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = [_Place(text, open_place(text)) for text in dict.fromkeys(places)]
        self._tell = tell
        self._clock = clock
        self._found: deque[tuple[_Place, tuple[str, ...] | ColdframeError]] = deque()
        self._open = threading.Lock()
        """Held by whoever writes to `fd`, or closes it."""
        self._closed = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when there is something to `take`."""

    @property
    def addresses(self) -> list[str]:
        """`HOST:PORT` of all that are listed, as far as is known; each once."""
        return list(dict.fromkeys(found for place in self._places for found in place.addresses))

    def step(self) -> None:
        """Has those places looked at that are due; to be called about once a second."""
        for place in self._places:
            looking = place.thread is not None and place.thread.is_alive()
            if looking or self._clock() < place.not_before:
                continue
            place.not_before = self._clock() + EVERY_S
            place.thread = threading.Thread(
                # One that a name server holds is left behind.
                target=self._look,
                args=(place,),
                name="decode-lookup",
                daemon=True,
            )
            with suppress(RuntimeError):  # there cannot be another thread at the moment
                place.thread.start()

    def take(self) -> None:
        """Makes what was found what is known."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        while self._found:
            place, found = self._found.popleft()
            if isinstance(found, ColdframeError) and not isinstance(found, SourceNotFound):
                if not place.silent:
                    self._tell(place.text, f"it cannot be asked: {found.what} ({found.got})")
                place.silent = True
                continue
            place.addresses = () if isinstance(found, ColdframeError) else found
            if not place.addresses and not place.empty:
                self._tell(place.text, "none is listed there")
            place.silent, place.empty = False, not place.addresses

    def close(self) -> None:
        """Nothing is looked at any more; one look may still be on its way."""
        with self._open:
            if not self._closed:
                os.close(self.fd)
            self._closed = True

    def _look(self, place: _Place) -> None:
        found: tuple[str, ...] | ColdframeError
        try:
            peers = place.directory.peers()
            found = tuple(sorted(peer.uri.removeprefix("peer://") for peer in peers))
        except ColdframeError as error:
            found = error
        self._found.append((place, found))
        with self._open:
            if not self._closed:
                os.eventfd_write(self.fd, 1)
