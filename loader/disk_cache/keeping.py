"""A load's use of the cache: what is there is read there, what is not is written there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.disk_cache.cache import Cache, Entry
from coldframe.loader.disk_cache.writer import CacheWriter
from coldframe.loader.errors import CheckpointError, ColdframeError, SourceError
from coldframe.loader.loads.chain import Opened
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.caching import CachingSource
from coldframe.loader.sources.directory import DirectoryOrigin

__all__ = ["Keeping"]


class Keeping:
    """The cache, for one load.

    Args:
        directory: The cache's directory.
        size: Bytes that all entries together may have.

    Raises:
        PlatformError: The directory cannot be used.
    """

    def __init__(self, directory: str, size: int) -> None:
        self._cache = Cache(directory, size)
        self._entry: Entry | None = None
        self._writer: CacheWriter | None = None
        self._source: Source | None = None
        self._checkpoint: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._was_bad = False
        self._ended = threading.Event()

    def find(self, checkpoint: Checkpoint) -> Opened | None:
        """The same checkpoint in the cache, or None."""
        return self._open(self._cache.find(checkpoint))

    def find_uri(self, uri: str) -> Opened | None:
        """What the cache last had from a place that cannot be reached now, or None."""
        return self._open(self._cache.find_uri(uri))

    def knows(self, uri: str) -> bool:
        """Whether there is something for `find_uri`."""
        return self._cache.knows(uri)

    def _open(self, entry: Entry | None) -> Opened | None:
        if entry is None:
            return None
        self._entry = entry
        origin = DirectoryOrigin(entry.path)
        try:
            return Opened(origin, Checkpoint.open(origin))
        except (SourceError, CheckpointError):
            self.discard()
            return None

    def discard(self) -> bool:
        """The entry that was found is bad. Whether it was there to be taken away."""
        entry, self._entry = self._entry, None
        if entry is None:
            return False
        self._was_bad = True
        self._cache.discard(entry)
        return True

    @property
    def busy(self) -> bool:
        """Whether an entry is being written from the arena."""
        return self._writer is not None and not self._ended.is_set()

    def write_through(
        self,
        source: Source,
        checkpoint: Checkpoint,
        arena: Callable[[], memoryview | None],
    ) -> Source:
        """The source, with all that comes from it written to the cache, too, where that goes.

        Args:
            source: The source.
            checkpoint: What comes from it.
            arena: See `CachingSource`.
        """
        self._writer = self._cache.begin(checkpoint, checkpoint.seal)
        if self._writer is None:
            return source
        self._source, self._checkpoint = source, checkpoint
        return CachingSource(source, self._writer, arena)

    def complete(
        self, small: Callable[[], Mapping[str, bytes]], done: Callable[[str | None], None]
    ) -> None:
        """Once all has come in well: finishes the entry, in a thread of its own.

        Args:
            small: The model's small files; may wait for them.
            done: Called at the end, with the reason why there is no entry, or None.
        """
        if self._writer is None:
            done("what was there was bad, and is taken away" if self._was_bad else self._cache.why)
            return
        self._thread = threading.Thread(
            target=self._complete, args=(small, done), name="cache-end", daemon=True
        )
        self._thread.start()

    def _complete(
        self, small: Callable[[], Mapping[str, bytes]], done: Callable[[str | None], None]
    ) -> None:
        assert self._writer is not None
        try:
            kept = self._writer.complete(self._read, small())
        except ColdframeError as error:
            self._writer.close()
            why: str | None = str(error)
        else:
            why = None if kept else self._writer.why
        self._ended.set()
        done(why)

    def _read(self, shard: int, offset: int, buffer: memoryview) -> None:
        assert self._source is not None
        assert self._checkpoint is not None
        header = self._checkpoint.headers[shard]
        if offset + len(buffer) <= len(header):
            buffer[:] = header[offset : offset + len(buffer)]
        else:
            self._source.read_into(shard, offset, [buffer])

    def close(self) -> None:
        """Ends what goes on. The source has been aborted; the arena is still there."""
        if self._writer is not None:
            self._writer.close()
        if self._thread is not None:
            self._thread.join()
        if self._entry is not None:
            self._entry.close()
