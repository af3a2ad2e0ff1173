"""The memory of all KV blocks given back while the replica rests.

It goes as soon as no request has a block, and where KV is kept once the store has saved what it
wants. A request that comes meanwhile ends it: then the memory stays until it is wished away again.
"""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.kv.backing import KvBacking
from coldframe.loader.kv.books import KvBooks

__all__ = ["KvDiscard"]


class KvDiscard:
    """Waits for the moment. All methods are the loop's.

    Args:
        books: Whose blocks they are.
        backing: Their memory.
        post: Has something done by the loop; any thread may call it.
    """

    def __init__(
        self, books: KvBooks, backing: KvBacking, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._books = books
        self._backing = backing
        self._post = post
        self._wished = False
        self._saving = False
        """Whether the store is saving what is about to be discarded."""
        self._asked = False
        """Whether a request has come meanwhile."""

    def wish(self) -> None:
        """The memory is to go.

        Raises:
            DeviceError: It cannot be given back.
        """
        self._wished = True
        self.step()

    def asked(self) -> None:
        """Somebody wants blocks: the memory stays."""
        self._wished, self._asked = False, True

    def step(self) -> None:
        """To be called when blocks may have come back: gives the memory back, if that is wished.

        Raises:
            DeviceError: It cannot be given back.
        """
        ledger = self._books.ledger
        if not self._wished or self._saving or self._backing.arena is None:
            return
        if ledger.pool.free < ledger.pool.blocks:
            return
        self._saving, self._asked = True, False
        if not self._books.save_all(lambda: self._post(self._saved)):
            self._saving = False
            self._discard()

    def _saved(self) -> None:
        """The store has what it wants, unless requests have come meanwhile."""
        self._saving = False
        if self._asked:
            self.step()
        elif self._wished:
            self._discard()

    def _discard(self) -> None:
        if not self._books.reset():
            return
        self._wished = False
        if self._backing.discard():
            self._books.ledger.pool.backed = 0
