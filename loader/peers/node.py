"""A replica as its peers see it: which weights it has or will have, how far it is, who feeds it.

A node is *choosing* until it has found a place to load from and has opened the checkpoint there,
then *loading*, and *loaded* or *failed* at the end. It is a source for others from *loading* on,
which is what keeps a chain from biting its tail: who is chosen has chosen before.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.memory_service.board import Progress
from coldframe.loader.peers.seats import Seats

__all__ = ["CHOOSING", "FAILED", "LOADED", "LOADING", "Node", "Root", "hashed"]

CHOOSING, LOADING, LOADED, FAILED = "choosing", "loading", "loaded", "failed"


@dataclass(frozen=True, slots=True)
class Root:
    """Where the weights of a chain came from at first, for those who know the same place.

    Attributes:
        place: A hash of the place's URI.
        versions: A hash of what the place says of the versions of its shards, such as ETags.
    """

    place: str
    versions: str

    def contradicts(self, other: Root) -> bool:
        """Whether they are two versions of what lies in one place."""
        return self.place == other.place and self.versions != other.versions


class Node:
    """What this replica says of itself. Safe for several threads.

    Args:
        model: Where its model is, as its user wrote it: peers that were given the same say so.
        readers: How many may read from it at once.
        whole: Whether it will have all of the weights, and not a slice.
    """

    def __init__(self, model: str, *, readers: int = 1, whole: bool = True) -> None:
        self.id = os.urandom(16).hex()
        self.model = hashed(model)
        self.whole = whole
        self.seats = Seats(readers)
        self._lock = threading.Lock()
        self._fingerprint: str | None = None
        self._root: Root | None = None
        self._progress: Callable[[], Progress] = lambda: Progress(0, 0)
        self._state = CHOOSING
        self._via: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """One of the four."""
        with self._lock:
            return self._state

    @property
    def fingerprint(self) -> str | None:
        """The checkpoint's, once it is open."""
        with self._lock:
            return self._fingerprint

    @property
    def via(self) -> tuple[str, ...]:
        """The nodes that its bytes come through, the nearest one last; none where it has all."""
        with self._lock:
            return () if self._state == LOADED else self._via

    @property
    def progress(self) -> Progress:
        """Bytes of weights that are in, and in all."""
        with self._lock:
            progress = self._progress
        return progress()

    def reads_from(self, via: Sequence[str]) -> None:
        """It takes its bytes from the last of these nodes, or from none of them any more."""
        with self._lock:
            self._via = tuple(via)

    def comes_from(self, root: Root | None) -> None:
        """Its bytes came from there at first, as far as that is known."""
        with self._lock:
            self._root = root

    def opened(self, fingerprint: str, progress: Callable[[], Progress]) -> None:
        """The checkpoint is open, and is being loaded.

        Args:
            fingerprint: The checkpoint's.
            progress: Tells how far that is.
        """
        with self._lock:
            self._fingerprint, self._progress = fingerprint, progress
            self._state = LOADING

    def ended(self, *, failed: bool) -> None:
        """All of it is in, or will never be."""
        with self._lock:
            if self._state != FAILED:
                self._state = FAILED if failed else LOADED

    def to_wire(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        done, total = self.progress
        readers = self.seats.taken
        with self._lock:
            root = self._root
            return {
                "version": 1,
                "node": self.id,
                "model": self.model,
                "fingerprint": self._fingerprint,
                "root": None if root is None else [root.place, root.versions],
                "state": self._state,
                "seated": bool(self._via),
                "whole": self.whole,
                "done": done,
                "total": total,
                "readers": readers,
            }


def hashed(*texts: str) -> str:
    """What tells some texts from others without saying them: a URI may be nobody's business."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()
