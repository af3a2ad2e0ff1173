"""Weights that are in use and move nevertheless, without a worker noticing.

Each way elsewhere has three steps: a thread makes a second copy (`move_out`, `realign`), the loop
takes it for the weights from then on (`adopt`, `adopt_layout`), and once no worker has the first
one mapped any more it is given back (`let_go`, `retire`).

Mapped files are the reason for it. Mapping is safe only under a read lease, which holds back
whoever wants to write to a file: when one comes, the weights are copied out of the way. In a file
they lie as they were written, which may be where vector units read them badly. And a file that is
mapped was not held against its seal, since that would have read all of it first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.checkpoints.seal_check import SealCheck
from coldframe.loader.devices import Device
from coldframe.loader.devices.base import Arena
from coldframe.loader.errors import ColdframeError, ReplicaError, SourceCorrupt
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.realign import move
from coldframe.loader.loads.stream import pieces_of
from coldframe.loader.loads.weights import Weights
from coldframe.loader.sources.base import SEALED
from coldframe.loader.sources.file import FileSource

if TYPE_CHECKING:
    from coldframe.loader.disk_cache.keeping import Keeping
    from coldframe.loader.peers.sharing import Sharing

__all__ = ["MovableWeights"]

_VECTOR = 64
"""Bytes that a vector unit loads at once: what the kernels want tensors to be aligned to."""

_STEP = 64 << 20
"""Bytes that are moved out of a writer's way between two looks at whether that is still wanted."""

_SPARE = 256 << 20
"""Memory that a second copy of the weights must leave free."""


