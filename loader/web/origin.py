"""A checkpoint in a store: its small files, its headers and its weights, over the range reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from coldframe.loader.errors import (
    ColdframeError,
    SourceCredentials,
    SourceDenied,
    SourceNotFound,
)
from coldframe.loader.web.answers import too_large
from coldframe.loader.web.ranges import Opening, RangeReader

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Shard

__all__ = ["Checksums", "Fetch", "WebOrigin", "WebSource"]

Fetch = Callable[[int, int, Sequence[memoryview]], None]
"""Fills buffers with bytes: shard, offset, buffers. What it reads, the checksums do not see."""


class Checksums(Protocol):
    """A store's own checksums of the shards, compared with what comes. Safe for several threads."""

    @property
    def note(self) -> str:
        """What is verified and what is not, for the timeline."""
        ...

    def start(self) -> None:
        """The load begins: bytes will come."""
        ...

    def seen(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """These bytes have come; called by the thread that read them, before anybody uses them.

        Raises:
            SourceError: They are wrong.
        """
        ...

    def finish(self) -> None:
        """All bytes have come.

        Raises:
            SourceError: Some of them are wrong.
        """
        ...

    def close(self) -> None: ...


_FIRST = (
    "config.json",
    "coldframe.seal.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""What opening a checkpoint looks at first."""

MakeChecksums = Callable[[Sequence["Shard"], Fetch], Checksums]


class WebOrigin:
    """The files of one address.

    Args:
        reader: Reads them. It is closed with the origin, or with the last source opened here
            where that is later.
        checksums: Makes what checks the weights, for stores that keep checksums.
        one_first: Whether the first answer decides what all others are asked for: the hub's names
            the commit.
    """

    path = None
    concurrency = 16

    def __init__(
        self,
        reader: RangeReader,
        checksums: MakeChecksums | None = None,
        *,
        one_first: bool = False,
    ) -> None:
        self._reader = reader
        self._checksums = checksums
        self._one_first = one_first
        self._lock = threading.Lock()
        self._openings: dict[str, Opening] = {}
        self._ahead: dict[str, _Ahead] = {}
        self._denied: SourceDenied | None = None
        self._users = 1
        self._closed = False

    @property
    def uri(self) -> str:
        return self._reader.address.uri

    def check(self) -> None:
        """Asks at once for the files that a checkpoint begins with: one round trip, not four.

        Nothing is checked: a place in a store is what its files' names begin with, so that the
        first read tells.
        """
        names = list(_FIRST)
        if self._one_first:
            with suppress(ColdframeError):  # which the read of it will raise again
                self._openings[names[0]] = self._reader.open(names[0])
            del names[0]
        with self._lock:
            self._ahead = {name: _Ahead(self._reader, name) for name in names}

    def uri_of(self, name: str) -> str:
        return self._reader.address.uri_of(name)

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        What is there is read next: its beginning is kept, and costs no round trip then.

        Raises:
            SourceError: Nobody could tell.
        """
        try:
            opening = self._open(name)
        except SourceNotFound:
            return False
        except SourceCredentials:
            raise
        except SourceDenied as error:
            # A store says so too of what is not there, to those who may not list what is. Of two
            # files, one after the other, it is believed: each checkpoint has one of the two.
            if self._denied is not None:
                raise self._denied from None
            self._denied = error
            return False
        self._denied = None
        with self._lock:
            self._openings[name] = opening
        return True

    def read_small(self, name: str, limit: int) -> bytes:
        opening = self._taken(name)
        if opening is None and name in self._ahead:
            opening = self._open(name)
        if opening is None:
            return self._reader.read_small(name, limit)
        if opening.size > limit:
            raise too_large(self.uri_of(name), limit, f"{opening.size} bytes")
        return _OpenFile(self._reader, name, opening).read(0, opening.size)

    def open_shard(self, name: str) -> _OpenFile:
        opening = self._taken(name) or self._open(name)
        self._denied = None
        return _OpenFile(self._reader, name, opening)

    def open_source(self, shards: Sequence[Shard], *, sealed: bool = False) -> WebSource:
        with self._lock:
            self._users += 1
        return self._make_source(shards, sealed)

    def _make_source(self, shards: Sequence[Shard], sealed: bool) -> WebSource:
        checksums = None if sealed else self._checksums
        return WebSource(self._reader, shards, checksums, self._leave)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._leave()

    def _open(self, name: str) -> Opening:
        with self._lock:
            ahead = self._ahead.pop(name, None)
        return self._reader.open(name) if ahead is None else ahead.wait()

    def _taken(self, name: str) -> Opening | None:
        with self._lock:
            return self._openings.pop(name, None)

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
            ahead, self._ahead = (self._ahead, {}) if last else ({}, self._ahead)
        if ahead:
            self._reader.cancel()
        for each in ahead.values():
            with suppress(ColdframeError):
                each.wait()
        if last:
            self._reader.close()


class _Ahead:
    """A file being opened before anybody has asked for it."""

    def __init__(self, reader: RangeReader, name: str) -> None:
        self._reader = reader
        self._name = name
        self._opening: Opening | None = None
        self._error: ColdframeError | None = None
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._opening = self._reader.open(self._name)
        except ColdframeError as error:
            self._error = error

    def wait(self) -> Opening:
        self._thread.join()
        if self._error is not None:
            raise self._error
        # What it failed with otherwise is on standard error, and would come again.
        return self._opening or self._reader.open(self._name)


class _OpenFile:
    """A file whose beginning has come: mostly that is all that is wanted."""

    def __init__(self, reader: RangeReader, name: str, opening: Opening) -> None:
        self._reader = reader
        self._name = name
        self._data = opening.data
        self.uri = reader.address.uri_of(name)
        self.size = opening.size
        self.version = opening.version

    def read(self, offset: int, length: int) -> bytes:
        known = self._data[offset : offset + length]
        if len(known) == length:
            return known
        found = memoryview(bytearray(length))
        found[: len(known)] = known
        rest = [found[len(known) :]]
        self._reader.read_into(self._name, self.version, self.size, offset + len(known), rest)
        return bytes(found)

    def close(self) -> None:
        return


class WebSource:
    """The weights of a checkpoint in a store.

    Args:
        reader: Reads them.
        shards: As they were opened.
        checksums: Makes what checks them.
        closed: Called once at the end.
    """

    chunk: int | None = None

    def __init__(
        self,
        reader: RangeReader,
        shards: Sequence[Shard],
        checksums: MakeChecksums | None,
        closed: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._shards = tuple(shards)
        self._closed: Callable[[], None] | None = closed
        self._checksums = None if checksums is None else checksums(self._shards, self._fetch)
        if self._checksums is not None:
            self._checksums.start()

    @property
    def readers(self) -> int:
        """As many as may ever read at once; the reader lets in as many as pay off."""
        return self._reader.limits.connections

    @property
    def note(self) -> str:
        done = self._reader.counters
        count = done.connections or self._reader.limits.first_connections
        text = f"{count} connection{'s' if count > 1 else ''} to {self._reader.address.uri}"
        if done.retries:
            text += f", {done.retries} {'retry' if done.retries == 1 else 'retries'}"
        if done.hedges:
            text += f", {done.hedges_won} of {done.hedges} second requests won"
        if not all(shard.version for shard in self._shards):
            text += ", not safe from changes: the server gives no ETag"
        return text if self._checksums is None else f"{text}, {self._checksums.note}"

    @property
    def verified(self) -> str | None:
        return None if self._checksums is None else self._checksums.note

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self._fetch(shard, offset, parts)
        if self._checksums is not None:
            self._checksums.seen(shard, offset, parts)

    def finish(self) -> None:
        """Compares the checksums, if there are any; versions were, with each answer."""
        if self._checksums is not None:
            self._checksums.finish()

    def abort(self) -> None:
        self._reader.cancel()

    def close(self) -> None:
        closed, self._closed = self._closed, None
        if closed is None:
            return
        if self._checksums is not None:
            self._checksums.close()
        closed()

    def _fetch(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        file = self._shards[shard]
        self._reader.read_into(file.name, file.version, file.size, offset, parts)
