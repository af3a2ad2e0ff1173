"""What a memory service has for its peers: the files of the checkpoint, out of its arena.

A peer asks for ranges of files, whatever its own plan and layout are; the plan says where in the
arena they lie and which stage brings them. `Gate` says which bytes are in: those of whole stages,
and of a stage that is still on its way those that have come. Whoever takes them on to the next node
is thus a chunk behind, not a stage. Where the host can look at the arena nothing is copied: what
goes out are views of it.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from coldframe.loader.checkpoints.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint, Shard
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import CheckpointError, ColdframeError, SourceNotFound
from coldframe.loader.intervals import Intervals
from coldframe.loader.memory import Memory

__all__ = ["Bytes", "Gate", "Need", "Offer", "ReadRest", "ReadSmall"]

_REST = 1 << 20  # bytes in one request
_COPIED = 256 << 20  # likewise, of an arena that cannot be looked at

ReadSmall = Callable[[str, int], bytes]
"""Reads a whole small file of the checkpoint, of a size up to a limit; see `Origin.read_small`."""

ReadRest = Callable[[str, int, memoryview], None]
"""Fills a buffer with bytes of a shard from an offset on, from where the checkpoint comes from."""


class Need(NamedTuple):
    """Bytes of a shard that are wanted, and the stage that brings them."""

    stage: int
    start: int
    stop: int


class Gate:
    """Which bytes may be given out, for threads that wait for them.

    What is said to be there must not change any more: where bytes are verified, they have been;
    where a file may be changed under the reader, it has been looked at again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._arrived: dict[str, Intervals] = {}
        self._ended = False
        self._error: ColdframeError | None = None

    def ready(self, stage: int) -> None:
        """The bytes of a stage are in, and are the right ones."""
        with self._changed:
            self._ready.add(stage)
            self._changed.notify_all()

    def arrived(self, shard: str, start: int, stop: int) -> None:
        """Some bytes of a stage that is not complete yet are in, and are the right ones."""
        with self._changed:
            self._arrived.setdefault(shard, Intervals()).add(start, stop)
            self._changed.notify_all()

    def end(self, error: ColdframeError | None) -> None:
        """The load is over: all is in, or it failed and nothing is given out any more; once."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def wait_for(self, shard: str, needs: Sequence[Need], timeout: float) -> bool:
        """Waits until some bytes of a shard are in, whether or not the stages are that they are of.

        Args:
            shard: Its name.
            needs: The bytes.
            timeout: Seconds at most.

        Returns:
            Whether they are.

        Raises:
            ColdframeError: The load failed.
        """

        def there() -> bool:
            found = self._arrived.get(shard)
            return all(
                need.stage in self._ready
                or (found is not None and found.covers(need.start, need.stop))
                for need in needs
            )

        deadline = time.monotonic() + timeout
        with self._changed:
            while self._error is None and not there():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            if self._error is not None:
                # Each thread its own: a traceback grows with every raise.
                raise ColdframeError.from_wire(self._error.to_wire())
            return True

    def to_wire(self) -> dict[str, Any]:
        """How far the load is, as JSON values."""
        with self._changed:
            state = "loading" if not self._ended else "loaded" if self._error is None else "failed"
            return {"state": state, "ready": sorted(self._ready)}


class _Piece(NamedTuple):
    """Bytes of a shard that lie together in the arena."""

    start: int
    stop: int
    arena_offset: int
    stage: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """Consecutive bytes of a shard.

    Attributes:
        needs: Those of them that the load brings; nothing of them may be read before it has.
        parts: Where they are, one after the other.
        rest: Those parts that are not in the arena but buffers to be filled, and their offsets in
            the shard; see `Offer.fill`.
        copied: Likewise those that are in an arena that the host cannot look at, and their offsets
            there.
    """

    needs: tuple[Need, ...]
    parts: tuple[memoryview, ...]
    rest: tuple[tuple[int, memoryview], ...]
    copied: tuple[tuple[int, memoryview], ...] = ()


class Offer:
    """A checkpoint that is being loaded, or has been, as it is served to peers.

    Args:
        checkpoint: The checkpoint.
        plan: Where its bytes go.
        memory: The arena's bytes. They are read until the server is closed. Where files are mapped
            in place, a mapping that is replaced (`Reservation.attach`) is served from then on.
        headers: The first bytes of each shard, up to `Shard.data_offset`.
        read_small: Reads its small files, all but the index; called by several threads. It waits
            for a file that is still on its way.
        read_rest: Reads bytes that are not in the arena, at most a MiB for one request; called by
            several threads. Those of tensors that no model uses (rotary buffers) are asked for
            where they lie between others. Without it they are refused.
        sealed: Whether the checkpoint's fingerprint tells its weights, not only their shapes.

    Raises:
        CheckpointError: A header is not of the shard.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        memory: Memory,
        *,
        headers: Sequence[bytes],
        read_small: ReadSmall,
        read_rest: ReadRest | None = None,
        sealed: bool = False,
    ) -> None:
        self.fingerprint = checkpoint.fingerprint
        self.plan_hash = plan.hash
        self.gate = Gate()
        self._read_small = read_small
        self._read_rest = read_rest
        self._index = _index_of(checkpoint)
        self.shards = {shard.name: shard for shard in checkpoint.shards}
        self.version = self.fingerprint if sealed else _version(checkpoint, self.fingerprint)
        self._layout = str(plan.layout)
        self._stages = [stage.name for stage in plan.stages]
        self._memory = memory
        self._headers = {s.name: h for s, h in zip(checkpoint.shards, headers, strict=True)}
        for shard in checkpoint.shards:
            if len(self._headers[shard.name]) != shard.data_offset:
                raise CheckpointError(
                    "this is not the header of the shard",
                    where=shard.uri,
                    expected=f"{shard.data_offset} bytes",
                    got=f"{len(self._headers[shard.name])} bytes",
                )
        self._pieces = _pieces_of(checkpoint.shards, plan)

    def read_small(self, name: str, limit: int) -> bytes:
        """A whole small file; the index is always that of the shards that are served.

        Raises:
            ColdframeError: It is not there, or cannot be read.
        """
        if name != INDEX_NAME:
            return self._read_small(name, limit)
        if self._index is None:
            raise SourceNotFound("the checkpoint is one file, without an index", where=name)
        return self._index

    def find(self, name: str, start: int, stop: int) -> Bytes | None:
        """Where a shard's bytes from `start` up to `stop` are.

        Returns:
            None where too many of them are not in the arena, since a rank has only its slice, or
            more is asked for at once than is copied out of it.
        """
        shard = self.shards[name]
        parts: list[memoryview] = []
        needs: list[Need] = []
        rest: list[tuple[int, memoryview]] = []
        copied: list[tuple[int, memoryview]] = []
        at = start
        if at < shard.data_offset:
            at = min(stop, shard.data_offset)
            parts.append(memoryview(self._headers[name])[start:at])
        pieces = self._pieces[name]
        index = bisect_right(pieces, at, key=lambda piece: piece.start) - 1
        if index < 0 or pieces[index].stop <= at:
            index += 1
        while at < stop:
            piece = pieces[index] if index < len(pieces) else None
            if piece is not None and piece.start <= at:
                until = min(stop, piece.stop)
                place = at + piece.arena_offset - piece.start
                view = self._memory.view(place, until - at)
                if view is None:
                    if sum(len(b) for _, b in copied) + until - at > _COPIED:
                        return None
                    view = memoryview(bytearray(until - at))
                    copied.append((place, view))
                parts.append(view.toreadonly())
                needs.append(Need(piece.stage, at, until))
                index += 1
            else:
                until = stop if piece is None else min(stop, piece.start)
                if self._read_rest is None or sum(len(b) for _, b in rest) + until - at > _REST:
                    return None
                buffer = memoryview(bytearray(until - at))
                rest.append((at, buffer))
                parts.append(buffer)
            at = until
        return Bytes(tuple(needs), tuple(parts), tuple(rest), tuple(copied))

    def fill(self, name: str, found: Bytes) -> None:
        """Reads what is not to be looked at in the arena to its places among the parts.

        Raises:
            ColdframeError: It could not be read.
        """
        for offset, buffer in found.copied:
            self._memory.read(offset, buffer)
        if self._read_rest is not None:
            for offset, buffer in found.rest:
                self._read_rest(name, offset, buffer)

    def to_wire(self) -> dict[str, Any]:
        """What is served, as JSON values."""
        return {
            "version": 1,
            "plan": self.plan_hash,
            "fingerprint": self.fingerprint,
            "layout": self._layout,
            "stages": self._stages,
            "shards": [
                {"name": shard.name, "size": shard.size, "data_offset": shard.data_offset}
                for shard in self.shards.values()
            ],
            **self.gate.to_wire(),
        }