class MovableWeights(Weights):
    """Weights in an arena, or in the files that are mapped in place of one.

    Args:
        plan: How they lie.
        device: Whose memory it is.
        checkpoint: What they are.
        seal: What they are held against.
        keeping: Who may write them to the cache, where there is one.
        sharing: Who gives them to peers, likewise.
        distrust: Told of bytes that are not those that were sealed; it may add to the error's hint.

    Attributes:
        files: The checkpoint's files, where they are open: as long as they are mapped.
    """

    def __init__(
        self,
        plan: Plan,
        device: Device,
        checkpoint: Checkpoint,
        seal: SealCheck,
        *,
        keeping: Keeping | None,
        sharing: Sharing | None,
        distrust: Callable[[ColdframeError], None],
    ) -> None:
        super().__init__(plan, device)
        self.files: FileSource | None = None
        self._checkpoint = checkpoint
        self._seal = seal
        self._keeping = keeping
        self._sharing = sharing
        self._distrust = distrust
        self._retired: Arena | None = None
        self._closing = False
        self._handling = threading.Lock()
        """Held while weights that are ready are read, to be checked or to be put elsewhere."""

    # -- as they lie in their files --------------------------------------------------------------

    def lie_in_files(self) -> None:
        """They are where `files`, which are under a lease, are mapped."""
        assert self.files is not None
        self.mode = "mapped"
        places = zip(self.files.fds, self._checkpoint.shards, self.plan.shard_bases, strict=True)
        self.segments = [Segment(fd, 0, shard.size, base, False) for fd, shard, base in places]

    @property
    def writer_waits(self) -> bool:
        """Whether somebody wants to write to a file that is mapped (see `move_out`)."""
        return self.files is not None and self.files.lease_is_breaking

    @property
    def must_verify(self) -> bool:
        """Whether there is a seal that the weights, mapped and in use, were not held against.

        Also where they have been moved out of a writer's way since.
        """
        sealed = self._seal.seal is not None
        return sealed and self.verified != SEALED and self.plan.layout is Layout.FILE

    def verify(self) -> None:
        """Holds weights that lie as in their files against the seal.

        Ends early where a writer waits for a file: the weights must be out of its way first.

        Raises:
            SourceCorrupt: They are not what was sealed.
        """
        from coldframe.loader.checkpoints.verify import check_mapped

        seal, shards = self._seal.seal, self._checkpoint.shards
        assert seal is not None
        left_out = False

        def cancelled() -> bool:
            nonlocal left_out
            left_out = self._closing or self.writer_waits
            return left_out

        with self._handling:
            self._check_open()
            mapped = Reservation(self.plan.arena_bytes)
            try:
                mapped.attach(self.segments)
                bases = self.plan.shard_bases
                views = [mapped.view(at, file.size) for at, file in zip(bases, shards, strict=True)]
                check_mapped(views, seal, self._checkpoint, cancelled=cancelled)
            except SourceCorrupt as error:
                self._distrust(error)
                raise
            finally:
                mapped.close()
        if not left_out:
            self.verified = SEALED

    # -- out of a writer's way -------------------------------------------------------------------

    def move_out(self) -> list[Segment]:
        """Copies mapped files into memory of our own, byte for byte at the same places.

        Returns:
            Segments for `adopt`, to be mapped over the present ones; after that, call `let_go`.

        Raises:
            DeviceError: There is no memory for a copy.
            SourceError: The files cannot be read, or the writer was let in before the end.
        """
        with self._handling:
            self._check_open()
            assert self.files is not None
            self._arena = arena = self._device.arena("weights", self.plan.arena_bytes, now=True)
            memory = _bytes_of(arena, self.plan)
            for shard, segment in enumerate(self.segments):
                for at in range(0, segment.length, _STEP):
                    self._check_open()
                    count = min(_STEP, segment.length - at)
                    to = segment.offset + at
                    self.files.read_into(shard, at, [memory[to : to + count]])
            # The kernel holds a writer back for lease-break-time, not for ever.
            self.files.finish()
            return arena.segments

    def adopt(self, segments: list[Segment]) -> None:
        """From now on the weights are where `move_out` has put them."""
        self.mode, self.why = "copied", "somebody wanted to write to the files"
        self.segments = segments
        if self._sharing is not None:
            self._sharing.moved(segments)

    def let_go(self) -> None:
        """Ends the leases: writers may come in."""
        if self.files is not None:
            self.files.end_lease()

    # -- laid out anew ---------------------------------------------------------------------------

    @property
    def may_realign(self) -> bool:
        """Whether a layout with every tensor aligned is worth having, and there is room for it."""
        # Peers read the arena where it is.
        if self.plan.layout is not Layout.FILE or self._sharing is not None:
            return False
        # And so does who writes the cache.
        if self._keeping is not None and self._keeping.busy:
            return False
        if all(p.arena_offset % _VECTOR == 0 for p in self.plan.placements.values()):
            return False
        return self._device.available() > self.plan.arena_bytes + _SPARE

    def realign(self) -> tuple[Plan, Arena]:
        """Copies the weights into memory of our own, laid out anew, beside where they are now.

        Returns:
            For `adopt_layout`.

        Raises:
            DeviceError: There is no memory for it.
            SourceError: The files cannot be read, or are not what they should be.
        """
        if self._arena is not None and self.must_verify:
            self.verify()
        plan = Plan.build(self._checkpoint, layout=Layout.ALIGNED)
        with self._handling:
            self._check_open()
            arena = self._device.arena("weights", plan.arena_bytes, now=True)
            memory = _bytes_of(arena, plan)
            try:
                if self._arena is not None:
                    old = _bytes_of(self._arena, self.plan)
                    move(self.plan, old, plan, memory, self._check_open)
                else:
                    assert self.files is not None
                    source = self._seal.checked(self.files, self._checkpoint)
                    fetch = Placer(source, memory).fetch
                    for extent, start, stop in pieces_of(plan):
                        self._check_open()
                        fetch(extent, start, stop)
                    self.files.finish()
            except BaseException as error:
                arena.close()
                if isinstance(error, SourceCorrupt):
                    self._distrust(error)
                raise
        return plan, arena

    def adopt_layout(self, plan: Plan, arena: Arena) -> None:
        """From now on the weights are where `realign` has put them; the rest waits for `retire`."""
        if self.mode == "mapped" and self._seal.seal is not None:
            self.verified = SEALED
        self._retired = self._arena
        self.plan = plan
        self.lie_in(arena)
        self.why = "laid out anew behind the first token"

    def retire(self) -> None:
        """Gives back what `adopt_layout` has replaced: nobody has it mapped any more."""
        if self._retired is not None:
            self._retired.close()
            self._retired = None
        if self.files is not None:
            self.files.close()
            self.files = None

    # -- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends what a thread does with the weights, soon; `close` is to follow."""
        self._closing = True

    def _check_open(self) -> None:
        if self._closing:
            raise ReplicaError("the load is being closed")

    def close(self) -> None:
        """Gives everything back, once no thread reads it here any more."""
        with self._handling:
            if self.files is not None:
                self.files.close()
            super().close()
            if self._retired is not None:
                self._retired.close()


def _bytes_of(arena: Arena, plan: Plan) -> memoryview:
    """An arena's bytes, of a device where weights may lie in any layout: the host's."""
    view = arena.view(0, plan.arena_bytes)
    assert view is not None
    return view
