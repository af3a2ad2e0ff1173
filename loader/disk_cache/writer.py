"""Writes a cache entry beside the stream, from the arena, and seals it when the load is done.

What has come in stays in the arena as it is, so the queue is one of references: it costs nothing,
and a disk slower than the network holds nobody up. One thread writes. It is no slower than others
on purpose: a thread of low priority that holds the interpreter's lock while it waits for a
processor makes all threads of the process wait with it.

No fault here is a fault of the load: the entry is dropped, and `why` says why.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from coldframe.loader.checkpoints.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
)
from coldframe.loader.checkpoints.pieces import cuts_of_shards
from coldframe.loader.checkpoints.seal import Seal, SealedShard, sha256
from coldframe.loader.disk_cache.file import CacheFile, Scratch
from coldframe.loader.errors import ColdframeError, SourceChanged, SourceNotFound

if TYPE_CHECKING:
    from coldframe.loader.disk_cache.cache import Cache
    from coldframe.loader.disk_cache.folder import Folder

__all__ = ["CacheWriter", "Read"]

Read = Callable[[int, int, memoryview], None]
"""Fills a buffer with a shard's bytes from an offset on."""

_MOST_COPIED = 64 << 20
_ENDED = "the load ended before it was complete"


class _Job(NamedTuple):
    shard: int
    offset: int
    parts: Sequence[memoryview]
    stays: bool


