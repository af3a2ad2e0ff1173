"""Whole loads from peers, by the reader and the stream that a replica uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices.cpu import HostLanding
from coldframe.loader.errors import (
    ColdframeError,
    SourceChanged,
    SourceCredentials,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.loads.chain import ChainSource, Opened
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.stream import Stream
from coldframe.loader.memory import HostMemory
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.peers.listener import listen
from coldframe.loader.peers.server import PeerServer, ServerLimits
from coldframe.loader.peers.serving import Offer
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.location import Peer
from coldframe.loader.timeline import Recorder
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.peer import PeerOrigin, peer_origin
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.peers.peer import TOKEN, Serving, offer_of, serving
from tests.loader.web.servers import nginx
from tests.loader.weights import arena_tensors, layered, reference

BRIEF = Limits(patience_s=0.3, backoff_s=0.01, hedges=0)


def origin_of(where: tuple[str, int], limits: Limits | None = None) -> PeerOrigin:
    host, port = where
    if limits is None:
        return peer_origin(Peer(host, port), token=TOKEN)
    return peer_origin(Peer(host, port), token=TOKEN, limits=limits)


class Node:
    """A memory service that loads from a peer, and is one itself."""

    def __init__(
        self,
        where: tuple[str, int],
        *,
        layout: str = "file",
        limits: Limits | None = None,
        on_stage: Callable[[int], None] = lambda stage: None,
        later: list[Callable[[], DirectoryOrigin]] | None = None,
    ) -> None:
        self.origin = origin_of(where, limits)
        self.checkpoint = Checkpoint.open(self.origin)
        self.plan = plan = Plan.build(self.checkpoint, layout=layout)
        self.memory = memoryview(bytearray(plan.arena_bytes))
        self.went_on: list[str] = []
        self.source = ChainSource(
            Opened(self.origin, self.checkpoint),
            iter(later or []),
            lambda opened: opened.origin.open_source(opened.checkpoint.shards),
            lambda uri, error: self.went_on.append(uri),
            sealed=False,
        )
        config = self.origin.read_small("config.json", 1 << 20)

        def small(name: str, limit: int) -> bytes:
            if name == "config.json":
                return config
            raise SourceNotFound("no such file", where=name)

        self.offer = Offer(
            self.checkpoint,
            plan,
            HostMemory(self.memory),
            headers=self.checkpoint.headers,
            read_small=small,
            read_rest=lambda name, at, buffer: self.source.read_into(0, at, [buffer]),
        )
        self.server = PeerServer(listen("127.0.0.1", 0), TOKEN, ServerLimits(beat_s=0.02))
        self.server.offer(self.offer)
        self.board = Board([stage.nbytes for stage in plan.stages])
        self.there = [threading.Event() for _ in plan.stages]
        self.error: ColdframeError | None = None
        self.ended = threading.Event()
        self._on_stage = on_stage
        self.stream = Stream(
            plan,
            HostLanding(Placer(self.source, self.memory)).fetch,
            self.board,
            finish=self.source.finish,
            on_stage=self._stage,
            on_end=self._end,
            recorder=Recorder("memory"),
            threads=4,
        )
        self.stream.start()

    def _stage(self, stage: int) -> None:
        self._on_stage(stage)
        self.there[stage].set()
        self.offer.gate.ready(stage)

    def _end(self, error: ColdframeError | None) -> None:
        self.error = error
        if error is None:
            self.offer.gate.end(None)
        else:
            self.server.fail(error)
        self.ended.set()

    def finish(self) -> ColdframeError | None:
        assert self.ended.wait(30)
        return self.error

    def tensors(self) -> dict[str, bytes]:
        return arena_tensors(self.plan, self.memory)

    def close(self) -> None:
        self.server.close()
        self.source.abort()
        self.stream.cancel()
        self.source.close()
        self.origin.close()
        self.board.close()


@contextmanager
def node(
    where: tuple[str, int],
    *,
    layout: str = "file",
    limits: Limits | None = None,
    on_stage: Callable[[int], None] = lambda stage: None,
    later: list[Callable[[], DirectoryOrigin]] | None = None,
) -> Iterator[Node]:
    made = Node(where, layout=layout, limits=limits, on_stage=on_stage, later=later)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("layout", ["file", "aligned"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_what_safetensors_reads(tmp_path: Path, shards: int, layout: str) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=600_000, shards=shards)
    # A chain, so that each layout is also served.
    with (
        serving(root) as first,
        node(first.server.address, layout=layout) as second,
        node(second.server.address, layout="file") as third,
    ):
        for loaded in (second, third):
            assert loaded.finish() is None
            assert loaded.tensors() == reference(root)
        assert second.checkpoint.fingerprint == first.checkpoint.fingerprint
        assert "connection" in second.source.note


def test_tensors_that_no_model_uses_do_not_stop_a_chain(tmp_path: Path) -> None:
    names = ["a.embed.w", "layers.0.a", "layers.0.rotary_emb.inv_freq", "layers.0.b", "head.w"]
    root = write_model(tmp_path / "m", [[tensor(n, 300, s) for s, n in enumerate(names)]])
    with (
        serving(root) as first,
        node(first.server.address, layout="aligned") as second,
        node(second.server.address) as third,
    ):
        assert third.finish() is None
        expected = reference(root)
        del expected["layers.0.rotary_emb.inv_freq"]
        assert third.tensors() == expected


def test_a_checkpoint_is_opened_before_any_of_its_weights_are_in(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=100, shards=2)
    with serving(root, loaded=False) as peer:
        origin = origin_of(peer.server.address)
        found = Checkpoint.open(origin)
        assert found.fingerprint == peer.checkpoint.fingerprint
        assert [shard.uri for shard in found.shards] == [
            f"peer://127.0.0.1:{peer.port}/{shard.name}" for shard in peer.checkpoint.shards
        ]
        origin.close()


def test_stages_go_down_a_chain_while_it_is_loading(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=5, nbytes=50_000)
    events: list[str] = []
    with (
        serving(root, loaded=False, limits=ServerLimits(beat_s=0.02)) as first,
        node(first.server.address, on_stage=lambda s: events.append(f"second {s}")) as second,
        node(second.server.address, on_stage=lambda s: events.append(f"third {s}")) as third,
    ):
        for stage in range(len(first.plan.stages)):
            events.append(f"first {stage}")
            first.bring(stage)
            # The last of the chain has it before the first has the next.
            assert third.there[stage].wait(20)
        first.offer.gate.end(None)
        assert second.finish() is None
        assert third.finish() is None
        assert third.tensors() == reference(root)
    who = ("first", "second", "third")
    assert events == [f"{name} {s}" for s in range(len(first.plan.stages)) for name in who]


def test_a_slow_peer_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=5000)
    limits = Limits(stall_s=0.2, patience_s=0.2, hedges=0)
    with (
        serving(root, loaded=False, limits=ServerLimits(beat_s=0.02)) as peer,
        node(peer.server.address, limits=limits) as loading,
    ):
        # Much longer than anything may be silent.
        assert not loading.ended.wait(0.8)
        peer.bring(*range(len(peer.plan.stages)))
        assert loading.finish() is None
        assert "retries" not in loading.source.note


def test_a_peer_that_dies_in_the_middle(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=30_000)
    with serving(root, loaded=False) as peer, node(peer.server.address, limits=BRIEF) as loading:
        peer.bring(0, 1)
        assert loading.there[1].wait(20)
        peer.server.close()
        error = loading.finish()
        assert isinstance(error, SourceUnreachable)
        assert str(error.where).startswith(f"peer://127.0.0.1:{peer.port}/model-0000")
        assert loading.board.state(1) is StageState.READY
        assert loading.board.state(5) is StageState.FAILED


def test_after_a_death_the_next_source_goes_on(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=30_000)
    with (
        serving(root, loaded=False) as peer,
        node(
            peer.server.address, limits=BRIEF, later=[lambda: DirectoryOrigin(str(root))]
        ) as loading,
    ):
        peer.bring(0, 1)
        assert loading.there[1].wait(20)
        peer.server.close()
        assert loading.finish() is None
        assert loading.went_on == [str(root)]
        assert loading.tensors() == reference(root)


def test_a_peer_that_cannot_load_passes_that_on_down_the_chain(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=5000)
    with (
        serving(root, loaded=False) as first,
        node(first.server.address) as second,
        node(second.server.address) as third,
    ):
        first.bring(0)
        assert third.there[0].wait(20)
        first.server.fail(SourceChanged("a weight file was modified", got="another time"))
        error = third.finish()
        assert type(error) is SourceChanged
        assert error.what.endswith("a weight file was modified")
        assert error.where is not None
        assert str(second.server.address[1]) in error.where


def test_a_peer_that_is_started_again_with_the_same_model(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=30_000)
    with serving(root, loaded=False) as peer, node(peer.server.address) as loading:
        peer.bring(0)
        assert loading.there[0].wait(20)
        peer.server.close()
        with closing(Serving(root, port=peer.port)):
            assert loading.finish() is None
            assert loading.tensors() == reference(root)


@pytest.mark.parametrize("alike", [True, False])
def test_a_peer_that_is_started_again_with_another_model(tmp_path: Path, alike: bool) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=30_000)
    other = layered(tmp_path / "other", layers=4, nbytes=30_000 if alike else 30_001)
    with serving(root, loaded=False) as peer, node(peer.server.address) as loading:
        peer.bring(0)
        assert loading.there[0].wait(20)
        peer.server.close()
        with closing(Serving(other, port=peer.port)):
            error = loading.finish()
        assert type(error) is SourceChanged
        assert error.what == "the peer serves another model, or another version of it"
        assert error.expected
        assert error.got
        assert error.expected != error.got


def test_a_peer_that_is_another_one_while_its_checkpoint_is_opened(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", nbytes=1000)
    other = layered(tmp_path / "other", nbytes=1001)
    with serving(root) as peer:
        origin = origin_of(peer.server.address)
        origin.check()
        assert origin.read_small("config.json", 1000)
        peer.server.offer(offer_of(other)[2])
        for read in (
            lambda: origin.read_small("config.json", 1000),
            lambda: origin.open_shard("model-00001-of-00002.safetensors"),
        ):
            with pytest.raises(SourceChanged):
                read()
        origin.close()


def test_another_plan_is_refused(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", nbytes=1000)
    with serving(root) as peer:
        there = Peer(peer.host, peer.port)
        right = peer_origin(there, token=TOKEN, plan_hash=peer.plan.hash)
        assert Checkpoint.open(right).fingerprint == peer.checkpoint.fingerprint
        right.close()
        wrong = peer_origin(there, token=TOKEN, plan_hash="0" * 64)
        with pytest.raises(SourceChanged) as caught:
            Checkpoint.open(wrong)
        assert (caught.value.expected, caught.value.got) == ("0" * 64, peer.plan.hash)
        wrong.close()


def test_a_wrong_token(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", nbytes=1000)
    with serving(root) as peer:
        origin = peer_origin(Peer(peer.host, peer.port), token="wrong")
        with pytest.raises(SourceCredentials) as caught:
            Checkpoint.open(origin)
        assert "COLDFRAME_PEER_TOKEN" in caught.value.hint
        assert TOKEN not in str(caught.value)
        origin.close()


def test_what_is_no_peer(tmp_path: Path) -> None:
    with nginx(tmp_path) as base:
        port = int(base.rpartition(":")[2])
        origin = origin_of(("127.0.0.1", port))
        with pytest.raises(SourceNotFound):
            origin.check()
        (tmp_path / "v1").mkdir()
        for said in ["<html>", "{}", '{"version": 2}', "[" * 5000]:
            (tmp_path / "v1" / "plan").write_text(said)
            with pytest.raises(SourceProtocol) as caught:
                origin.check()
            assert caught.value.where == f"peer://127.0.0.1:{port}/plan"
        origin.close()


def test_nobody_there() -> None:
    with listen("127.0.0.1", 0) as free:
        where = free.getsockname()
    origin = origin_of(where, BRIEF)
    with pytest.raises(SourceUnreachable):
        origin.check()
    origin.close()
