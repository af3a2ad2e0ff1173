"""Writes KV blocks to disk behind the tokens, in the order in which they were published.

That is one thread. It starts when the weights are in, so as not to take the disk from them. Where
it cannot write (no space, a file system that may only be read, a broken disk) it pauses, ever
longer, says so once, and goes on when it can.

The thread has no lower priority than others: whatever holds Python's lock and is not let run would
hold up the service's loop, and what this takes of a core is little.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from coldframe.loader.kv.disk import KvDisk
from coldframe.loader.kv.tally import KvTally

__all__ = ["KvWriter", "say"]

_FIRST_PAUSE_S = 1.0
_MOST_PAUSE_S = 60.0


class KvWriter:
    """The queue of what is to be written, and the thread.

    Args:
        disk: Where to.
        block_bytes: Of one block.
        copy_out: Copies a block, by its key, to a buffer; returns whether it is still there.
        settled: Called with each key that needs no writing any more.
        tally: Counts.
    """

    def __init__(
        self,
        disk: KvDisk,
        block_bytes: int,
        copy_out: Callable[[str, memoryview], bool],
        settled: Callable[[str], None],
        tally: KvTally,
    ) -> None:
        self._disk = disk
        self._copy_out = copy_out
        self._settled = settled
        self._tally = tally
        self._buffer = memoryview(bytearray(block_bytes))
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, int] = OrderedDict()
        """By key: when it was used last."""
        self._pause_s = 0.0
        """How long this pause is; 0 where there is none."""
        self._retry_at = 0.0
        self._end_at: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to write, where it has not."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
            self._thread.start()

    def offer(self, key: str, used_ns: int) -> None:
        """A block is to be on disk, if it is not, and its file to say when it was used."""
        with self._changed:
            self._waiting.setdefault(key, used_ns)
            self._changed.notify_all()

    def waits(self, key: str) -> bool:
        """Whether a block is still to be written."""
        return key in self._waiting

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be written."""
        return not self._waiting

    def give_up(self, key: str) -> None:
        """A block is lost."""
        with self._changed:
            if self._waiting.pop(key, None) is not None:
                self._tally.add("unwritten")

    def wait_idle(self, patience_s: float) -> None:
        """Waits until all is written, or can not be at the moment; at most so many seconds."""
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._waiting and self._thread is not None and not self._pause_s:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def close(self, patience_s: float) -> None:
        """Writes what is left, as far as that goes in some seconds, and ends."""
        if self._thread is None:
            return
        with self._changed:
            self._end_at = time.monotonic() + patience_s
            self._changed.notify_all()
        self._thread.join(patience_s)  # a disk that hangs is left to the end of the process

    def _run(self) -> None:
        while (found := self._next()) is not None:
            key, used_ns = found
            try:
                self._write(key, used_ns)
            except OSError as error:
                self._pause(key, error)
            else:
                self._done(key)

    def _next(self) -> tuple[str, int] | None:
        """The next one to be written; None at the end."""
        while True:
            disk = self._disk
            free = not self._waiting or self._pause_s
            if self._end_at is None and (disk.must_sweep or (disk.may_sweep and free)):
                with suppress(OSError):  # what cannot be read now is looked at later
                    disk.sweep(lambda: self._end_at is not None)
                self._tally.set("disk_bytes", disk.nbytes)
            with self._changed:
                moment = time.monotonic()
                if self._end_at is not None and (
                    self._pause_s or not self._waiting or moment > self._end_at
                ):
                    return None
                wait_s = self._retry_at - moment if self._waiting else None
                if wait_s is not None and wait_s <= 0:
                    return next(iter(self._waiting.items()))
                self._changed.wait(wait_s)

    def _write(self, key: str, used_ns: int) -> None:
        if self._disk.touch(key, len(self._buffer), used_ns):
            return
        if not self._copy_out(key, self._buffer):
            self.give_up(key)
            return
        self._disk.write(key, self._buffer, used_ns)
        self._go_on()
        self._tally.set("disk_bytes", self._disk.nbytes)
        self._tally.add("disk_stored")

    def _done(self, key: str) -> None:
        with self._changed:
            self._waiting.pop(key, None)
            self._changed.notify_all()
        self._settled(key)

    def _pause(self, key: str, error: OSError) -> None:
        first = not self._pause_s
        with self._changed:
            if key in self._waiting:
                self._waiting.move_to_end(key)  # it may be the one block's own fault
            self._pause_s = min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _MOST_PAUSE_S)
            self._retry_at = time.monotonic() + self._pause_s
            self._changed.notify_all()
        self._tally.set("paused", 1)
        if first:
            self._tally.add("pauses")
            say(f"cannot be written: {error.strerror}, in {self._disk.root}; reading goes on")

    def _go_on(self) -> None:
        if self._pause_s:
            with self._changed:
                self._pause_s = 0.0
            self._tally.set("paused", 0)
            say("is written again")


def say(what: str) -> None:
    """Tells people what the store does, and not how often."""
    with suppress(OSError):
        print(f"coldframe memory: the KV store {what}", file=sys.stderr)
