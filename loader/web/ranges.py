"""The reader of ranges: bytes of a store's files, straight into memory, whatever happens.

One implementation for S3, HTTP, the Hugging Face hub and peers: an `Address` says how a request is
made and what a refusal means. What is here is the same for all: connections that are kept, only
the lost part asked for again, one version of each file from the first byte to the last, no more
requests at once than pay off, and a second request for what is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from coldframe.loader.throttle import Throttle
from coldframe.loader.web import answers
from coldframe.loader.web.address import Address
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.concurrency import Limiter
from coldframe.loader.web.connection import Connection
from coldframe.loader.web.dial import Dialler
from coldframe.loader.web.exchange import Exchange, Told
from coldframe.loader.web.hedging import Flight, Hedger
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.parts import Parts
from coldframe.loader.web.patience import Patience
from coldframe.loader.web.pool import Pool, cancelled_error

__all__ = ["Counters", "Opening", "RangeReader"]

_T = TypeVar("_T")

_PREFETCH = 512 << 10
_PIECE = 1 << 20
"""What one system call receives at most: about a thousand of them for a gigabyte."""
_SMALLEST_PIECE = 64 << 10
_THROTTLED_PIECE_S = 0.005


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a file.

    Attributes:
        data: Its first bytes.
        size: Bytes in all of it.
        version: What changes when its content does: an ETag, or when it was modified; empty where
            the server says neither.
    """

    data: bytes
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Counters:
    """What has been done so far.

    Attributes:
        nbytes: Bytes of ranges that came.
        requests: Requests that were sent.
        retries: Requests that were sent again, after a failure.
        hedges: Ranges that were asked for twice since they were slow.
        hedges_won: Those of them where the second request was first.
        connections: The most ranges that were read at once.
    """

    nbytes: int
    requests: int
    retries: int
    hedges: int
    hedges_won: int
    connections: int


