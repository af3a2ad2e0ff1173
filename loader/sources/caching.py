"""A source whose bytes go to the cache on their way into the arena."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from coldframe.loader.disk_cache.writer import CacheWriter
from coldframe.loader.sources.base import Source

__all__ = ["CachingSource"]


class CachingSource:
    """A source whose bytes go to a cache, too.

    Args:
        inner: Where they come from; checked, if they are checked at all.
        writer: Where they go.
        arena: The memory that keeps what is read into it, asked for once something has been read;
            None where there is no such memory. What is read to elsewhere is copied.
    """

    def __init__(
        self, inner: Source, writer: CacheWriter, arena: Callable[[], memoryview | None]
    ) -> None:
        self._inner = inner
        self._writer = writer
        self._arena = arena
        self._kept: range | None = None

    @property
    def readers(self) -> int | None:
        return self._inner.readers

    @property
    def chunk(self) -> int | None:
        return self._inner.chunk

    @property
    def note(self) -> str:
        return f"{self._inner.note}, cached"

    @property
    def verified(self) -> str | None:
        return self._inner.verified

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self._inner.read_into(shard, offset, parts)
        if self._kept is None:
            memory = self._arena() or memoryview(b"")
            start = _address(memory)
            self._kept = range(start, start + len(memory))
        if all(_address(part) in self._kept for part in parts if part):
            self._writer.put(shard, offset, parts)
        else:
            self._writer.put_copy(shard, offset, parts)

    def finish(self) -> None:
        self._inner.finish()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        """Closes the source; the writer goes on."""
        self._inner.close()


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)) if memory else 0
