"""One checkpoint on its way into an arena: opened, planned, then mapped in place or streamed.

A local checkpoint that is in the page cache already is mapped where it lies: nothing is copied.
The kernel may have dropped some of its pages, so each stage is given out once what is missing of
it has been read. Mapping is safe only under a read lease, which holds back whoever wants to write
to a file; when one comes, the weights are copied out of the way (`move_out`) and the files let go,
and no worker notices.

All else is streamed, from the first of several places that has the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from coldframe.loader.arena import WEIGHTS_BASE, Reservation, Segment
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.companions import Companions
from coldframe.loader.checkpoints.pieces import PIECE_BYTES
from coldframe.loader.checkpoints.plan import Extent, Layout, Plan, Rank
from coldframe.loader.devices import Device
from coldframe.loader.devices.base import Arena, Arrived, Landing
from coldframe.loader.devices.parked import ParkableMemory, ParkedWeights, stretches_of
from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    ReplicaError,
    SourceCorrupt,
    SourceUnreachable,
)
from coldframe.loader.loads.chain import ChainSource, Opened, Places, first_that_opens
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.realign import move
from coldframe.loader.loads.stream import CHUNK, Fetch, Stream, pieces_of
from coldframe.loader.memory_service.board import Board
from coldframe.loader.sources.base import SEALED, Origin, Source
from coldframe.loader.sources.file import FileSource
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import origins_of
from coldframe.loader.throttle import Throttle
from coldframe.loader.timeline import Recorder

# What only some loads need is imported by those.
if TYPE_CHECKING:
    from coldframe.loader.disk_cache.keeping import Keeping
    from coldframe.loader.peers.following import Following
    from coldframe.loader.peers.node import Node
    from coldframe.loader.peers.sharing import Sharing

__all__ = ["Load"]

_MOSTLY = 0.9
"""Mapped is what has at least this share in the page cache; a cold file is read faster than mapped,
since a page fault brings in little at a time."""

_ALL = 1 << 62
"""A chunk that is never cut."""

_VECTOR = 64
"""Bytes that a vector unit loads at once: what the kernels want tensors to be aligned to."""

_STEP = 64 << 20
"""Bytes that are moved out of a writer's way between two looks at whether that is still wanted."""

_SPARE = 256 << 20
"""Memory that a second copy of the weights must leave free."""