def _index_of(checkpoint: Checkpoint) -> bytes | None:
    """An index that says what the checkpoint's own says; that one may be far away."""
    shards = checkpoint.shards
    if [shard.name for shard in shards] == [WEIGHTS_NAME]:
        return None
    weight_map = {t.name: shards[t.shard].name for t in checkpoint.tensors.values()}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def _version(checkpoint: Checkpoint, fingerprint: str) -> str:
    """Tells two checkpoints of the same shapes apart, as far as their places can.

    A fingerprint alone does not, without a seal: a model that was trained on has the config and
    the headers of the one before. Where it comes from (an ETag, a file's number and times) does.
    """
    import hashlib

    digest = hashlib.sha256(fingerprint.encode())
    for shard in checkpoint.shards:
        digest.update(f"\n{shard.name}\t{shard.version}".encode())
    return digest.hexdigest()


def _pieces_of(shards: Sequence[Shard], plan: Plan) -> dict[str, list[_Piece]]:
    """By shard and in the order of the file. A slice by columns has none: it lies in shreds."""
    found: dict[str, list[_Piece]] = {shard.name: [] for shard in shards}
    for stage in plan.stages:
        for extent in stage.extents:
            pieces = found[shards[extent.shard].name]
            for run in extent.runs:
                if run.count == 1:
                    start = extent.file_offset + run.offset
                    piece = _Piece(start, start + run.length, run.arena_offset, stage.index)
                    pieces.append(piece)
    for pieces in found.values():
        pieces.sort()
    return found
