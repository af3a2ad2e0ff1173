"""S3's own checksums: what was read is what was stored, where the objects have a CRC.

A CRC can be put together from those of its pieces, so each range is summed by the thread that read
it, in whatever order they come, and nothing is read twice: 0.2 ms for 8 MiB of CRC64NVME or CRC32C,
1 to 2 ms of CRC32, without the interpreter's lock. SHA sums cannot be put together, and at 1.8 GB/s
a core they would slow the load: objects that have nothing else count as unverified.

What has one checksum is a block: an object, or a part of its upload. Where a read brings whole
blocks, it ends only when they are right. Larger ones can be checked only at the end, when others
have the first of their bytes already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from coldframe.loader.errors import SourceCorrupt
from coldframe.loader.web.crc import crcs
from coldframe.loader.web.s3_stored import Stored, StoredShard, by_block, why_not_asked

__all__ = ["Fetch", "Mended", "S3Checksums"]

Fetch = Callable[[int, int, Sequence[memoryview]], None]
"""Fills buffers with a shard's bytes from an offset on, without telling the checksums of it."""

Mended = Callable[[int, int, int], None]
"""Is told shard, offset and length of bytes that were given out wrong and are right now."""

_ASKERS = 8
_PATIENCE_S = 10.0  # for S3's checksums; the load goes on without them then
_ALWAYS_READ = 1 << 20  # bytes of a shard that are read for its checksum alone,
_READ_SHARE = 50  # or this part of it, whichever is more