class CacheWriter:
    """An entry on its way to the disk; `Cache.begin` makes them.

    Args:
        cache: The cache.
        folder: Where it is written, locked.
        checkpoint: What is being loaded.
        seal: Its own seal, which must agree with what came, or None.
        old: Folders to be removed first, locked.
    """

    def __init__(
        self,
        cache: Cache,
        folder: Folder,
        checkpoint: Checkpoint,
        seal: Seal | None,
        old: Sequence[Folder],
    ) -> None:
        self.why: str | None = None
        """Why there will be no entry."""
        self._cache = cache
        self._folder = folder
        self._checkpoint = checkpoint
        self._seal = seal
        self._old = old
        self._files: list[CacheFile] = []
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._copied = 0
        self._copying = threading.Lock()
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._write, name="cache", daemon=True)
        self._thread.start()

    def put(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Takes bytes from buffers that keep their content until `complete` or `close` is over.

        Args:
            shard: The index of their shard.
            offset: Where they begin in it; not in its header.
            parts: The buffers, one after the other.
        """
        if self.why is None and not self._ended:
            self._queue.put(_Job(shard, offset, parts, True))

    def put_copy(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """As `put`, from buffers that will be filled anew.

        Copies have 64 MiB at most. What comes beyond that is left out: `complete` reads it again.
        """
        length = sum(map(len, parts))
        if self.why is not None or self._ended:
            return
        with self._copying:
            if self._copied + length > _MOST_COPIED:
                return
            self._copied += length
        self._queue.put(_Job(shard, offset, [memoryview(bytearray().join(parts))], False))

    def complete(self, read: Read, small: Mapping[str, bytes]) -> bool:
        """Writes what is still missing, seals it all, and makes it an entry.

        Takes as long as the disk does; to be called once, in a thread of its own, when the load
        has come to a good end.

        Args:
            read: Reads headers, and weights that were not loaded, from where the others came from.
                What it raises ends the entry.
            small: Files beside the weights, by name; `config.json` must be there. An index is made
                where there is none.

        Returns:
            Whether there is an entry now; if not, `why` says why.
        """
        with self._ending:
            self._end_thread()
            if self._ended:
                return False
            self._ended = True
            old: list[Folder] = []
            done = False
            try:
                if self.why is None:
                    self.why = self._finish(read, small) or self._cache.publish(self._folder, old)
                    done = self.why is None
            except Exception as error:  # noqa: BLE001 - the load has come to a good end
                self._failed(error)
            finally:
                self._let_go(keep=done)
                for folder in old:
                    folder.remove()
            return done

    def close(self) -> None:
        """Gives the entry up unless it is complete; after this no buffer is touched any more.

        A `complete` that goes on elsewhere ends early. It may be waiting in its `read`: abort the
        source first.
        """
        self._stopped.set()
        with self._ending:
            self._end_thread()
            if not self._ended:
                self._ended = True
                self.why = self.why or _ENDED
                self._let_go(keep=False)

    def _end_thread(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _let_go(self, *, keep: bool) -> None:
        for file in self._files:
            file.close()
        if keep:
            self._folder.close()
        else:
            self._folder.remove()

    def _write(self) -> None:
        """The thread."""
        try:
            for folder in self._old:
                folder.remove()
            scratch = Scratch()
            cuts = cuts_of_shards(self._checkpoint)
            for shard, each in zip(self._checkpoint.shards, cuts, strict=True):
                self._files.append(CacheFile(self._folder.fd, shard.name, each, scratch))
        except Exception as error:  # noqa: BLE001 - whatever it is, the load goes on
            self._failed(error)
        while (job := self._queue.get()) is not None:
            try:
                if self.why is None and not self._stopped.is_set():
                    self._files[job.shard].take(job.offset, job.parts, stays=job.stays)
            except Exception as error:  # noqa: BLE001 - whatever it is, the load goes on
                self._failed(error)
            if not job.stays:
                with self._copying:
                    self._copied -= sum(map(len, job.parts))

    def _failed(self, error: Exception) -> None:
        match error:
            case OSError():
                self.why = f"the cache cannot be written: {error.strerror}"
            case ColdframeError():
                self.why = f"the cache gets no entry: {error}"
            case _:
                self.why = f"the cache gets no entry: {error!r}"

    def _finish(self, read: Read, small: Mapping[str, bytes]) -> str | None:
        """All that an entry has beside the weights that were loaded.

        Returns:
            None, or why it was left unfinished.

        Raises:
            OSError: It cannot be written.
            ColdframeError: It cannot be read, or is not what it should be.
        """
        config = small.get(CONFIG_NAME)
        if config is None:
            raise SourceNotFound("the config was not given", where=self._checkpoint.path)
        for name, content in self._small(small).items():
            self._write_small(name, content)
        shards = []
        for index, (shard, file) in enumerate(
            zip(self._checkpoint.shards, self._files, strict=True)
        ):
            header = bytearray(shard.data_offset)
            read(index, 0, memoryview(header))
            file.write_header(header)
            if not self._fill(index, file, read):
                return _ENDED
            file.sync()
            shards.append(SealedShard(shard.name, shard.size, sha256(header), file.digests))
        seal = Seal(sha256(config), tuple(shards))
        if self._seal is not None and seal != self._seal:
            raise SourceChanged(
                "what came is not what was sealed",
                where=self._checkpoint.path,
                expected=self._seal.digest,
                got=seal.digest,
            )
        seal.write(self._folder.path)
        os.fsync(self._folder.fd)
        self._check()
        return None

    def _fill(self, shard: int, file: CacheFile, read: Read) -> bool:
        """Reads the weights that were not loaded, unless `close` was called meanwhile."""
        scratch = Scratch()
        for offset, length in list(file.missing()):
            if self._stopped.is_set():
                return False
            buffer = scratch.at(offset, length)
            read(shard, offset, buffer)
            file.take(offset, [buffer], stays=False)
        return True

    def _small(self, small: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files beside the weights, with an index where there must be one."""
        files = dict(small)
        shards = self._checkpoint.shards
        if [shard.name for shard in shards] == [WEIGHTS_NAME]:
            files.pop(INDEX_NAME, None)
        elif INDEX_NAME not in files:
            tensors = self._checkpoint.tensors.values()
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {tensor.name: shards[tensor.shard].name for tensor in tensors},
            }
            files[INDEX_NAME] = json.dumps(index, indent=2).encode()
        return files

    def _write_small(self, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=self._folder.fd), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _check(self) -> None:
        """Opens the entry as the next start will: nothing else should come of it than came here."""
        there, wanted = Checkpoint.open(self._folder.path), self._checkpoint
        if _content(there) != _content(wanted):
            raise SourceChanged(
                "what was written is not the checkpoint that was opened", where=wanted.path
            )


def _content(checkpoint: Checkpoint) -> object:
    shards = [(shard.name, shard.size, shard.data_offset) for shard in checkpoint.shards]
    return checkpoint.config, shards, checkpoint.tensors