class RangeReader:
    """Reads the files of an address. Safe for several threads.

    Args:
        address: Where they are.
        throttle: A limit on the rate, over all its connections.
        limits: Patience and concurrency.
        ca_file: Certificates to trust in place of the system's, or what tells their file.
    """

    def __init__(
        self,
        address: Address,
        *,
        throttle: Throttle | None = None,
        limits: Limits | None = None,
        ca_file: str | Callable[[], str | None] | None = None,
    ) -> None:
        self.address = address
        self.limits = limits = limits or Limits()
        self._throttle = throttle
        self._piece = _PIECE
        if throttle is not None:
            shorter = int(throttle.rate * _THROTTLED_PIECE_S)
            self._piece = min(_PIECE, max(_SMALLEST_PIECE, shorter))
        self._cancelled = threading.Event()
        self._pool = Pool(Dialler(limits, ca_file))
        self._exchange = Exchange(address, self._pool)
        self._limiter = Limiter(limits.first_connections, limits.connections)
        self._hedger = Hedger(limits, self._fetch_again, lambda: self._limiter.calm)
        self._lock = threading.Lock()
        self._nbytes = 0
        self._retries = 0

    @property
    def counters(self) -> Counters:
        hedger, requests, peak = self._hedger, self._exchange.requests, self._limiter.peak
        return Counters(self._nbytes, requests, self._retries, hedger.hedges, hedger.won, peak)

    def read_small(self, name: str, limit: int) -> bytes:
        """All of a small file.

        Args:
            name: The file.
            limit: Bytes that it may have.

        Raises:
            SourceNotFound: There is none.
            SourceError: It could not be read.
            CheckpointError: It has more bytes.
        """
        where = self.address.uri_of(name)

        def attempt() -> bytes:
            with self._exchange.ask(name, {}, where) as (connection, head):
                if head.status != 200:
                    raise answers.unasked(head, where)
                if (head.length or 0) > limit:
                    raise answers.too_large(where, limit, f"{head.length} bytes")
                content = connection.read(limit + 1)
                if len(content) > limit:
                    raise answers.too_large(where, limit, "more")
                return content

        return self._persist(attempt, where)

    def open(self, name: str, nbytes: int = _PREFETCH) -> Opening:
        """The first bytes of a file, its size and its version, in one request.

        Args:
            name: The file.
            nbytes: How many; fewer come where the file has no more.

        Raises:
            SourceNotFound: There is none.
            SourceError: It could not be read.
        """
        where = f"{self.address.uri_of(name)}, bytes 0-{nbytes - 1}"
        headers = {"Range": f"bytes=0-{nbytes - 1}"}

        def attempt() -> Opening:
            with self._exchange.ask(name, headers, where) as (connection, head):
                version = answers.version_of(head)
                if head.status == 416 and not answers.size_behind(head.headers):
                    return Opening(b"", 0, version)
                if head.status == 206:
                    size = answers.check_part(head, 0, nbytes - 1, None, where)
                elif head.status == 200 and head.length is not None and head.length <= nbytes:
                    size = head.length
                else:
                    raise answers.unasked(head, where)
                buffer = memoryview(bytearray(min(nbytes, size)))
                self._receive(connection, Parts([buffer]))
                return Opening(bytes(buffer), size, version)

        return self._persist(attempt, where)

    def read_into(
        self, name: str, version: str, size: int, offset: int, parts: Sequence[memoryview]
    ) -> None:
        """Fills buffers, one after the other, with a file's bytes from an offset on.

        After a fault only what is missing is asked for again.

        Args:
            name: The file.
            version: The one to read, as `open` told it.
            size: Bytes in the file, as `open` told it.
            offset: Where to begin.
            parts: The buffers.

        Raises:
            SourceChanged: The file is not that one any more.
            SourceError: The bytes could not be had. What is in the buffers is undefined.
        """
        todo = Parts(parts)
        end = offset + todo.left
        where = f"{self.address.uri_of(name)}, bytes {offset}-{end - 1}"
        patience = Patience(self.limits, where, self._cancelled)
        urgent = False
        while left := todo.left:
            asked = time.monotonic()
            if not self._limiter.acquire(urgent=urgent):
                raise cancelled_error()
            patience.excuse(time.monotonic() - asked)
            pause = 0.0
            try:
                self._fly(Flight(name, version, size, end, todo, time.monotonic()), where)
            except Broken as broken:
                if todo.left < left:
                    patience.progress()
                pause = self._failed(patience, broken)
            finally:
                self._limiter.release()
            urgent = True
            patience.pause(pause)

    def cancel(self) -> None:
        """Makes all reads end soon, with an error; from any thread."""
        self._cancelled.set()
        self._limiter.close()
        self._pool.close()

    def close(self) -> None:
        """Gives connections and threads back."""
        self.cancel()
        self._hedger.close()

    def _fly(self, flight: Flight, where: str) -> None:
        """One attempt at what a range misses. What comes before it breaks is in its place."""
        self._hedger.began(flight)
        try:
            self._ask_range(flight, flight.parts, where, flight.reads_from)
        except Broken:
            flight.landed()
            if not flight.take_rescue():
                raise
        finally:
            flight.landed()
            self._hedger.ended(flight, complete=not flight.parts.left)

    def _fetch_again(self, flight: Flight, offset: int, buffer: memoryview) -> None:
        where = f"{self.address.uri_of(flight.name)}, bytes {offset}-{flight.end - 1}"
        try:
            self._ask_range(flight, Parts([buffer]), where, flight.helped_by)
        finally:
            flight.helped_by(None)

    def _ask_range(self, flight: Flight, parts: Parts, where: str, told: Told) -> None:
        """Asks once for the bytes before a flight's end that parts have room for."""
        size, version = flight.size, flight.version
        first, last = flight.end - parts.left, flight.end - 1
        headers = {"Range": f"bytes={first}-{last}", **answers.condition(version)}
        with self._exchange.ask(flight.name, headers, where, told) as (connection, head):
            answers.check_version(head, version, where)
            if head.status == 206:
                answers.check_part(head, first, last, size, where)
            elif head.status == 200 and (first, last) == (0, size - 1):
                answers.check_whole(head, size, where)
            else:
                raise answers.unasked(head, where, size)
            self._receive(connection, parts)

    def _receive(self, connection: Connection, parts: Parts) -> None:
        booked, arrives = 0, 0.0
        while parts.left:
            buffers = parts.next(self._piece)
            if self._throttle is not None:
                wanted = sum(map(len, buffers))
                arrives = self._throttle.book(max(0, wanted - booked))
                booked = max(booked, wanted)
            count = connection.receive(buffers)
            booked -= count
            parts.advance(count)
            self._limiter.moved(count)
            with self._lock:
                self._nbytes += count
            if self._throttle is not None:
                self._cancelled.wait(max(0.0, arrives - time.monotonic()))

    def _persist(self, attempt: Callable[[], _T], where: str) -> _T:
        """Tries until it works or patience ends; each time from the start."""
        patience = Patience(self.limits, where, self._cancelled)
        while True:
            try:
                return attempt()
            except Broken as broken:
                patience.pause(self._failed(patience, broken))

    def _failed(self, patience: Patience, broken: Broken) -> float:
        """The pause before the next attempt."""
        pause = patience.failed(broken)
        if broken.slow_down:
            self._limiter.slow_down()
        if not broken.at_once:
            with self._lock:
                self._retries += 1
        return pause