class S3Checksums:
    """Checks the bytes of a load against S3's checksums. Safe for several threads.

    Call `start`, then `seen` for each range, then `finish`; and `close` in any case.

    Args:
        ask: Tells what S3 has of a shard; called by threads of its own.
        shards: The shards, as they were when the checkpoint was opened.
        fetch: Reads what is missing for a checksum, and what came damaged.
        mended: Is told by `finish` what was damaged when it was given out. Whoever has used it has
            used wrong bytes. None makes that an error, since nobody would see to it.
        asked: Called when S3 has been asked for all shards.

    Raises:
        PlatformError: awscrt is not installed.
    """

    def __init__(
        self,
        ask: Callable[[StoredShard], Stored],
        shards: Sequence[StoredShard],
        fetch: Fetch,
        *,
        mended: Mended | None = None,
        asked: Callable[[], None] | None = None,
    ) -> None:
        self._ask = ask
        self._fetch = fetch
        self._mended = mended
        self._asked = asked
        self._crcs = crcs()
        self._shards = [_Checked(shard) for shard in shards]
        self._lock = threading.Lock()
        self._next = 0
        self._asking = min(_ASKERS, len(shards))
        self._patience_ends = 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"checksums-{n}", daemon=True)
            for n in range(self._asking)
        ]

    def start(self) -> None:
        """Begins to ask for the checksums, and to read the headers, which are under them too."""
        self._patience_ends = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.start()

    def seen(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Sums bytes that have come; to be called before anybody is given them.

        Args:
            shard: The index of the shard.
            offset: Where they begin in it.
            parts: They, in a row. They are kept, to be mended if need be.

        Raises:
            SourceCorrupt: They are not what S3 has, and were not when they were read again.
            SourceError: They could not be read again.
        """
        checked = self._shards[shard]
        if not self._is_known(checked) or not checked.stored.blocks:
            return
        crc = self._crcs[checked.stored.kind]
        for number, start, cut in by_block(checked.stored.blocks, offset, parts):
            block = checked.stored.blocks[number]
            piece = _Piece(start, sum(part.nbytes for part in cut), crc.sum(cut), cut)
            with self._lock:
                checked.pieces[number][start] = piece
            if piece.length == block.end - block.start and piece.checksum != block.checksum:
                self._mend(checked, number)

    def finish(self) -> None:
        """Reads the little that is missing, and checks all that is there now.

        Raises:
            SourceCorrupt: Something is not what S3 has.
            SourceError: It could not be read again.
        """
        for index, checked in enumerate(self._shards):
            if not self._is_known(checked) or not checked.stored.blocks:
                continue
            missing = list(checked.gaps())
            nbytes = sum(end - start for start, end in missing)
            if nbytes > max(_ALWAYS_READ, checked.shard.size // _READ_SHARE):
                checked.why_not = f"{nbytes} bytes of {checked.shard.uri} were not needed"
            else:
                for start, end in missing:
                    self._read(index, start, end)
            for number in range(len(checked.stored.blocks)):
                self._check(index, number)

    @property
    def note(self) -> str:
        """What is verified so far, for the timeline."""
        kinds = sorted({shard.stored.kind for shard in self._shards if shard.verified})
        count = sum(shard.verified for shard in self._shards)
        by = f"verified by S3's {' and '.join(kinds)}"
        if count and count == len(self._shards):
            return by
        why_not = next((s.why_not for s in self._shards if not s.verified and s.why_not), "")
        unverified = f"unverified: {why_not or 'not all has been checked'}"
        return f"{by}: {count} of {len(self._shards)} shards; {unverified}" if count else unverified

    def close(self) -> None:
        """Ends its threads and lets go of all memory. No call goes on any more."""
        with self._lock:
            self._next = len(self._shards)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for checked in self._shards:
            checked.pieces = []

    def _is_known(self, checked: _Checked) -> bool:
        if checked.known.wait(max(0.0, self._patience_ends - time.monotonic())):
            return True
        checked.why_not = f"S3 did not tell the checksum of {checked.shard.uri} in time"
        return False

    def _run(self) -> None:
        while True:
            with self._lock:
                index, self._next = self._next, self._next + 1
                if index >= len(self._shards):
                    self._asking -= 1
                    last = self._asking == 0
                    break
            self._learn(index)
        if last and self._asked is not None:
            self._asked()

    def _learn(self, index: int) -> None:
        checked = self._shards[index]
        try:
            checked.learn(self._ask(checked.shard))
        except Exception as error:  # noqa: BLE001 - having no answer is no reason to end a load
            checked.why_not = why_not_asked(checked.shard, error)
        checked.known.set()
        if checked.stored.blocks:
            try:
                self._read(index, 0, checked.shard.data_offset)
            except Exception:  # noqa: BLE001 - `finish` tries again, and tells what is wrong
                return

    def _read(self, index: int, start: int, end: int) -> None:
        """Reads bytes that the load does not need, for their checksum alone."""
        buffer = memoryview(bytearray(end - start))
        self._fetch(index, start, [buffer])
        self.seen(index, start, [buffer])

    def _check(self, index: int, number: int) -> None:
        """Checks a block of which all that will come has come."""
        checked = self._shards[index]
        found = self._combined(checked, number)
        if found is None:
            return  # some of it was not needed
        if found != checked.stored.blocks[number].checksum:
            for piece in self._mend(checked, number):
                if self._mended is None:
                    raise _corrupt(
                        checked,
                        number,
                        found,
                        "bytes were damaged when they were given out",
                    )
                self._mended(index, piece.start, piece.length)
        checked.pieces[number].clear()
        checked.right[number] = True

    def _mend(self, checked: _Checked, number: int) -> list[_Piece]:
        """Reads a block again, and replaces in memory what is not the same.

        Returns:
            The pieces that were replaced.

        Raises:
            SourceCorrupt: It is still not what S3 has.
        """
        index = self._shards.index(checked)
        crc = self._crcs[checked.stored.kind]
        replaced = []
        for piece in list(checked.pieces[number].values()):
            buffer = memoryview(bytearray(piece.length))
            self._fetch(index, piece.start, [buffer])
            checksum = crc.sum([buffer])
            if checksum != piece.checksum:
                piece.replace(buffer)
                new = _Piece(piece.start, piece.length, checksum, piece.parts)
                checked.pieces[number][piece.start] = new
                replaced.append(new)
        found = self._combined(checked, number)
        if found != checked.stored.blocks[number].checksum:
            raise _corrupt(checked, number, found, "the bytes do not have S3's checksum")
        return replaced

    def _combined(self, checked: _Checked, number: int) -> int | None:
        """The checksum of a block from those of its pieces; None where some are missing."""
        block = checked.stored.blocks[number]
        crc = self._crcs[checked.stored.kind]
        at, checksum = block.start, 0
        for start, piece in sorted(checked.pieces[number].items()):
            if start != at:
                return None
            checksum = crc.combine(checksum, piece.checksum, piece.length)
            at += piece.length
        return checksum if at == block.end else None


class _Piece(NamedTuple):
    """A range that was read."""

    start: int
    length: int
    checksum: int
    parts: Sequence[memoryview]

    def replace(self, content: memoryview) -> None:
        at = 0
        for part in self.parts:
            part[:] = content[at : at + part.nbytes]
            at += part.nbytes


class _Checked:
    """A shard: what S3 has of it, and what has come of each block, by offset."""

    def __init__(self, shard: StoredShard) -> None:
        self.shard = shard
        self.known = threading.Event()
        self.stored = Stored()
        self.pieces: list[dict[int, _Piece]] = []
        self.right: list[bool] = []
        self.why_not = ""

    def learn(self, stored: Stored) -> None:
        self.pieces = [{} for _ in stored.blocks]
        self.right = [False] * len(stored.blocks)
        self.why_not = stored.why_not
        self.stored = stored

    @property
    def verified(self) -> bool:
        return bool(self.right) and all(self.right)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Where bytes are missing for a checksum: from, to."""
        for block, pieces in zip(self.stored.blocks, self.pieces, strict=True):
            at = block.start
            for start, piece in sorted(pieces.items()):
                if at < start:
                    yield at, start
                at = start + piece.length
            if at < block.end:
                yield at, block.end


def _corrupt(checked: _Checked, number: int, found: int | None, what: str) -> SourceCorrupt:
    block, kind = checked.stored.blocks[number], checked.stored.kind
    digits = 16 if kind == "crc64nvme" else 8
    return SourceCorrupt(
        what,
        where=f"{checked.shard.uri}, bytes {block.start}-{block.end - 1}",
        expected=f"{kind} {block.checksum:0{digits}x}",
        got=f"{found or 0:0{digits}x}",
        hint="Start again; if it stays so, upload the file again from a good copy.",
    )
