"""Before a request gets its blocks: KV that is kept elsewhere is brought into the arena.

A worker that asks for blocks is told that there are none yet, and asks again when it hears that
there may be: so neither it nor the service waits for a disk. Meanwhile the blocks that it will get
are reserved; what must not be lost is copied out of them, and what the store has of the request's
prefix is read into them and published. When the worker asks again it finds that as it finds all
that is published.

A request that ends or whose worker dies meanwhile leaves nothing: its blocks go back as soon as
nobody reads into them. A disk that hangs is waited for a moment only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coldframe.loader.kv.ledger import BlockLedger, Reserved
from coldframe.loader.kv.store import KvStore

__all__ = ["KvPreparer"]

_PATIENCE_S = 2.0
"""How long a request waits for KV from the store; a disk that is slower is no gain to anybody."""


@dataclass(slots=True, eq=False)
class _Preparation:
    """Of one request, for one worker."""

    worker: str
    request: str
    reserved: Reserved
    began: float
    keys: Sequence[str]
    running: bool = True


class KvPreparer:
    """Prepares requests' blocks; all calls come from the service's loop.

    Args:
        ledger: Whose the blocks are.
        store: Where KV is kept.
        post: Has something done by the loop; any thread may call it.
        done: Called when blocks are ready, or have come back.
        lease_s: How long blocks that are ready are kept for a worker that does not ask.
    """

    def __init__(
        self,
        ledger: BlockLedger,
        store: KvStore,
        post: Callable[[Callable[[], None]], None],
        done: Callable[[], None],
        lease_s: float,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._post = post
        self._done = done
        self._lease_s = lease_s
        self._wanted: dict[str, _Preparation] = {}
        """By request."""
        self._moved = 0.0
        """When the store has brought something last; what is wanted is read in turn."""
        self._left: list[_Preparation] = []
        """Those that nobody waits for any more, while threads read into their blocks."""

    def may_assign(
        self, worker: str, request: str, attempt: int, count: int, keys: Sequence[str]
    ) -> bool:
        """Whether a request is to get its blocks now, with what there is.

        Returns:
            False where something is on its way for it; `done` is called then.
        """
        known = self._wanted.get(request)
        if known is not None and known.running:
            if time.monotonic() - max(known.began, self._moved) < _PATIENCE_S:
                return False
            self._leave(known)
            return True
        if known is not None:
            self._leave(known)
            return True
        if not self._ledger.may_assign(worker, request, attempt):
            return True
        return not self._begin(worker, request, count, keys)

    def give_way(self) -> bool:
        """Lets go of all that is ready, where another request cannot get its blocks.

        What was read stays published as long as nobody needs its memory.

        Returns:
            Whether there was any.
        """
        ready = [known for known in self._wanted.values() if not known.running]
        for known in ready:
            self._leave(known)
        return bool(ready)

    def worker_gone(self, worker: str) -> None:
        """A worker asks no more."""
        for known in [known for known in self._wanted.values() if known.worker == worker]:
            self._leave(known)

    def tidy(self) -> None:
        """Lets go of what nobody will ask for again; to be called when requests may have ended."""
        late = time.monotonic() - self._lease_s
        for known in list(self._wanted.values()):
            forgotten = not known.running and known.began < late
            if forgotten or not self._ledger.is_open(known.request):
                self._leave(known)

    @property
    def busy(self) -> bool:
        """Whether blocks are kept for somebody."""
        return bool(self._wanted or self._left)

    @property
    def _disk_hangs(self) -> bool:
        late = time.monotonic() - _PATIENCE_S
        return any(known.began < late for known in self._left)

    def _begin(self, worker: str, request: str, count: int, keys: Sequence[str]) -> bool:
        """Begins to prepare a request, where there is something to do."""
        if self._disk_hangs:
            return False
        found = self._ledger.pool.found(keys)
        fetch = keys[found:]
        if not fetch and not (self._ledger.pool.forgets(count - found) and self._store.saves()):
            return False
        got = self._ledger.pool.reserve(count, keys)
        if got is None:
            return False
        reserved, blocks = got
        known = _Preparation(worker, request, reserved, time.monotonic(), keys)
        self._wanted[request] = known
        self._store.fetch(
            blocks.forgotten,
            fetch,
            blocks.blocks[found : found + len(fetch)],
            lambda more: self._post(lambda: self._fetched(known, found + more)),
        )
        return True

    def _fetched(self, known: _Preparation, count: int) -> None:
        known.running = False
        self._moved = time.monotonic()
        new = self._ledger.pool.fill(known.reserved, known.keys[:count])
        self._store.published(new, fetched=True)
        if known in self._left:
            self._left.remove(known)
            self._ledger.pool.give_back(known.reserved)
        self._done()

    def _leave(self, known: _Preparation) -> None:
        """Nobody waits for it any more."""
        del self._wanted[known.request]
        if known.running:
            self._left.append(known)
        else:
            self._ledger.pool.give_back(known.reserved)
