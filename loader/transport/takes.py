"""What is being brought from other replicas, by threads of its own.

A worker asks for KV with a ticket, is told that it is on its way, and asks again when it hears that
it is there: neither it nor the service's loop waits for a network. The blocks stay the worker's
while they are written to, whatever becomes of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coldframe.loader.errors import ColdframeError, TransferBroken, TransferRefused
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.transport.base import Taker, Ticket, Transfer, Way

__all__ = ["Take", "TakeThreads", "ways_from"]

_THREADS = 8
"""Requests whose KV comes at once, at most; each is as fast as the link lets it."""


@dataclass(eq=False, slots=True)
class Take:
    """The KV of one request, on its way.

    Args:
        connection: The worker that waits for it.
        request: Whose.
        attempt: The worker's.
        got: Its blocks here.
        nbytes: What of it is to come.
    """

    connection: Connection
    request: str
    attempt: int
    got: Blocks
    nbytes: int
    running: bool = True
    abandoned: bool = False
    error: ColdframeError | None = None
    stop: Callable[[], None] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others: the worker's connection and the request."""
        return self.connection.key, self.request

    def watch(self, stop: Callable[[], None]) -> None:
        """What breaks it off from now on."""
        self.stop = stop
        if self.abandoned:
            stop()

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.abandoned = True
        if self.stop is not None:
            self.stop()


class TakeThreads:
    """Runs what takes long, a few at once; threads are started as they are needed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._lock = threading.Lock()

    def run(
        self,
        take: Take,
        transfer: Transfer,
        ways: Sequence[tuple[Taker, Way]],
        done: Callable[[ColdframeError | None], None],
    ) -> None:
        """Brings blocks by the first way that works.

        Args:
            take: What is abandoned where nobody waits for it any more.
            transfer: What is brought.
            ways: In the order in which they are tried.
            done: Told by the thread when nothing is written to the arena any more.
        """
        with self._lock:
            self._busy += 1
            if self._busy > len(self._threads) and len(self._threads) < _THREADS:
                thread = threading.Thread(target=self._work, name="kv-take", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._jobs.put(lambda: done(_bring(take, transfer, ways)))

    def close(self) -> None:
        """Waits for what runs, which is to be abandoned before."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            finally:
                with self._lock:
                    self._busy -= 1


def _bring(
    take: Take, transfer: Transfer, ways: Sequence[tuple[Taker, Way]]
) -> ColdframeError | None:
    """Brings blocks; why that could not be done, where it could not."""
    error: ColdframeError | None = None
    for taker, way in ways:
        try:
            taker.take(transfer, way, take.watch)
        except ColdframeError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - the sender may say anything
            error = TransferBroken("the sender cannot be understood", got=repr(failure))
        else:
            return None
        if take.abandoned or isinstance(error, TransferRefused):
            break  # it would say the same by any other way
    return error


def ways_from(
    ticket: Ticket, takers: Mapping[str, Taker], order: Sequence[str]
) -> list[tuple[Taker, Way]]:
    """The ways of a ticket that can be gone from here.

    Args:
        ticket: The ticket.
        takers: Those there are here, by name.
        order: In which they are tried.

    Raises:
        TransferRefused: There is none, and why.
    """
    found: list[tuple[Taker, Way]] = []
    why: list[str] = []
    for name in order:
        for way in ticket.ways:
            if way.transport != name:
                continue
            taker = takers.get(name)
            refusal = "it is not to be used here" if taker is None else taker.refusal(way)
            if taker is not None and refusal is None:
                found.append((taker, way))
            else:
                why.append(f"{name}: {refusal}")
    if not found:
        raise TransferRefused(
            "there is no way to this KV from here",
            where=ticket.request,
            got="; ".join(why) or "no way that is known here",
        )
    return found
