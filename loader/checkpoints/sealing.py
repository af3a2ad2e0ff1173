"""Sealing: reads all of a checkpoint at the speed of its disk, and hashes what comes."""

from __future__ import annotations

import mmap
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

from coldframe.loader.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from coldframe.loader.checkpoints.pieces import (
    DIGEST_BYTES,
    cuts_of_shards,
    digest_of,
    hash_package,
    split,
)
from coldframe.loader.checkpoints.seal import Seal, SealedShard, sha256
from coldframe.loader.sources.base import Origin, Source
from coldframe.loader.sources.direct import BLOCK

__all__ = ["read_header", "seal_checkpoint"]

_CHUNK = 8 << 20  # a multiple of a piece
_THREADS = 2  # what one reads while the other hashes
_REPORT_S = 0.1
_MAX_CONFIG_BYTES = 1 << 24


class _Chunk(NamedTuple):
    shard: int
    first: int
    """The index of its first piece."""
    last: int
    """That of the piece behind it."""


def seal_checkpoint(
    checkpoint: Checkpoint,
    origin: Origin,
    source: Source,
    progress: Callable[[int], None] = lambda done: None,
) -> Seal:
    """Makes the seal of a checkpoint as it is now.

    Args:
        checkpoint: The opened checkpoint.
        origin: Where it was opened.
        source: Its bytes.
        progress: Called now and then with the bytes of weights that are done, from the thread
            that called this.

    Raises:
        SourceError: A shard cannot be read, or changed meanwhile.
        PlatformError: The package that hashes is missing.
    """
    xxhash = hash_package()
    cuts = cuts_of_shards(checkpoint)
    digests = [bytearray(DIGEST_BYTES * (len(each) - 1)) for each in cuts]
    headers = [
        sha256(read_header(source, index, shard.data_offset))
        for index, shard in enumerate(checkpoint.shards)
    ]
    chunks = _chunks(cuts)
    lock = threading.Lock()
    stop = threading.Event()
    done = 0

    def work() -> None:
        nonlocal done
        memory = memoryview(mmap.mmap(-1, _CHUNK + BLOCK))
        while not stop.is_set():
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            inside = cuts[chunk.shard][chunk.first : chunk.last + 1]
            start = inside[0]
            # Address and offset agree modulo a block, so that O_DIRECT can fill it.
            view = memory[start % BLOCK :][: inside[-1] - start]
            source.read_into(chunk.shard, start, [view])
            found = b"".join(digest_of(views, xxhash) for views in split([view], inside))
            at = DIGEST_BYTES * chunk.first
            digests[chunk.shard][at : at + len(found)] = found
            with lock:
                done += len(view)

    threads = source.readers or _THREADS
    with ThreadPoolExecutor(threads) as pool:
        try:
            running = {pool.submit(work) for _ in range(threads)}
            while running:
                finished, running = wait(running, _REPORT_S, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                progress(done)
        finally:
            stop.set()
    source.finish()
    shards = tuple(
        SealedShard(shard.name, shard.size, header, bytes(found))
        for shard, header, found in zip(checkpoint.shards, headers, digests, strict=True)
    )
    return Seal(sha256(origin.read_small(CONFIG_NAME, _MAX_CONFIG_BYTES)), shards)


def read_header(source: Source, shard: int, data_offset: int) -> bytes:
    """All that is before the data of a shard.

    Raises:
        SourceError: It cannot be read.
    """
    header = bytearray(data_offset)
    source.read_into(shard, 0, [memoryview(header)])
    return bytes(header)


def _chunks(cuts: list[array[int]]) -> Iterator[_Chunk]:
    """Whole pieces, at most 8 MiB at once, in the order of the files."""
    for shard, each in enumerate(cuts):
        first, count = 0, len(each) - 1
        while first < count:
            last = first + 1
            while last < count and each[last + 1] - each[first] <= _CHUNK:
                last += 1
            yield _Chunk(shard, first, last)
            first = last