class Load:
    """A checkpoint being loaded.

    Args:
        options: What and how.
        device: Whose memory it goes to.
        recorder: Where its spans go.
        files_dir: Where the small files of a model that is not local are put.
        on_files: Called with the directory that has the model's small files, once they are there.
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
        files_dir: str,
        on_files: Callable[[str], None],
        on_plan: Callable[[], None],
        on_stage: Callable[[int], None],
        on_end: Callable[[ColdframeError | None], None],
        on_kept: Callable[[str | None], None] = lambda why: None,
    ) -> None:
        self._options = options
        self._device = device
        self._recorder = recorder
        self._companions = Companions(files_dir, recorder, on_files, self._without_files)
        self._on_plan = on_plan
        self._on_stage = on_stage
        self._on_end = on_end
        self._on_kept = on_kept
        self.segments: list[Segment] = []
        self.why: str | None = None
        """Why it was not mapped, or not read from the first place, where it might have been."""
        self.verified = "not verified yet"
        """What vouches for the bytes; in a mapped file, from when they have been read once."""
        self._origins: list[Origin] = []
        self._files: FileSource | None = None
        self._source: Source | None = None
        self._stream: Stream | None = None
        self._arena: Arena | None = None
        self._retired: Arena | None = None
        self._landing: Landing | None = None
        self._keeping: Keeping | None = None
        self._sharing: Sharing | None = None
        self._node: Node | None = None
        self._peers: Following | None = None
        self._memory: ParkableMemory | None = None
        self._parked: ParkedWeights | None = None
        self._cached = 0.0
        self._ending = threading.Lock()
        self._failed = False
        self._from_cache = False
        self._closing = False
        self._given_up = False
        self._mixed = False
        self._handling = threading.Lock()
        """Held while weights that are ready are read, to be checked or to be put elsewhere."""

    @property
    def local(self) -> bool:
        """Whether the checkpoint lies in a directory of the user's, and not only in the cache.

        An entry of the cache that turns out bad is taken away, by us or by another process.
        """
        return self._from_directory and not self._from_cache

    @property
    def identity(self) -> str | None:
        """What tells these weights from all others, for what is kept beyond this replica.

        A seal does so wherever they are; without one it is the versions of the files, and None
        where their place does not tell versions apart. Known once there is a plan.
        """
        if self._sealed:
            return self.plan.fingerprint
        versions = [shard.version for shard in self._checkpoint.shards]
        return "\0".join([self.plan.fingerprint, *versions]) if all(versions) else None

    @property
    def proven(self) -> bool:
        """Whether the weights, being in, are known to be those that `identity` names."""
        return self.verified == SEALED if self._sealed else not self._mixed

    @property
    def _from_directory(self) -> bool:
        return bool(self._origins) and self._origins[-1].path is not None

    @property
    def _uris(self) -> list[str]:
        """All places, the model's first, as the cache knows them."""
        places = [self._options.model, *self._options.sources]
        return [parse_location(place).uri for place in places]

    @property
    def peers_at(self) -> str | None:
        """Where peers are served, `HOST:PORT`; None where they are not."""
        return None if self._sharing is None else self._sharing.address

    def run(self) -> None:
        """Opens, plans and starts the stream; returns while that goes on.

        Raises:
            ColdframeError: The checkpoint is bad, cannot be read or does not fit.
        """
        try:
            self._begin()
        except BaseException:
            if self._node is not None:
                self._node.ended(failed=True)
            raise

    def _begin(self) -> None:
        options = self._options
        self._throttle = None if options.throttle is None else Throttle(options.throttle)
        self._join_peers()
        if options.cache is not None:
            from coldframe.loader.disk_cache.keeping import Keeping

            self._keeping = Keeping(options.cache, options.cache_bytes)
        places: Places = origins_of(
            [*options.sources, options.model],
            self._throttle,
            # An empty cache steps in for nobody.
            hurry_last=any(self._keeping.knows(uri) for uri in self._uris if self._keeping),
        )
        if self._node is not None and (options.peers or options.peers_from):
            from coldframe.loader.peers.joining import follow

            self._peers = follow(options, self._node, self._throttle, places, self.peers_at)
            places = self._peers.places()
        with self._recorder.span("checkpoint_open"):
            opened, places = self._open(places)
        self._checkpoint = opened.checkpoint
        config = opened.checkpoint.config_raw
        spare = None if self._peers is None else self._peers.spare
        self._companions.bring(opened.origin, config, stay=not self._from_cache, spare=spare)
        local = opened.origin.path is not None
        with self._recorder.span("plan"):
            rank = Rank(options.rank, options.ranks)
            self.plan = Plan.build(opened.checkpoint, layout=self._layout(local), rank=rank)
            mapped = local and self._may_map(opened.checkpoint)
        self.board = Board([stage.nbytes for stage in self.plan.stages])
        if self._node is not None:
            self._node.opened(self.plan.fingerprint, lambda: self.board.progress)
        if mapped:
            try:
                self._map(opened.checkpoint)
            except BaseException:
                self.let_go()
                raise
        else:
            self._copy(opened, places)

    def _join_peers(self) -> None:
        """Is a node among others from here on, where that was asked for."""
        options = self._options
        if options.serve_peers is None and not options.peers and not options.peers_from:
            return
        from coldframe.loader.peers.node import Node

        model, whole = parse_location(options.model).uri, options.ranks == 1
        self._node = Node(model, readers=options.peer_readers, whole=whole)
        if options.serve_peers is not None:
            from coldframe.loader.peers.sharing import Sharing

            self._sharing = Sharing(options.serve_peers, options.peer_token, self._node)

    def _layout(self, local: bool) -> Layout:
        """How the weights are to lie."""
        wanted, needed = self._options.layout, self._device.layout
        if needed is None:
            mirror = local and self._sharing is None
            return Layout(wanted or (Layout.FILE if mirror else Layout.ALIGNED))
        if wanted not in (None, needed):
            raise DeviceError(
                "weights cannot lie like that in this device's memory",
                where=self._device.name,
                expected=str(needed),
                got=wanted,
                hint="Leave the layout to the device.",
            )
        return needed

    def _open(self, places: Places) -> tuple[Opened, Places]:
        """The place to read first, and those behind it; the cache stands before a network."""
        failures: list[ColdframeError] = []
        try:
            opened = first_that_opens(places, failures)
        except SourceUnreachable as error:
            found = (self._keeping.find_uri(uri) for uri in self._uris if self._keeping)
            kept = next((opened for opened in found if opened is not None), None)
            if kept is None:
                raise
            self.why = f"from the cache: {error.where}: {error.what}"
            self._from_cache = True
            self._origins.append(kept.origin)
            return kept, places
        if self._peers is not None:
            self.why = self._peers.why
        elif failures:
            self.why = "; ".join(f"{error.where}: {error.what}" for error in failures)
        self._origins.append(opened.origin)
        if self._keeping is None or opened.origin.path is not None:
            return opened, places
        kept = self._keeping.find(opened.checkpoint)
        if kept is None:
            return opened, places
        self.why = "from the cache"
        if self._peers is not None:
            self._peers.ended()
        self._from_cache = True
        self._origins.append(kept.origin)
        return kept, chain([lambda: opened.origin], places)

    def _may_map(self, checkpoint: Checkpoint) -> bool:
        """Whether the files can be mapped where they lie; looks how much of them is cached."""
        files = self._files = FileSource(checkpoint.shards)
        total = sum(shard.size for shard in checkpoint.shards)
        self._cached = files.cached_bytes() / max(1, total)
        options = self._options
        if self._device.layout is not None:
            return False
        if options.copy or options.throttle is not None or self.plan.layout is not Layout.FILE:
            return False
        if self._cached < _MOSTLY:
            why_not: str | None = f"{100 * self._cached:.0f} % of it are in the page cache"
        else:
            why_not = files.take_lease()
        self.why = "; ".join(filter(None, [self.why, why_not])) or None
        return why_not is None

    def _map(self, checkpoint: Checkpoint) -> None:
        assert self._files is not None
        files = self._files
        self.mode = "mapped"
        self.segments = [
            Segment(fd, 0, shard.size, base, False)
            for fd, shard, base in zip(
                files.fds, checkpoint.shards, self.plan.shard_bases, strict=True
            )
        ]
        # Under the lease nothing can change any more; what changed before it shows here.
        files.finish()
        if self._sharing is not None:
            self._sharing.offer(checkpoint, self.plan, self.segments, self._companions.read, files)
        self._on_plan()

        def fetch(extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
            # Where all of it was there a moment ago, the fault of a page that is not is cheaper
            # than a look at each.
            if self._cached < 1:
                files.make_resident(extent.shard, start, stop - start)
            arrived(None)

        chunk = _ALL if self._cached == 1 else None
        note = f"mapped in place; {self._unverified}"
        self._start(files, fetch, name="weight_read", note=lambda: note, chunk=chunk)

    def _copy(self, opened: Opened, later: Places) -> None:
        self.mode = "copied"
        checkpoint, local = opened.checkpoint, opened.origin.path is not None
        self._source = source = ChainSource(
            opened, later, self._open_source, self._went_on, sealed=self._sealed
        )

        def ready(arena: Arena) -> None:
            self._arena, self.segments = arena, arena.segments
            if self._sharing is not None:
                self._memory = memory = ParkableMemory(arena)
                self._sharing.offer(checkpoint, self.plan, memory, self._companions.read, source)
            self._on_plan()

        self._landing = landing = self._device.land(
            source,
            self.plan.arena_bytes,
            WEIGHTS_BASE,
            readers=self._readers(source),
            chunk=source.chunk or CHUNK,
            ready=ready,
        )

        def note() -> str:
            parts = (source.note, landing.note, source.verified or self._unverified)
            return "; ".join(filter(None, parts))

        self._start(
            source,
            landing.fetch,
            name="weight_read" if local else "weight_fetch",
            note=note,
            stop=landing.cancel,
            # A reader of the network keeps to the limit by itself.
            throttle=self._throttle if local else None,
        )

    def _open_source(self, opened: Opened) -> Source:
        source = self._checked(self._plain_source(opened), opened.checkpoint)
        if self._keeping is None or opened.origin.path is not None or self._source is not None:
            return source
        # What comes from a place behind the first is not kept: unless sealed, nobody knows whether
        # it is what the first one has.
        return self._keeping.write_through(source, opened.checkpoint, self._host_bytes)

    def _host_bytes(self) -> memoryview | None:
        """The arena's bytes, where the host can look at them; once they are being filled."""
        return None if self._arena is None else self._arena.view(0, self.plan.arena_bytes)

    def _readers(self, source: Source) -> int:
        return self._options.threads or source.readers or min(8, max(2, cpu_count()))

    def _checked(self, source: Source, checkpoint: Checkpoint) -> Source:
        """A source that holds what it gives against the checkpoint's seal, where there is one."""
        if not self._sealed:
            return source
        from coldframe.loader.checkpoints.verify import VerifiedSource

        # Of two places that hold the same, one may have no seal.
        seal = checkpoint.seal or self._checkpoint.seal
        assert seal is not None
        return VerifiedSource(source, seal, checkpoint)

    @property
    def _sealed(self) -> bool:
        return self._checkpoint.seal is not None and self._options.verify

    @property
    def _unverified(self) -> str:
        if not self._options.verify:
            return "unverified, as asked"
        if self._checkpoint.seal is None:
            return "unverified: the checkpoint is not sealed (coldframe seal MODEL)"
        return "to be verified behind the first token"

    def _plain_source(self, opened: Opened) -> Source:
        if opened.origin.path is None:
            return opened.origin.open_source(opened.checkpoint.shards, sealed=self._sealed)
        # The files may be open already, to see how much of them is in the page cache.
        files, self._files = self._files, None
        files = files or FileSource(opened.checkpoint.shards)
        # What is mostly in the page cache comes faster from there. A link is modelled by either.
        if self._options.throttle is None and self._cached < _MOSTLY:
            try:
                files.use_direct()
            except BaseException:
                files.close()
                raise
        return files

    def _went_on(self, uri: str, error: ColdframeError) -> None:
        self._distrust(error)
        self._mixed = True
        self.why = f"{error.where}: {error.what}; went on with {uri}"

    def _distrust(self, error: ColdframeError) -> None:
        """Takes what the cache had away where it is corrupt, so that no start meets it again."""
        if self._keeping is not None and self._from_cache and isinstance(error, SourceCorrupt):
            self._companions.wait()  # they are read there
            if self._keeping.discard():
                error.hint = "It was in the cache, and is taken away: start again."

    def _start(
        self,
        source: Source,
        fetch: Fetch,
        *,
        name: str,
        note: Callable[[], str],
        chunk: int | None = None,
        stop: Callable[[], None] = lambda: None,
        throttle: Throttle | None = None,
    ) -> None:
        self._stream = Stream(
            self.plan,
            fetch,
            self.board,
            finish=source.finish,
            abort=self._give_up,
            stop=stop,
            on_chunk=None if self._sharing is None else self._chunk_in,
            on_stage=self._stage_ready,
            on_end=self._ended,
            recorder=self._recorder,
            threads=self._readers(source),
            chunk=chunk or source.chunk,
            smallest=PIECE_BYTES if self._sealed else 0,
            throttle=throttle,
            name=name,
            note=note,
        )
        self._stream.start()

    def _chunk_in(self, extent: Extent, start: int, stop: int) -> None:
        if self._sharing is not None:
            self._check_unchanged()
            self._sharing.arrived(extent.shard, start, stop)

    def _stage_ready(self, stage: int) -> None:
        if self._sharing is not None:
            self._check_unchanged()
            self._sharing.ready(stage)
        self._on_stage(stage)

    def _check_unchanged(self) -> None:
        """Who takes the bytes on must not keep those of a file that changed meanwhile."""
        if self._from_directory and self._source is not None and not self._sealed:
            self._source.finish()

    def _give_up(self) -> None:
        """A reader has failed: the others need not wait for anything any more."""
        self._given_up = True
        if self._source is not None:
            self._source.abort()

    def _without_files(self, error: ColdframeError) -> None:
        # What is ended by `_give_up` is not the cause; that comes when the last reader is back.
        if not self._given_up:
            self._ended(error)

    def _ended(self, error: ColdframeError | None) -> None:
        with self._ending:
            # What fails after something else has failed is mostly its consequence.
            if self._failed:
                return
            self._failed = error is not None
        source = self._source or self._files
        self.verified = (source and source.verified) or self._unverified
        if error is not None:
            self._distrust(error)
        if self._node is not None:
            self._node.ended(failed=error is not None)
        if self._peers is not None:
            self._peers.ended()
        if self._sharing is not None:
            self._sharing.end(error)
        self._on_end(error)
        if error is not None or self._keeping is None or self._closing:
            return
        if self.local:
            self._on_kept(None)
        else:
            self._keeping.complete(self._companions.contents, self._on_kept)

    @property
    def writer_waits(self) -> bool:
        """Whether somebody wants to write to a file that is mapped (see `move_out`)."""
        return self._files is not None and self._files.lease_is_breaking

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
            assert self._files is not None
            self._arena = arena = self._device.arena("weights", self.plan.arena_bytes, now=True)
            memory = _bytes_of(arena, self.plan)
            for shard, segment in enumerate(self.segments):
                for at in range(0, segment.length, _STEP):
                    self._check_open()
                    count = min(_STEP, segment.length - at)
                    to = segment.offset + at
                    self._files.read_into(shard, at, [memory[to : to + count]])
            # The kernel holds a writer back for lease-break-time, not for ever.
            self._files.finish()
            return arena.segments

    def _check_open(self) -> None:
        """Ends what a thread does with the weights once `close` wants to give them back."""
        if self._closing:
            raise ReplicaError("the load is being closed")

    def adopt(self, segments: list[Segment]) -> None:
        """From now on the weights are where `move_out` has put them."""
        self.mode, self.why = "copied", "somebody wanted to write to the files"
        self.segments = segments
        if self._sharing is not None:
            self._sharing.moved(segments)

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

    @property
    def must_verify(self) -> bool:
        """Whether there is a seal that the weights, mapped and in use, were not held against.

        Also where they have been moved out of a writer's way since.
        """
        return self._sealed and self.verified != SEALED and self.plan.layout is Layout.FILE

    def verify(self) -> None:
        """Holds weights that lie as in their files against the seal.

        Ends early where a writer waits for a file: the weights must be out of its way first.

        Raises:
            SourceCorrupt: They are not what was sealed.
        """
        from coldframe.loader.checkpoints.verify import check_mapped

        seal, shards = self._checkpoint.seal, self._checkpoint.shards
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
                    assert self._files is not None
                    fetch = Placer(self._checked(self._files, self._checkpoint), memory).fetch
                    for extent, start, stop in pieces_of(plan):
                        self._check_open()
                        fetch(extent, start, stop)
                    self._files.finish()
            except BaseException as error:
                arena.close()
                if isinstance(error, SourceCorrupt):
                    self._distrust(error)
                raise
        return plan, arena

    def adopt_layout(self, plan: Plan, arena: Arena) -> None:
        """From now on the weights are where `realign` has put them; the rest waits for `retire`."""
        if self.mode == "mapped" and self._sealed:
            self.verified = SEALED
        self.mode, self.why = "copied", "laid out anew behind the first token"
        self._retired, self._arena = self._arena, arena
        self.plan, self.segments = plan, arena.segments

    def retire(self) -> None:
        """Gives back what `adopt_layout` has replaced: nobody has it mapped any more."""
        if self._retired is not None:
            self._retired.close()
            self._retired = None
        if self._files is not None:
            self._files.close()
            self._files = None

    def parked(self) -> ParkedWeights:
        """What has the weights leave the device and come back; once, when all of them are in."""
        self._parked = weights = self._device.parked(self._arena, stretches_of(self.plan))
        if self._memory is not None:
            self._memory.weights = weights
        return weights

    def landed(self) -> None:
        """Gives back what only the stream needed; to be called once it has ended."""
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.close()

    def let_go(self) -> None:
        """Ends the leases: writers may come in."""
        if self._files is not None:
            self._files.end_lease()

    def close(self) -> None:
        """Stops the stream and gives everything back."""
        self._closing = True
        if self._peers is not None:
            self._peers.close()
        if self._source is not None:
            self._source.abort()
        if self._sharing is not None:
            self._sharing.close()
        if self._stream is not None:
            self._stream.cancel()
        if self._keeping is not None:
            self._keeping.close()
        self.landed()
        with self._handling:
            things = (self._source, self._files, self._parked, self._arena, self._retired)
            for thing in (*things, *self._origins):
                if thing is not None:
                    thing.close()


def _bytes_of(arena: Arena, plan: Plan) -> memoryview:
    """An arena's bytes, of a device where weights may lie in any layout: the host's."""
    view = arena.view(0, plan.arena_bytes)
    assert view is not None
    return view
