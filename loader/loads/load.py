"""One checkpoint on its way into an arena: opened, planned, then mapped in place or streamed.

A local checkpoint that is in the page cache already is mapped where it lies: nothing is copied.
The kernel may have dropped some of its pages, so each stage is given out once what is missing of
it has been read. All else is streamed, from the first of several places that has the checkpoint
(`resolving`). What becomes of the weights once they are in is told in `movable`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from coldframe.loader.arena import WEIGHTS_BASE
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoints.companions import Companions
from coldframe.loader.checkpoints.pieces import PIECE_BYTES
from coldframe.loader.checkpoints.plan import Extent, Layout, Plan, Rank
from coldframe.loader.checkpoints.seal_check import SealCheck
from coldframe.loader.devices import Device
from coldframe.loader.devices.base import Arena, Arrived, Landing
from coldframe.loader.errors import ColdframeError, DeviceError
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.chain import ChainSource, Opened, Places
from coldframe.loader.loads.movable import MovableWeights
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.loads.resolving import Resolver
from coldframe.loader.loads.source import SourceOpener
from coldframe.loader.loads.stream import CHUNK, Fetch, Stream
from coldframe.loader.memory_service.board import Board
from coldframe.loader.sources.base import SEALED, Source
from coldframe.loader.sources.file import FileSource
from coldframe.loader.sources.location import parse_location
from coldframe.loader.throttle import Throttle
from coldframe.loader.timeline import Recorder

# What only some loads need is imported by those.
if TYPE_CHECKING:
    from coldframe.loader.peers.node import Node
    from coldframe.loader.peers.sharing import Sharing

__all__ = ["Load"]

_MOSTLY = 0.9
"""Mapped is what has at least this share in the page cache; a cold file is read faster than mapped,
since a page fault brings in little at a time."""

_ALL = 1 << 62
"""A chunk that is never cut."""


class Load:
    """A checkpoint being loaded; see `AnyLoad`.

    Args:
        options: What and how.
        device: Whose memory it goes to.
        recorder: Where its spans go.
        events: Told how it goes.
        files_dir: Where the small files of a model that is not local are put.
    """

    weights: MovableWeights
    board: Board

    def __init__(
        self,
        options: LoadOptions,
        device: Device,
        recorder: Recorder,
        events: LoadEvents,
        *,
        files_dir: str,
    ) -> None:
        self._options = options
        self._device = device
        self._recorder = recorder
        self._events = events
        self._companions = Companions(files_dir, recorder, events.on_files, self._without_files)
        self._throttle = None if options.throttle is None else Throttle(options.throttle)
        self._resolver: Resolver | None = None
        self._node: Node | None = None
        self._sharing: Sharing | None = None
        self._source: Source | None = None
        self._stream: Stream | None = None
        self._landing: Landing | None = None
        self._opened = False
        """Whether there are `weights`."""
        self._cached = 0.0
        """Which share of the files is in the page cache."""
        self._ending = threading.Lock()
        self._failed = False
        self._closing = False
        self._given_up = False
        self._mixed = False
        """Whether the bytes are of several places, or of one behind the first."""

    @property
    def local(self) -> bool:
        return self._resolver is not None and self._resolver.local

    @property
    def identity(self) -> str | None:
        """See `AnyLoad`.

        A seal tells weights wherever they are; without one it is the versions of the files, and
        None where their place does not tell versions apart.
        """
        fingerprint = self.weights.plan.fingerprint
        if self._seal.seal is not None:
            return fingerprint
        versions = [shard.version for shard in self._checkpoint.shards]
        return "\0".join([fingerprint, *versions]) if all(versions) else None

    @property
    def proven(self) -> bool:
        sealed = self._seal.seal is not None
        return self.weights.verified == SEALED if sealed else not self._mixed

    @property
    def peers_at(self) -> str | None:
        return None if self._sharing is None else self._sharing.address

    # -- the beginning ---------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._begin()
        except BaseException:
            if self._node is not None:
                self._node.ended(failed=True)
            raise

    def _begin(self) -> None:
        options = self._options
        self._join_peers()
        self._resolver = resolver = Resolver(options, self._throttle, self._node, self.peers_at)
        with self._recorder.span("checkpoint_open"):
            opened, places = resolver.open()
        self._checkpoint = checkpoint = opened.checkpoint
        self._seal = seal = SealCheck(checkpoint.seal, wanted=options.verify)
        spare = None if resolver.peers is None else resolver.peers.spare
        self._companions.bring(
            opened.origin, checkpoint.config_raw, stay=not resolver.from_cache, spare=spare
        )
        local = opened.origin.path is not None
        with self._recorder.span("plan"):
            rank = Rank(options.rank, options.ranks)
            plan = Plan.build(checkpoint, layout=self._layout(local), rank=rank)
            self.weights = MovableWeights(
                *(plan, self._device, checkpoint, seal),
                keeping=resolver.keeping,
                sharing=self._sharing,
                distrust=self._distrust,
            )
            self._opened = True
            self.weights.why = resolver.why
            mapped = local and self._may_map()
        self.board = Board([stage.nbytes for stage in plan.stages])
        if self._node is not None:
            self._node.opened(plan.fingerprint, lambda: self.board.progress)
        if mapped:
            try:
                self._map()
            except BaseException:
                self.weights.let_go()
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

    def _may_map(self) -> bool:
        """Whether the files can be mapped where they lie; looks how much of them is cached."""
        weights, shards, options = self.weights, self._checkpoint.shards, self._options
        weights.files = files = FileSource(shards)
        self._cached = files.cached_bytes() / max(1, sum(shard.size for shard in shards))
        if self._device.layout is not None:
            return False
        if options.copy or options.throttle is not None or weights.plan.layout is not Layout.FILE:
            return False
        if self._cached < _MOSTLY:
            why_not: str | None = f"{100 * self._cached:.0f} % of it are in the page cache"
        else:
            why_not = files.take_lease()
        weights.why = "; ".join(filter(None, [weights.why, why_not])) or None
        return why_not is None

    # -- the two ways ----------------------------------------------------------------------------

    def _map(self) -> None:
        weights, files = self.weights, self.weights.files
        assert files is not None
        weights.lie_in_files()
        # Under the lease nothing can change any more; what changed before it shows here.
        files.finish()
        if self._sharing is not None:
            offered = (self._checkpoint, weights.plan, weights.segments)
            self._sharing.offer(*offered, self._companions.read, files)
        self._events.on_plan()

        def fetch(extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
            # Where all of it was there a moment ago, the fault of a page that is not is cheaper
            # than a look at each.
            if self._cached < 1:
                files.make_resident(extent.shard, start, stop - start)
            arrived(None)

        chunk = _ALL if self._cached == 1 else None
        note = f"mapped in place; {self._seal.unverified}"
        self._start(files, fetch, name="weight_read", note=lambda: note, chunk=chunk)

    def _copy(self, opened: Opened, later: Places) -> None:
        assert self._resolver is not None
        weights, plan, local = self.weights, self.weights.plan, opened.origin.path is not None
        # The files may be open already, to see how much of them is in the page cache.
        files, weights.files = weights.files, None
        sources = SourceOpener(
            self._seal,
            files,
            # What is mostly in the page cache comes faster from there. A link is modelled by both.
            direct=self._throttle is None and self._cached < _MOSTLY,
            keeping=self._resolver.keeping,
            arena=weights.view,
        )
        self._source = source = ChainSource(
            opened, later, sources.open, self._went_on, sealed=self._seal.seal is not None
        )

        def ready(arena: Arena) -> None:
            weights.lie_in(arena)
            if self._sharing is not None:
                offered = (self._checkpoint, plan, weights.memory())
                self._sharing.offer(*offered, self._companions.read, source)
            self._events.on_plan()

        self._landing = landing = self._device.land(
            source,
            plan.arena_bytes,
            WEIGHTS_BASE,
            readers=self._readers(source),
            chunk=source.chunk or CHUNK,
            ready=ready,
        )

        def note() -> str:
            parts = (source.note, landing.note, source.verified or self._seal.unverified)
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

    def _readers(self, source: Source) -> int:
        return self._options.threads or source.readers or min(8, max(2, cpu_count()))

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
        shared = self._sharing is not None
        self._stream = Stream(
            self.weights.plan,
            fetch,
            self.board,
            finish=source.finish,
            abort=self._give_up,
            stop=stop,
            on_chunk=self._chunk_in if shared else None,
            on_stage=self._stage_in if shared else self._events.on_stage,
            on_end=self._ended,
            recorder=self._recorder,
            threads=self._readers(source),
            chunk=chunk or source.chunk,
            smallest=PIECE_BYTES if self._seal.seal is not None else 0,
            throttle=throttle,
            name=name,
            note=note,
        )
        self._stream.start()

    # -- while it goes on ------------------------------------------------------------------------

    def _chunk_in(self, extent: Extent, start: int, stop: int) -> None:
        assert self._sharing is not None
        self._check_unchanged()
        self._sharing.arrived(extent.shard, start, stop)

    def _stage_in(self, stage: int) -> None:
        assert self._sharing is not None
        self._check_unchanged()
        self._sharing.ready(stage)
        self._events.on_stage(stage)

    def _check_unchanged(self) -> None:
        """Who takes the bytes on must not keep those of a file that changed meanwhile."""
        assert self._resolver is not None
        if self._source is not None and self._seal.seal is None and self._resolver.from_directory:
            self._source.finish()

    def _went_on(self, uri: str, error: ColdframeError) -> None:
        self._distrust(error)
        self._mixed = True
        self.weights.why = f"{error.where}: {error.what}; went on with {uri}"

    def _distrust(self, error: ColdframeError) -> None:
        if self._resolver is not None and self._resolver.distrusts(error):
            self._companions.wait()  # they are read there
            self._resolver.discard(error)

    def _give_up(self) -> None:
        """A reader has failed: the others need not wait for anything any more."""
        self._given_up = True
        if self._source is not None:
            self._source.abort()

    def _without_files(self, error: ColdframeError) -> None:
        # What is ended by `_give_up` is not the cause; that comes when the last reader is back.
        if not self._given_up:
            self._ended(error)

    # -- the end ---------------------------------------------------------------------------------

    def _ended(self, error: ColdframeError | None) -> None:
        with self._ending:
            # What fails after something else has failed is mostly its consequence.
            if self._failed:
                return
            self._failed = error is not None
        assert self._resolver is not None
        if self._opened:
            source = self._source or self.weights.files
            self.weights.verified = (source and source.verified) or self._seal.unverified
        if error is not None:
            self._distrust(error)
        if self._node is not None:
            self._node.ended(failed=error is not None)
        self._resolver.ended()
        if self._sharing is not None:
            self._sharing.end(error)
        self._events.on_end(error)
        keeping = self._resolver.keeping
        if error is not None or keeping is None or self._closing:
            return
        if self.local:
            self._events.on_kept(None)
        else:
            keeping.complete(self._companions.contents, self._events.on_kept)

    def landed(self) -> None:
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.close()

    def close(self) -> None:
        self._closing = True
        resolver, weights = self._resolver, self.weights if self._opened else None
        if weights is not None:
            weights.stop()
        if resolver is not None:
            resolver.stop()
        if self._source is not None:
            self._source.abort()
        if self._sharing is not None:
            self._sharing.close()
        if self._stream is not None:
            self._stream.cancel()
        if resolver is not None and resolver.keeping is not None:
            resolver.keeping.close()
        self.landed()
        for thing in (self._source, weights, resolver):
            if thing is not None:
                thing.close()
