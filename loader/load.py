"""One checkpoint on its way into an arena: opened, planned, then mapped in place or streamed.

A local checkpoint that is in the page cache already is mapped where it lies: nothing is copied.
The kernel may have dropped some of its pages, so each stage is given out once what is missing of
it has been read. Mapping is safe only under a read lease, which holds back whoever wants to write
to a file; when one comes, the weights are copied out of the way (`move_out`) and the files let go,
and no worker notices.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coldframe.loader.arena import WEIGHTS_BASE, Reservation, Segment
from coldframe.loader.board import Board
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.devices import Device
from coldframe.loader.errors import ColdframeError
from coldframe.loader.placing import Placer
from coldframe.loader.plan import Extent, Plan
from coldframe.loader.sources.file import FileSource
from coldframe.loader.stream import Fetch, Stream
from coldframe.loader.throttle import Throttle
from coldframe.loader.timeline import Recorder

__all__ = ["Load", "LoadOptions"]

_MOSTLY = 0.9
"""Mapped is what has at least this share in the page cache; a cold file is read faster than mapped,
since a page fault brings in little at a time."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load, and how.

    Args:
        path: A checkpoint's directory.
        copy: Never map files in place.
        throttle: Bytes per second at most, or None; implies `copy`.
        threads: Readers; None takes as many as there are CPUs, but at least 2 and at most 8.
    """

    path: str
    copy: bool = False
    throttle: float | None = None
    threads: int | None = None

    def to_wire(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "copy": self.copy,
            "throttle": self.throttle,
            "threads": self.threads,
        }


class Load:
    """A checkpoint being loaded.

    Args:
        options: What and how.
        device: Whose memory it goes to.
        recorder: Where its spans go.
        on_plan: Called once plan, segments and board stand, before the first stage is ready.
        on_stage: Called with each stage's index when its bytes are in.
        on_end: Called at the end, with the error that ended it early or None.

    The callbacks come from threads of the load's own.
    """

    plan: Plan
    board: Board
    mode: str
    """`mapped` or `copied`."""

    def __init__(
        self,
        options: LoadOptions,
        device: Device,
        recorder: Recorder,
        *,
        on_plan: Callable[[], None],
        on_stage: Callable[[int], None],
        on_end: Callable[[ColdframeError | None], None],
    ) -> None:
        self._options = options
        self._device = device
        self._recorder = recorder
        self._on_plan = on_plan
        self._on_stage = on_stage
        self._on_end = on_end
        self.segments: list[Segment] = []
        self.why: str | None = None
        """Why it was not mapped, where it might have been."""
        self._source: FileSource | None = None
        self._stream: Stream | None = None
        self._reservation: Reservation | None = None
        self._cached = 0.0
        self._copies: list[Segment] = []

    def run(self) -> None:
        """Opens, plans and starts the stream; returns while that goes on.

        Raises:
            ColdframeError: The checkpoint is bad, cannot be read or does not fit.
        """
        with self._recorder.span("checkpoint_open"):
            checkpoint = Checkpoint.open(self._options.path)
        with self._recorder.span("plan"):
            self.plan = Plan.build(checkpoint)
            self._source = source = FileSource(checkpoint.shards)
            mapped = self._may_map(source, checkpoint)
        self.board = Board([stage.nbytes for stage in self.plan.stages])
        if mapped:
            try:
                self._map(source, checkpoint)
            except BaseException:
                self.let_go()
                raise
        else:
            self._copy(source)

    def _may_map(self, source: FileSource, checkpoint: Checkpoint) -> bool:
        self._cached = source.cached_bytes() / sum(shard.size for shard in checkpoint.shards)
        if self._options.copy or self._options.throttle is not None:
            return False
        if self._cached < _MOSTLY:
            self.why = f"{100 * self._cached:.0f} % of it are in the page cache"
            return False
        self.why = source.take_lease()
        return self.why is None

    def _map(self, source: FileSource, checkpoint: Checkpoint) -> None:
        self.mode = "mapped"
        self.segments = [
            Segment(fd, 0, shard.size, base, False)
            for fd, shard, base in zip(
                source.fds, checkpoint.shards, self.plan.shard_bases, strict=True
            )
        ]
        # Under the lease nothing can change any more; what changed before it shows here.
        source.finish()
        self._on_plan()

        def fetch(extent: Extent, start: int, stop: int) -> None:
            source.make_resident(extent.shard, start, stop - start)

        self._start(source, fetch, note="mapped in place")

    def _copy(self, source: FileSource) -> None:
        self.mode = "copied"
        reservation = self._allocate(WEIGHTS_BASE)
        self.segments = self._copies
        self._on_plan()
        # What is mostly in the page cache comes faster from there. A link is modelled by either.
        if self._options.throttle is None and self._cached < _MOSTLY:
            source.use_direct()
        self._start(source, Placer(source, reservation.view()).fetch, note=source.note)

    def _start(self, source: FileSource, fetch: Fetch, *, note: str) -> None:
        rate = self._options.throttle
        self._stream = Stream(
            self.plan,
            fetch,
            self.board,
            finish=source.finish,
            on_stage=self._on_stage,
            on_end=self._on_end,
            recorder=self._recorder,
            threads=self._options.threads or source.readers or min(8, max(2, cpu_count())),
            throttle=None if rate is None else Throttle(rate),
            note=note,
        )
        self._stream.start()

    def _allocate(self, base: int | None) -> Reservation:
        """Memory for all of the arena: writable here, read-only for those who attach."""
        size = self.plan.arena_bytes
        fd = self._device.allocate("weights", size, now=True)
        try:
            reservation = Reservation(size, base)
            reservation.attach([Segment(fd, 0, size, 0, True)])
            # What others get can neither be written nor cut, whatever kind of memory it is.
            shared = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self._reservation = reservation
        self._copies = [Segment(shared, 0, size, 0, False)]
        return reservation

    @property
    def writer_waits(self) -> bool:
        """Whether somebody wants to write to a file that is mapped (see `move_out`)."""
        return self._source is not None and self._source.lease_is_breaking

    def move_out(self) -> list[Segment]:
        """Copies mapped files into memory of our own, byte for byte at the same places.

        Returns:
            Segments for `adopt`, to be mapped over the present ones; after that, call `let_go`.

        Raises:
            DeviceError: There is no memory for a copy.
            SourceError: The files cannot be read, or the writer was let in before the end.
        """
        assert self._source is not None
        reservation = self._allocate(None)
        for shard, segment in enumerate(self.segments):
            self._source.read_into(shard, 0, [reservation.view(segment.offset, segment.length)])
        # The kernel holds a writer back for lease-break-time, not for ever.
        self._source.finish()
        return self._copies

    def adopt(self, segments: list[Segment]) -> None:
        """From now on the weights are where `move_out` has put them."""
        self.mode, self.why = "copied", "somebody wanted to write to the files"
        self.segments = segments

    def let_go(self) -> None:
        """Ends the leases: writers may come in."""
        if self._source is not None:
            self._source.end_lease()

    def close(self) -> None:
        """Stops the stream and gives everything back."""
        if self._stream is not None:
            self._stream.cancel()
        if self._reservation is not None:
            self._reservation.close()
            for segment in self._copies:
                os.close(segment.fd)
        if self._source is not None:
            self._source.close()
