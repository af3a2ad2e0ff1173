"""The ledger of KV blocks: which are free, whose the others are, and when they come back.

A block is in one place at any time: free, granted to a worker (its own pocket), or owned by a
request. A request's blocks have at most one *holder*, the worker that reads and writes them, and
are freed only when nobody holds them: neither a cancelled request nor an expired lease ever
frees memory under a worker's hands. Pure bookkeeping; sockets and clocks are the caller's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from coldframe.loader.errors import ArenaError

__all__ = ["BlockLedger"]


@dataclass(slots=True)
class _Account:
    """What the ledger knows of one request."""

    gateway: str
    attempt: int = -1
    holder: str | None = None
    blocks: list[int] = field(default_factory=list)
    released: bool = False
    lease_ends: float | None = None


class BlockLedger:
    """Who owns which KV block.

    Args:
        blocks: How many there are.
        lease_s: How long a request's blocks are kept while no worker holds them, in seconds.
    """

    def __init__(self, blocks: int, lease_s: float = 30.0) -> None:
        self.blocks = blocks
        self.lease_s = lease_s
        self._returned: deque[int] = deque()
        self._next = 0
        """Blocks from here on were never granted; however many there are, none is listed."""
        self._pockets: dict[str, set[int]] = {}
        self._accounts: dict[str, _Account] = {}

    @property
    def free(self) -> int:
        return len(self._returned) + self.blocks - self._next

    @property
    def used(self) -> int:
        """Blocks that belong to requests; what is in a worker's pocket can still go to any."""
        return sum(len(account.blocks) for account in self._accounts.values())

    @property
    def requests(self) -> int:
        return len(self._accounts)

    def reset(self) -> bool:
        """Forgets which blocks were ever granted, where all of them are free. Whether they are."""
        if self.free < self.blocks:
            return False
        self._returned.clear()
        self._next = 0
        return True

    def open(self, request: str, gateway: str) -> None:
        """A request comes to life; it ends with `release` or with its gateway."""
        self._accounts.setdefault(request, _Account(gateway))

    def release(self, request: str) -> None:
        """The request is over. Its blocks are freed, once its holder has dropped them."""
        account = self._accounts.get(request)
        if account is not None:
            account.released = True
            self._settle(request)

    def grant(self, worker: str, count: int) -> list[int]:
        """Moves up to `count` free blocks into a worker's pocket: all of them, or none."""
        if count > self.free:
            return []
        used = min(count, len(self._returned))
        taken = [self._returned.popleft() for _ in range(used)]
        taken += range(self._next, self._next + count - used)
        self._next += count - used
        self._pockets.setdefault(worker, set()).update(taken)
        return taken

    def give_back(self, worker: str, blocks: list[int]) -> None:
        self._take_from_pocket(worker, blocks)
        self._returned.extend(blocks)

    def assign(self, worker: str, request: str, attempt: int, blocks: list[int]) -> bool:
        """Moves blocks from a worker's pocket to a request, which the worker then holds.

        A newer attempt replaces what an older one has left; on the same attempt it adds.

        Returns:
            False where the request has ended or another holds it; the blocks stay in the pocket.
        """
        account = self._accounts.get(request)
        if account is None or account.released or attempt < account.attempt:
            return False
        if account.holder not in (None, worker):
            return False
        self._take_from_pocket(worker, blocks)
        if attempt > account.attempt:
            self._returned.extend(account.blocks)
            account.blocks = []
        account.attempt, account.holder, account.lease_ends = attempt, worker, None
        account.blocks.extend(blocks)
        return True

    def claim(self, worker: str, request: str, attempt: int) -> list[int] | None:
        """Makes a worker the holder of a request's blocks.

        Returns:
            The blocks in order, or None where the request has ended, its lease has run out,
            another holds it, or the attempt is an old one.
        """
        account = self._accounts.get(request)
        if account is None or account.released or attempt < account.attempt:
            return None
        if account.holder not in (None, worker) or not account.blocks:
            return None
        account.attempt, account.holder, account.lease_ends = attempt, worker, None
        return list(account.blocks)

    def drop(self, worker: str, request: str, now: float) -> None:
        """The worker lets go: it touches the request's blocks no more. The lease starts."""
        account = self._accounts.get(request)
        if account is not None and account.holder == worker:
            account.holder, account.lease_ends = None, now + self.lease_s
            self._settle(request)

    def renew(self, request: str, now: float) -> None:
        """Starts the lease again: whoever passed the request on still cares for it."""
        account = self._accounts.get(request)
        if account is not None and account.lease_ends is not None:
            account.lease_ends = now + self.lease_s

    def worker_gone(self, worker: str, now: float) -> None:
        """A worker died: its pocket is free, what it held waits for another."""
        self._returned.extend(self._pockets.pop(worker, set()))
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
                self._returned.extend(account.blocks)
                account.blocks, account.lease_ends = [], None
                expired.append(request)
        return expired

    def _settle(self, request: str) -> None:
        account = self._accounts[request]
        if account.released and account.holder is None:
            self._returned.extend(account.blocks)
            del self._accounts[request]

    def _take_from_pocket(self, worker: str, blocks: list[int]) -> None:
        pocket = self._pockets.get(worker, set())
        if len(set(blocks)) != len(blocks) or not pocket.issuperset(blocks):
            raise ArenaError(
                "a worker disposed of KV blocks that it was not granted",
                where=worker,
                expected=f"some of {len(pocket)} granted",
                got=str(sorted(set(blocks) - pocket)[:8]),
            )
        pocket.difference_update(blocks)
