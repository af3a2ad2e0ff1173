"""The KV store: blocks that leave the arena go to host memory and to disk, and come back.

Blocks are written to disk behind the tokens, from the arena, soon after they are published: what
is killed then has lost little. What is forgotten by the ledger goes to host memory first, if it is
to be kept there or has not been written yet. Whatever fails here, a block is computed instead.

What lies in the arena may be read here only while it is known to be published (`published`, until
`forgotten`): each copy is made under the lock that `forgotten` takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

from coldframe.loader.kv.disk import KvDisk, is_key
from coldframe.loader.kv.fetch import ORDER_NS, Fetch
from coldframe.loader.kv.ledger import Named
from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.kv.ram import KvMemory
from coldframe.loader.kv.tally import KvTally, StoreUsage
from coldframe.loader.kv.writer import KvWriter, say
from coldframe.loader.memory import Memory, borrowed

__all__ = ["KvStore"]

_READERS = 4
_PASSING_BYTES = 64 << 20
"""Host memory for blocks that have left the arena and are not written yet."""


class KvStore:
    """Both tiers, the threads that serve them, and the arena as they see it.

    Args:
        options: Where and how much.
        arena: The arena's bytes.
        block_bytes: Of one block.
    """

    def __init__(self, options: KvStoreOptions, arena: Memory, block_bytes: int) -> None:
        self.fresh_s = 300.0
        """For so long a block counts as used just now: its file need not be told again."""
        self._options = options
        self._arena = arena
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._blocks: dict[str, int] = {}
        """Where in the arena published blocks are."""
        self._used: dict[str, float] = {}
        """When their files were told last that they are used."""
        self._kept = options.memory // block_bytes
        passing = 0 if options.directory is None else max(8, _PASSING_BYTES // block_bytes)
        self._memory = KvMemory(block_bytes, self._kept, passing)
        self._disk: KvDisk | None = None
        self._writer: KvWriter | None = None
        self._tally = KvTally()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._closed = False

    # -- what the service says -------------------------------------------------------------------

    def open_disk(self, identity: str | None) -> None:
        """The model is known: its files can be read, and once it `may_write`, written.

        Args:
            identity: What tells its weights from all others; without it nothing is kept on disk.
        """
        options = self._options
        if options.directory is None:
            return
        if identity is None:
            say("keeps nothing on disk: without a seal nobody can tell which weights these are")
            return
        identity = f"{identity}\0{options.kv_format}\0{self._block_bytes}"
        self._disk = KvDisk(options.directory, identity, options.max_bytes)
        self._writer = KvWriter(
            self._disk, self._block_bytes, self._copy_out, self._settled, self._tally
        )

    def may_write(self) -> None:
        """The weights are in and known to be the right ones: nothing is in the way any more."""
        if self._writer is not None and not self._closed:
            self._writer.start()

    def usage(self) -> StoreUsage:
        with self._lock:
            self._tally.set("memory_bytes", self._memory.nbytes)
        return self._tally.usage()

    def close(self, patience_s: float) -> None:
        """Writes what is not written yet, as far as that goes in some seconds, and ends."""
        self._closed = True
        if self._writer is not None:
            self._writer.close(patience_s)
        for _ in self._readers:
            self._work.put(None)

    @staticmethod
    def are_keys(texts: Iterable[str]) -> bool:
        """Whether all of them can name a block's file, and no other."""
        return all(map(is_key, texts))

    # -- what the ledger says --------------------------------------------------------------------

    def published(self, blocks: Named, *, fetched: bool = False) -> None:
        """Blocks hold what they are to hold, and nobody writes to them until they are forgotten.

        Args:
            blocks: In the order of their tokens.
            fetched: Whether they came from here.
        """
        with self._lock:
            self._blocks.update(blocks)
        if fetched:
            moment = time.monotonic()
            self._used.update((key, moment) for key, _ in blocks)
        else:
            self._offer([key for key, _ in blocks])

    def used(self, keys: Sequence[str]) -> None:
        """Published blocks are used again: their files are to know, now and then."""
        late = time.monotonic() - self.fresh_s
        self._offer([key for key in keys if self._used.get(key, 0.0) < late])

    def saves(self) -> bool:
        """Whether something that is forgotten now would have to be copied first."""
        return self._kept > 0 or (self._writer is not None and not self._writer.idle)

    def forgotten(self, blocks: Named) -> None:
        """Blocks are about to be written to for somebody else; any thread may call this.

        After it nothing here looks at them any more.
        """
        for key, block in blocks:
            with self._lock:
                # Somebody may have published the same anew, elsewhere.
                if self._blocks.get(key) == block:
                    del self._blocks[key]
                    self._used.pop(key, None)
                    self._save(key, block, keep=self._kept > 0)

    def leave_arena(self, blocks: Named, patience_s: float, done: Callable[[], None]) -> None:
        """Gets ready for the loss of all memory of the arena, where nobody uses any of it.

        Args:
            blocks: All that are published, the ones used longest ago first.
            patience_s: How long it may take to write what is not written yet.
            done: Called by another thread when no more is to be saved. Then call `arena_lost`.
        """

        def leave() -> None:
            if self._writer is not None:
                self._writer.wait_idle(patience_s)
            old = len(blocks) - self._kept
            for place, (key, block) in enumerate(blocks):
                with self._lock:
                    # A request that comes meanwhile may have got it.
                    if self._blocks.get(key) == block:
                        self._save(key, block, keep=place >= old)
            done()

        self._do(leave)

    def arena_lost(self) -> None:
        """The memory of all blocks is given back."""
        with self._lock:
            self._blocks.clear()
        self._used.clear()

    # -- back to the arena -----------------------------------------------------------------------

    def fetch(
        self,
        forgotten: Named,
        keys: Sequence[str],
        blocks: Sequence[int],
        done: Callable[[int], None],
    ) -> None:
        """Brings KV back into blocks that are nobody's.

        Args:
            forgotten: What is in some of them; it is saved first.
            keys: What is wanted, in the order of its tokens.
            blocks: Where it is to go.
            done: Called by another thread with how many of them, from the first, are there now;
                the others hold nothing. Nothing is written to them any more then.
        """

        def fetched(loaded: Sequence[str]) -> None:
            for name in loaded:
                self._tally.add(name)
            done(len(loaded))

        fetch = Fetch(self._fill, keys, blocks, fetched)

        def save_and_fetch() -> None:
            with self._lock:
                # Before others take its place. What continues a block goes before it.
                for key in reversed(keys):
                    self._memory.touch(key)
            self.forgotten(forgotten)
            for _ in range(min(_READERS, len(keys)) - 1):
                self._do(fetch.run)
            fetch.run()

        self._do(save_and_fetch)

    def _fill(self, key: str, block: int, used_ns: int) -> str | None:
        with borrowed(self._arena, self._place(block), self._block_bytes, write=True) as into:
            return self._load(key, into, used_ns)

    def _load(self, key: str, into: memoryview, used_ns: int) -> str | None:
        """Reads a block to its place: as what it counts then; None where it is not there."""
        with self._lock:
            if self._memory.read(key, into):
                return "memory_loaded"
        if self._disk is None:
            return None
        try:
            found = self._disk.read(key, into, used_ns)
        except OSError:
            self._tally.add("unreadable")
            return None
        if found is None:
            self._tally.add("corrupt")
        return "disk_loaded" if found else None

    # -- what is in the arena --------------------------------------------------------------------

    def _offer(self, keys: Sequence[str]) -> None:
        if self._writer is None:
            return
        moment, moment_ns = time.monotonic(), time.time_ns()
        for place, key in enumerate(keys):
            self._used[key] = moment
            self._writer.offer(key, moment_ns - place * ORDER_NS)

    def _save(self, key: str, block: int, *, keep: bool) -> None:
        """Copies a block to host memory, to be kept or because it must; the lock is held."""
        must = self._writer is not None and self._writer.waits(key)
        if not must and not keep:
            return
        known = key in self._memory
        with borrowed(self._arena, self._place(block), self._block_bytes) as data:
            stored = self._memory.put(key, data, must=must)
        if stored:
            if not known:
                self._tally.add("memory_stored")
        elif must and self._writer is not None:
            self._writer.give_up(key)

    def _copy_out(self, key: str, buffer: memoryview) -> bool:
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                return self._memory.read(key, buffer)
            self._arena.read(self._place(block), buffer)
            return True

    def _settled(self, key: str) -> None:
        with self._lock:
            self._memory.release(key)

    def _place(self, block: int) -> int:
        return block * self._block_bytes

    # -- threads ---------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        """Has a reader do something. The first to ask is the service's loop."""
        if not self._readers:
            for _ in range(_READERS):
                thread = threading.Thread(target=self._read, name="kv-reader", daemon=True)
                self._readers.append(thread)
                thread.start()
        self._work.put(work)

    def _read(self) -> None:
        while (work := self._work.get()) is not None:
            work()
