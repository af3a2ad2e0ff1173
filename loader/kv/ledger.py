"""The ledger of KV blocks: which are free, whose the others are, and when they come back.

A request's blocks have at most one *holder*, the worker that reads and writes them, and are freed
only when nobody holds them: neither a cancelled request nor an expired lease ever frees memory
under a worker's hands.

Full blocks can be *published* under a key, which stands for all tokens up to the block's end; what
it is made of is the workers' affair (`runtime/worker/prefix.py`). From then on nobody writes to
them. A request that begins with the same tokens refers to them instead of computing them again,
and they outlive all requests: a block that none refers to any more is kept until its memory is
needed. A request refers to blocks from the first one on without a gap, so that blocks nobody
refers to are never continued by one that is in use; of these the one used longest ago is forgotten
first, and always after those that continue it.

Blocks can also be *reserved* for a request to come, while KV that is kept elsewhere is brought back
into them. What has come is published, and the request finds it as it finds all else.

Pure bookkeeping; sockets and clocks are the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coldframe.loader.errors import ArenaError

__all__ = ["BlockLedger", "Blocks", "KvUsage", "Named", "Reserved"]

Named = list[tuple[str, int]]
"""Published blocks: their keys, and which they are."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a request got.

    Args:
        blocks: In order, from its first token on.
        reused: How many of them, from the first, hold their tokens already and are not to be
            written to.
        forgotten: What was in some of the others, published and used by nobody.
    """

    blocks: list[int]
    reused: int
    forgotten: Named = field(default_factory=list)


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
class Reserved:
    """Blocks that belong to somebody, in the order of their tokens."""

    blocks: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Of the published blocks it refers to, from the first one on. A block of its own may stand
    in the place of one of them, where another request published the same tokens before it."""


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


@dataclass(slots=True)
class _Published:
    """A block that is read by many and written by nobody."""

    block: int
    references: int


