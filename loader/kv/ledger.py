"""The ledger of KV blocks: whose they are, and when they come back to the pool.

A request's blocks have at most one *holder*, the worker that reads and writes them, and are freed
only when nobody holds them: neither a cancelled request nor an expired lease ever frees memory
under a worker's hands. What the blocks hold, and which of them are free, is the pool's (`pool`).

Pure bookkeeping; sockets and clocks are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coldframe.loader.errors import ArenaError
from coldframe.loader.kv.pool import BlockPool, Blocks, Named, Reserved

__all__ = ["BlockLedger", "Blocks", "KvUsage", "Named", "Reserved"]


@dataclass(frozen=True, slots=True)
class KvUsage:
    """What the ledger counts.

    Args:
        used: Blocks of requests, each once.
        cached: Blocks that are kept for requests to come.
        total: All that there are.
        reused: How often a block was found instead of computed, so far.
    """

    used: int = 0
    cached: int = 0
    total: int = 0
    reused: int = 0


@dataclass(slots=True)
class _Account(Reserved):
    """What the ledger knows of one request."""

    gateway: str = ""
    attempt: int = -1
    holder: str | None = None
    written: bool = False
    """Whether its blocks hold what a hand-off says of them."""
    released: bool = False
    lease_ends: float | None = None


class BlockLedger:
    """Who owns which KV block.

    Args:
        blocks: How many there are.
        lease_s: How long a request's blocks are kept while no worker holds them, in seconds.
        grow: See `BlockPool`.

    Attributes:
        pool: The blocks.
    """

    def __init__(
        self, blocks: int, lease_s: float = 30.0, grow: Callable[[int], int] | None = None
    ) -> None:
        self.pool = BlockPool(blocks, grow)
        self.lease_s = lease_s
        self._reused = 0
        self._accounts: dict[str, _Account] = {}

    @property
    def usage(self) -> KvUsage:
        pool = self.pool
        return KvUsage(pool.blocks - pool.free, pool.cached, pool.blocks, self._reused)

    @property
    def requests(self) -> int:
        return len(self._accounts)

    def open(self, request: str, gateway: str) -> None:
        """A request comes to life; it ends with `release` or with its gateway."""
        self._accounts.setdefault(request, _Account(gateway=gateway))

    def release(self, request: str) -> None:
        """The request is over. Its blocks are freed, once its holder has dropped them."""
        account = self._accounts.get(request)
        if account is not None:
            account.released = True
            self._settle(request)

    def assign(
        self, worker: str, request: str, attempt: int, count: int, keys: Sequence[str] = ()
    ) -> Blocks | None:
        """Gives a request the blocks that it needs, held by a worker: all of them, or none.

        They replace what an older attempt, or a worker that died over them, has left.

        Args:
            worker: The holder to be.
            request: Whose they are.
            attempt: The holder's.
            count: How many.
            keys: Of its first tokens, block by block; what is published of them is reused.

        Returns:
            None where there are not enough at the moment, the request has ended, or another
            worker holds it.

        Raises:
            ArenaError: There are more keys than blocks.
        """
        if len(keys) > count:
            raise _nonsense(worker, f"at most {count} keys", len(keys))
        if not self.may_assign(worker, request, attempt):
            return None
        account = self._accounts[request]
        self._give_up_kv(account)
        account.holder = None
        got = self.pool.give(account, count, keys)
        if got is not None:
            account.attempt, account.holder, account.lease_ends = attempt, worker, None
            self._reused += got.reused
        return got

    def may_assign(self, worker: str, request: str, attempt: int) -> bool:
        """Whether a worker would get a request's blocks if there were enough."""
        account = self._accounts.get(request)
        if account is None or account.released or attempt < account.attempt:
            return False
        if account.holder == worker:
            return attempt != account.attempt  # else it has what it asks for
        return account.holder is None

    def is_open(self, request: str) -> bool:
        """Whether a request is alive."""
        account = self._accounts.get(request)
        return account is not None and not account.released

    def publish(self, worker: str, request: str, keys: Sequence[str]) -> Named:
        """The holder says that the request's KV is written up to what a hand-off would say.

        Args:
            worker: The holder.
            request: Whose blocks they are.
            keys: Of its first blocks, all of them full. Nobody writes to them any more.

        Returns:
            The blocks that are published by this.

        Raises:
            ArenaError: The keys are not those that the request began with, or too many.
        """
        account = self._accounts.get(request)
        if account is None or account.holder != worker:
            return []
        known = len(account.keys)
        if len(keys) > len(account.blocks) or list(keys[:known]) != account.keys[: len(keys)]:
            raise _nonsense(worker, f"{len(account.keys)} known keys and more", len(keys))
        account.written = True
        return self.pool.fill(account, keys)

    def claim(self, worker: str, request: str, attempt: int) -> list[int] | None:
        """Makes a worker the holder of a request's blocks.

        Returns:
            The blocks in order, or None where the request has ended, its lease has run out,
            another holds it, its KV was never written to the end, or the attempt is an old one.
        """
        account = self._accounts.get(request)
        if account is None or account.released or attempt < account.attempt:
            return None
        if account.holder not in (None, worker) or not account.written:
            return None
        account.attempt, account.holder, account.lease_ends = attempt, worker, None
        return list(account.blocks)

    def drop(self, worker: str, request: str, now: float) -> None:
        """The worker lets go: it touches the request's blocks no more. The lease starts."""
        account = self._accounts.get(request)
        if account is not None and account.holder == worker:
            account.holder, account.lease_ends = None, now + self.lease_s
            self._settle(request)

    def finish(self, worker: str, request: str) -> None:
        """The worker lets go, and nobody is to go on with these blocks.

        Whoever should get the request again finds what was published, and computes the rest.
        """
        account = self._accounts.get(request)
        if account is not None and account.holder == worker:
            account.holder = None
            self._give_up_kv(account)
            self._settle(request)

    def renew(self, request: str, now: float) -> None:
        """Starts the lease again: whoever passed the request on still cares for it."""
        account = self._accounts.get(request)
        if account is not None and account.lease_ends is not None:
            account.lease_ends = now + self.lease_s

    def worker_gone(self, worker: str, now: float) -> None:
        """A worker died: what it held waits for another."""
        for request in [r for r, a in self._accounts.items() if a.holder == worker]:
            self.drop(worker, request, now)

    def gateway_gone(self, gateway: str) -> None:
        """A gateway died, and its requests with it."""
        for request in [r for r, a in self._accounts.items() if a.gateway == gateway]:
            self.release(request)

    def expire(self, now: float) -> list[str]:
        """Frees the blocks of requests that nobody has held for the length of a lease.

        Returns:
            The requests that lost their KV. They live on; whoever takes one up computes it again.
        """
        expired = []
        for request, account in self._accounts.items():
            if account.lease_ends is not None and now >= account.lease_ends:
                self._give_up_kv(account)
                expired.append(request)
        return expired

    def _settle(self, request: str) -> None:
        account = self._accounts[request]
        if account.released and account.holder is None:
            self._give_up_kv(account)
            del self._accounts[request]

    def _give_up_kv(self, account: _Account) -> None:
        """Takes all blocks from a request."""
        self.pool.give_back(account)
        account.written, account.lease_ends = False, None


def _nonsense(worker: str, expected: str, got: object) -> ArenaError:
    return ArenaError(
        "a worker gave keys that are not those of its KV blocks",
        where=worker,
        expected=expected,
        got=got,
    )
