"""The ledger of KV blocks and the store behind it, as one: who gets blocks, and what is in them.

Where KV is kept, what is forgotten is saved first, what is published is written, and what a request
begins with is brought back before it gets its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from coldframe.loader.devices.base import Arena
from coldframe.loader.errors import ArenaError
from coldframe.loader.kv.ledger import BlockLedger, Blocks
from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.kv.tally import StoreUsage

# What only those need who keep KV.
if TYPE_CHECKING:
    from coldframe.loader.kv.prepare import KvPreparer
    from coldframe.loader.kv.store import KvStore

__all__ = ["KvBooks"]

_DRAIN_S = 2.0
"""How long it may take to write what is not written yet, before memory is given back."""


class KvBooks:
    """Books what is asked of blocks; see `BlockLedger` for the rules. All methods are the loop's.

    Args:
        lease_s: See `BlockLedger`.
        grow: Likewise.

    Attributes:
        ledger: Who has which block.
    """

    def __init__(self, lease_s: float, grow: Callable[[int], int]) -> None:
        self.ledger = BlockLedger(0, lease_s, grow)
        self._store: KvStore | None = None
        self._preparer: KvPreparer | None = None

    def open_store(
        self,
        options: KvStoreOptions,
        arena: Arena,
        block_bytes: int,
        post: Callable[[Callable[[], None]], None],
        available: Callable[[], None],
    ) -> None:
        """Keeps KV from now on.

        Args:
            options: Where, and how much.
            arena: Where the blocks are.
            block_bytes: Of one.
            post: Has something done by the loop; any thread may call it.
            available: Called when blocks that were refused may be there.
        """
        from coldframe.loader.kv.prepare import KvPreparer
        from coldframe.loader.kv.store import KvStore

        self._store = KvStore(options, arena, block_bytes)
        self._preparer = KvPreparer(self.ledger, self._store, post, available, self.ledger.lease_s)

    def open_disk(self, identity: str | None) -> None:
        """The weights are known, as far as they can be told from all others."""
        if self._store is not None:
            self._store.open_disk(identity)

    def may_write(self) -> None:
        """The weights are those that they are said to be: what is made of them may be kept."""
        if self._store is not None:
            self._store.may_write()

    def close(self) -> bool:
        """Writes what is not written yet, in a bounded time.

        Returns:
            Whether the store's readers may be at the arena still.
        """
        if self._store is None:
            return False
        self._store.close(_DRAIN_S)
        return True

    def store_usage(self) -> StoreUsage:
        """What the store counts; nothing where there is none."""
        return StoreUsage() if self._store is None else self._store.usage()

    def check_keys(self, keys: list[str], where: str) -> None:
        """Keys name files, and this process may have more rights than whoever sends them.

        Raises:
            ArenaError: One of them is none.
        """
        if self._store is not None and not self._store.are_keys(keys):
            raise ArenaError("a worker gave a key of KV that is none", where=where)

    # -- requests --------------------------------------------------------------------------------

    def assign(
        self, worker: str, request: str, attempt: int, count: int, keys: list[str]
    ) -> Blocks | None:
        """See `BlockLedger.assign`; what others had kept in the blocks is saved."""
        got = self._assign(worker, request, attempt, count, keys)
        if got is not None and self._store is not None:
            self._store.forgotten(got.forgotten)
        return got

    def _assign(
        self, worker: str, request: str, attempt: int, count: int, keys: list[str]
    ) -> Blocks | None:
        asked = (worker, request, attempt, count, keys)
        ledger, preparer = self.ledger, self._preparer
        if preparer is None:
            return ledger.assign(*asked)
        if not preparer.may_assign(*asked):
            return None
        got = ledger.assign(*asked)
        if got is None and ledger.may_assign(worker, request, attempt) and preparer.give_way():
            got = ledger.assign(*asked)
        return got

    def never(self, worker: str, request: str, attempt: int) -> bool:
        """Whether a request that did not get its blocks never will, the device being full.

        That is so where nobody has any block, so that none will come back.
        """
        if self.ledger.pool.free < self.ledger.pool.blocks:
            return False
        preparing = self._preparer is not None and self._preparer.busy
        return self.ledger.may_assign(worker, request, attempt) and not preparing

    def used(self, keys: list[str]) -> None:
        """Published blocks are used again."""
        if self._store is not None:
            self._store.used(keys)

    def publish(self, worker: str, request: str, keys: list[str]) -> None:
        """See `BlockLedger.publish`."""
        new = self.ledger.publish(worker, request, keys)
        if self._store is not None:
            self._store.published(new)

    def worker_gone(self, worker: str) -> None:
        """A worker is dead, and nothing of its work is under way any more."""
        if self._preparer is not None:
            self._preparer.worker_gone(worker)
        self.ledger.worker_gone(worker, time.monotonic())

    def tidy(self) -> None:
        """Lets go of what was prepared for requests that have ended."""
        if self._preparer is not None:
            self._preparer.tidy()

    # -- when all memory is given back -----------------------------------------------------------

    def save_all(self, saved: Callable[[], None]) -> bool:
        """Has the store save what it wants of blocks that nobody uses.

        Args:
            saved: Called by another thread when that is done.

        Returns:
            Whether there is a store; else `saved` is not called.
        """
        if self._store is None:
            return False
        self._store.leave_arena(self.ledger.pool.kept, _DRAIN_S, saved)
        return True

    def reset(self) -> bool:
        """Forgets what all blocks held, where none is in use. Whether that is so."""
        if not self.ledger.pool.reset():
            return False
        if self._store is not None:
            self._store.arena_lost()
        return True