class BlockLedger:
    """Who owns which KV block.

    Args:
        blocks: How many there are.
        lease_s: How long a request's blocks are kept while no worker holds them, in seconds.
        grow: Called where blocks are wanted that have no memory behind them yet, with how many
            from the first are to have some; returns how many have. Without it all have.

    Attributes:
        backed: How many of the blocks, from the first, have memory behind them.
    """

    def __init__(
        self, blocks: int, lease_s: float = 30.0, grow: Callable[[int], int] | None = None
    ) -> None:
        self.blocks = blocks
        self.lease_s = lease_s
        self.backed = blocks if grow is None else 0
        self._grow = grow
        self._reused = 0
        self._returned: deque[int] = deque()
        self._next = 0
        """Blocks from here on were never given out; however many there are, none is listed."""
        self._accounts: dict[str, _Account] = {}
        self._published: dict[str, _Published] = {}
        self._key_of: dict[int, str] = {}
        """The keys of the published blocks."""
        self._unused: dict[str, None] = {}
        """Keys that no request refers to, in the order in which they are forgotten."""
        self._changes: dict[str, bool] | None = None
        """Of keys that came or went since `take_changes`, whether they are published now."""

    @property
    def free(self) -> int:
        """Blocks that nobody has, those included that are kept until one needs them."""
        return len(self._returned) + self.blocks - self._next + len(self._unused)

    @property
    def usage(self) -> KvUsage:
        return KvUsage(self.blocks - self.free, len(self._unused), self.blocks, self._reused)

    @property
    def kept(self) -> Named:
        """The published blocks that none refers to, in the order in which they are forgotten."""
        return [(key, self._published[key].block) for key in self._unused]

    @property
    def requests(self) -> int:
        return len(self._accounts)

    def reset(self) -> bool:
        """Forgets what any block ever held, where none is in use. Whether that is so."""
        if self.free < self.blocks:
            return False
        self._returned.clear()
        self._next = 0
        for key in self._published:
            self._changed(key, published=False)
        self._published.clear()
        self._key_of.clear()
        self._unused.clear()
        return True

    def watch(self) -> None:
        """From now on, what is published and what is forgotten is kept for `take_changes`."""
        self._changes = dict.fromkeys(self._published, True)

    def take_changes(self) -> dict[str, bool]:
        """Whether the keys that came or went since the last time are published now.

        In the order of their last change; none where nobody watches.
        """
        if not self._changes:
            return {}
        changes, self._changes = self._changes, {}
        return changes

    def _changed(self, key: str, *, published: bool) -> None:
        if self._changes is not None:
            self._changes.pop(key, None)  # the latest is the last
            self._changes[key] = published

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
        got = self._give(account, count, keys)
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

    def found(self, keys: Sequence[str]) -> int:
        """How many of the keys, from the first, are published."""
        return len(self._find(keys))

    def forgets(self, count: int) -> bool:
        """Whether something would be forgotten to make room for so many blocks."""
        self._back(count)
        return count > self._clean

    def reserve(self, count: int, keys: Sequence[str]) -> tuple[Reserved, Blocks] | None:
        """Takes the blocks that a request is about to ask for, with what is published of its keys.

        They are nobody's until `give_back`, so that they can be written to.

        Returns:
            What is to be given back, and what there is; None where there are not enough.
        """
        reserved = Reserved()
        got = self._give(reserved, count, keys)
        return None if got is None else (reserved, got)

    def fill(self, reserved: Reserved, keys: Sequence[str]) -> Named:
        """Publishes what was brought into reserved blocks.

        Args:
            reserved: As `reserve` gave them.
            keys: Of all that is there now, from the first one on; those found first among them.

        Returns:
            The blocks that are published by this.
        """
        return self._publish(reserved, keys)

    def give_back(self, reserved: Reserved) -> None:
        """Lets reserved blocks go; what is published of them is kept. Any number of times."""
        self._give_up(reserved)

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
        return self._publish(account, keys)

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

    def _give(self, owner: Reserved, count: int, keys: Sequence[str]) -> Blocks | None:
        """Gives blocks to somebody who has none: all of them, or none."""
        found = self._find(keys)
        missing = range(count - len(found))
        # Before any is taken, lest they be forgotten to make room.
        self._refer(found)
        self._back(len(missing))
        if len(missing) > self._clean + len(self._unused):
            self._unrefer(found)
            return None
        forgotten: Named = []
        fresh = [self._take(forgotten) for _ in missing]
        owner.keys = found
        owner.blocks = [self._published[key].block for key in found] + fresh
        return Blocks(list(owner.blocks), len(found), forgotten)

    @property
    def _clean(self) -> int:
        """Blocks with memory behind them that hold nothing."""
        return len(self._returned) + max(0, self.backed - self._next)

    def _back(self, count: int) -> None:
        """Has memory put behind so many blocks that hold nothing, as far as there is any."""
        if self._grow is None or count <= self._clean or self.backed == self.blocks:
            return
        wanted = min(self.blocks, max(self.backed, self._next) + count - self._clean)
        self.backed = self._grow(wanted)

    def _publish(self, owner: Reserved, keys: Sequence[str]) -> Named:
        known, new = len(owner.keys), []
        for block, key in zip(owner.blocks[known:], keys[known:], strict=False):
            if key in self._published:
                self._refer([key])
            else:
                self._published[key] = _Published(block, 1)
                self._key_of[block] = key
                self._changed(key, published=True)
                new.append((key, block))
            owner.keys.append(key)
        return new

    def _give_up_kv(self, account: _Account) -> None:
        """Takes all blocks from a request."""
        self._give_up(account)
        account.written, account.lease_ends = False, None

    def _give_up(self, owner: Reserved) -> None:
        self._returned.extend(block for block in owner.blocks if block not in self._key_of)
        self._unrefer(owner.keys)
        owner.blocks, owner.keys = [], []

    def _take(self, forgotten: Named) -> int:
        """A block for a new owner; there is one. What it held is added to what is forgotten."""
        if self._returned:
            return self._returned.popleft()
        if self._next < self.backed:
            self._next += 1
            return self._next - 1
        key = next(iter(self._unused))
        del self._unused[key]
        block = self._published.pop(key).block
        del self._key_of[block]
        forgotten.append((key, block))
        self._changed(key, published=False)
        return block

    def _find(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys, from the first, whose blocks are there."""
        found = []
        for key in keys:
            if key not in self._published:
                break
            found.append(key)
        return found

    def _refer(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._published[key].references += 1
            self._unused.pop(key, None)

    def _unrefer(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):  # what continues a block is forgotten before it
            published = self._published[key]
            published.references -= 1
            if not published.references:
                self._unused[key] = None


def _nonsense(worker: str, expected: str, got: object) -> ArenaError:
    return ArenaError(
        "a worker gave keys that are not those of its KV blocks",
        where=worker,
        expected=expected,
        got=got,
    )
