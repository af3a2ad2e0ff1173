"""A memory service as its peers see it: a checkpoint in memory that comes in stage by stage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.loads.placing import Placer
from coldframe.loader.memory import HostMemory
from coldframe.loader.memory_service.board import Progress
from coldframe.loader.peers.listener import listen
from coldframe.loader.peers.node import Node
from coldframe.loader.peers.server import PeerServer, ServerLimits
from coldframe.loader.peers.serving import Offer
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from tests.support import no_threads_left

TOKEN = "correct-horse"
DEFAULT = ServerLimits()


def offer_of(root: Path, memory: memoryview | None = None) -> tuple[Checkpoint, Plan, Offer]:
    """A directory's checkpoint, not loaded yet, as it is offered."""
    checkpoint = Checkpoint.open(root)
    plan = Plan.build(checkpoint)
    if memory is None:
        memory = memoryview(bytearray(plan.arena_bytes))
    small = DirectoryOrigin(str(root)).read_small
    headers = checkpoint.headers
    return (
        checkpoint,
        plan,
        Offer(checkpoint, plan, HostMemory(memory), headers=headers, read_small=small),
    )


class Serving:
    """A server of a directory's checkpoint.

    Args:
        root: The directory.
        token: As for `PeerServer`.
        limits: As for `PeerServer`.
        loaded: Whether all of it is in at once.
        port: Where; 0 takes a free port.
        node: What it tells of itself.
    """

    def __init__(
        self,
        root: Path,
        *,
        token: str | None = TOKEN,
        limits: ServerLimits = DEFAULT,
        loaded: bool = True,
        port: int = 0,
        node: Node | None = None,
    ) -> None:
        checkpoint = Checkpoint.open(root)
        self.memory = memoryview(bytearray(Plan.build(checkpoint).arena_bytes))
        self.checkpoint, self.plan, self.offer = offer_of(root, self.memory)
        self.files = FileSource(checkpoint.shards)
        self.server = PeerServer(listen("127.0.0.1", port), token, limits, node)
        if node is not None:
            node.opened(self.offer.fingerprint, self._progress)
        self.node = node
        self._done = 0
        self.server.offer(self.offer)
        self.host, self.port = self.server.address
        if loaded:
            self.bring(*range(len(self.plan.stages)))
            self.finish()

    def finish(self) -> None:
        """All of it is in."""
        self.offer.gate.end(None)
        if self.node is not None:
            self.node.ended(failed=False)

    def _progress(self) -> Progress:
        return Progress(self._done, self.plan.weights_bytes)

    def bring(self, *stages: int) -> None:
        """Reads stages from the disk, then lets them be served."""
        placer = Placer(self.files, self.memory)
        for stage in stages:
            for extent in self.plan.stages[stage].extents:
                placer.fetch(extent, extent.file_offset, extent.file_offset + extent.length)
            self._done += self.plan.stages[stage].nbytes
            self.offer.gate.ready(stage)

    def close(self) -> None:
        self.server.close()
        self.files.close()


@contextmanager
def serving(
    root: Path,
    *,
    token: str | None = TOKEN,
    limits: ServerLimits = DEFAULT,
    loaded: bool = True,
    node: Node | None = None,
) -> Iterator[Serving]:
    """A server for the length of a block, after which no thread or descriptor is left."""
    fds = len(os.listdir("/proc/self/fd"))
    with no_threads_left():
        peer = Serving(root, token=token, limits=limits, loaded=loaded, node=node)
        try:
            yield peer
        finally:
            peer.close()
    assert len(os.listdir("/proc/self/fd")) == fds
