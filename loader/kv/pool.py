"""The pool of KV blocks: which are free, and what the others hold.

Full blocks can be *published* under a key, which stands for all tokens up to the block's end; what
it is made of is the workers' affair (`runtime/worker/prefix.py`). From then on nobody writes to
them. Whoever begins with the same tokens refers to them instead of computing them again, and they
outlive all requests: a block that none refers to any more is kept until its memory is needed. One
refers to blocks from the first one on without a gap, so that blocks nobody refers to are never
continued by one that is in use; of these the one used longest ago is forgotten first, and always
after those that continue it.

Blocks can also be *reserved* for a request to come, while KV that is kept elsewhere is brought back
into them. What has come is published, and the request finds it as it finds all else.

Pure bookkeeping; who may have blocks is the ledger's to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["BlockPool", "Blocks", "Named", "Reserved"]

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


@dataclass(slots=True)
class Reserved:
    """Blocks that belong to somebody, in the order of their tokens."""

    blocks: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Of the published blocks it refers to, from the first one on. A block of its own may stand
    in the place of one of them, where another request published the same tokens before it."""


@dataclass(slots=True)
class _Published:
    """A block that may be read by all who begin with its tokens."""

    block: int
    references: int


class BlockPool:
    """All blocks.

    Args:
        blocks: How many there are.
        grow: Called where blocks are wanted that have no memory behind them yet, with how many
            from the first are to have some; returns how many have. Without it all have.

    Attributes:
        blocks: How many there are.
        backed: How many of them, from the first, have memory behind them.
    """

    def __init__(self, blocks: int, grow: Callable[[int], int] | None = None) -> None:
        self.blocks = blocks
        self.backed = blocks if grow is None else 0
        self._grow = grow
        self._returned: deque[int] = deque()
        self._next = 0
        """Blocks from here on were never given out; however many there are, none is listed."""
        self._published: dict[str, _Published] = {}
        self._key_of: dict[int, str] = {}
        """The keys of the published blocks."""
        self._unused: dict[str, None] = {}
        """Keys that nobody refers to, in the order in which they are forgotten."""
        self._changes: dict[str, bool] | None = None
        """Of keys that came or went since `take_changes`, whether they are published now."""

    @property
    def free(self) -> int:
        """Blocks that nobody has, those included that are kept until one needs them."""
        return len(self._returned) + self.blocks - self._next + len(self._unused)

    @property
    def kept(self) -> Named:
        """The published blocks that none refers to, in the order in which they are forgotten."""
        return [(key, self._published[key].block) for key in self._unused]

    @property
    def cached(self) -> int:
        """How many those are."""
        return len(self._unused)

    def found(self, keys: Sequence[str]) -> int:
        """How many of the keys, from the first, are published."""
        return len(self._find(keys))

    def forgets(self, count: int) -> bool:
        """Whether something would be forgotten to make room for so many blocks."""
        self._back(count)
        return count > self._clean

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

    # -- who watches -----------------------------------------------------------------------------

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

    # -- given, filled, given back ---------------------------------------------------------------

    def reserve(self, count: int, keys: Sequence[str]) -> tuple[Reserved, Blocks] | None:
        """Takes the blocks that a request is about to ask for, with what is published of its keys.

        They are nobody's until `give_back`, so that they can be written to.

        Returns:
            What is to be given back, and what there is; None where there are not enough.
        """
        reserved = Reserved()
        got = self.give(reserved, count, keys)
        return None if got is None else (reserved, got)

    def give(self, owner: Reserved, count: int, keys: Sequence[str]) -> Blocks | None:
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

    def fill(self, owner: Reserved, keys: Sequence[str]) -> Named:
        """Publishes what was written into somebody's blocks.

        Args:
            owner: Whose.
            keys: Of all that is there now, from the first one on; those found first among them.

        Returns:
            The blocks that are published by this.
        """
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

    def give_back(self, owner: Reserved) -> None:
        """Lets somebody's blocks go; what is published of them is kept. Any number of times."""
        self._returned.extend(block for block in owner.blocks if block not in self._key_of)
        self._unrefer(owner.keys)
        owner.blocks, owner.keys = [], []

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

    # -- what is published -----------------------------------------------------------------------

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
