"""Loads that take from one another: real ones, in one process, over loopback."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.arena import Reservation
from coldframe.loader.devices import open_device
from coldframe.loader.errors import ColdframeError, RequestError, SourceError
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.memory_service.board import StageState
from coldframe.loader.peers import joining
from coldframe.loader.peers.following import Following, FollowingLimits
from coldframe.loader.peers.node import CHOOSING, LOADED, LOADING, Node
from coldframe.loader.peers.pace import Pace
from coldframe.loader.peers.server import ServerLimits
from coldframe.loader.sources.location import Peer
from coldframe.loader.timeline import Recorder
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.peer_talk import NodeFacts, PeerTalk
from tests.loader.peers.peer import TOKEN, Serving
from tests.loader.weights import arena_tensors, layered, reference, sealed
from tests.support import no_threads_left

BEAT = ServerLimits(beat_s=0.02)
STAGES = 6


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLDFRAME_PEER_TOKEN", TOKEN)
    before = signal.signal(signal.SIGIO, lambda *_: None)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m", layers=STAGES - 2, nbytes=30_000)


class Replica:
    """A load with peers, and what has become of it."""

    def __init__(self, root: Path | str, scratch: Path, *peers: object, **options: Any) -> None:
        options.setdefault("serve_peers", "127.0.0.1:0")
        self.ended = threading.Event()
        self.error: ColdframeError | None = None
        self.there = [threading.Event() for _ in range(STAGES)]
        self.load = Load(
            LoadOptions(
                str(root), peers=tuple(map(str, peers)), peer_token=TOKEN, copy=True, **options
            ),
            open_device("cpu"),
            Recorder("memory"),
            LoadEvents(
                on_files=lambda path: None,
                on_plan=lambda: None,
                on_stage=lambda stage: self.there[stage].set(),
                on_end=self._end,
            ),
            files_dir=str(scratch / f"files-{id(self)}"),
        )

    def _end(self, error: ColdframeError | None) -> None:
        self.error = error
        self.ended.set()

    @property
    def at(self) -> str:
        assert self.load.peers_at is not None
        return self.load.peers_at

    def facts(self) -> NodeFacts:
        return facts_at(self.at)

    def finish(self) -> None:
        assert self.ended.wait(30), "it does not end"
        assert self.error is None, self.error

    def tensors(self) -> dict[str, bytes]:
        arena = Reservation(self.load.weights.plan.arena_bytes)
        arena.attach(self.load.weights.segments)
        found = arena_tensors(self.load.weights.plan, arena.view())
        arena.close()
        return found

    def close(self) -> None:
        self.load.close()
        if hasattr(self.load, "board"):
            self.load.board.close()


@contextmanager
def peer_of(root: Path, **more: Any) -> Iterator[Serving]:
    """A peer whose load is done by hand; whoever reads from it may live on behind it."""
    made = Serving(root, **more)
    try:
        yield made
    finally:
        made.close()


def facts_at(at: str) -> NodeFacts:
    host, _, port = at.rpartition(":")
    return PeerTalk(TOKEN).node(Peer(host, int(port)))


def place_of(peer: Serving) -> str:
    return f"{peer.host}:{peer.port}"


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Starts loads, and closes them behind the test, the last one first."""
    with no_threads_left(), ExitStack() as stack:

        def make(*peers: object, root: Path | str = model, **options: Any) -> Replica:
            made = Replica(root, tmp_path, *peers, **options)
            stack.callback(made.close)
            made.load.run()
            return made

        yield make


def brief(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """What takes seconds takes less: whether it happens is what is asked here."""
    given = FollowingLimits(**{"renew_s": 0.02, **limits})
    pace = partial(Pace, still_s=0.5, waiting_s=60.0)
    monkeypatch.setattr(joining, "Following", partial(Following, limits=given, pace=pace))


# -- from a warm node ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_seal", [False, True])
def test_a_new_node_takes_its_weights_from_a_warm_one(
    model: Path, start: Callable[..., Replica], with_seal: bool
) -> None:
    if with_seal:
        sealed(model)
    warm = start()
    warm.finish()
    new = start(warm.at)
    new.finish()
    assert new.load.weights.why == f"from peer://{warm.at}"
    assert new.load.weights.mode == "copied"
    assert new.tensors() == reference(model)
    assert new.facts().state == LOADED
    until(lambda: warm.facts().readers == 0)  # it has given its seat back


def test_dead_addresses_and_its_own_are_passed_over(
    model: Path, start: Callable[..., Replica]
) -> None:
    warm = start()
    warm.finish()
    own = f"127.0.0.1:{free_port()}"
    new = start(f"127.0.0.1:{free_port()}", own, warm.at, serve_peers=own)
    new.finish()
    assert new.load.weights.why is not None
    assert new.load.weights.why.startswith(f"from peer://{warm.at}; peer://127.0.0.1:")


def test_one_that_says_nothing_keeps_nobody_from_a_warm_one(
    start: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    brief(monkeypatch, ask_s=600.0)
    talk = partial(PeerTalk, limits=Limits(connect_s=600.0, stall_s=600.0))
    monkeypatch.setattr(joining, "PeerTalk", talk)
    warm = start()
    warm.finish()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        new = start(f"127.0.0.1:{silent.getsockname()[1]}", warm.at)
        new.finish()
        silent.accept()[0].close()
    why = f"from peer://{warm.at}; peers: 1 of them said nothing in time"
    assert new.load.weights.why == why


def test_without_any_peer_the_place_itself(model: Path, start: Callable[..., Replica]) -> None:
    new = start(f"127.0.0.1:{free_port()}")
    new.finish()
    assert new.load.weights.why is not None
    assert new.load.weights.why.startswith("from no peer; ")
    assert new.tensors() == reference(model)
    assert new.facts().state == LOADED


def test_a_file_says_where_they_are(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    warm = start()
    warm.finish()
    listed = tmp_path / "peers"
    listed.write_text(f"{warm.at}  # warm\n")
    new = start(peers_from=(f"file://{listed}",))
    new.finish()
    assert new.load.weights.why == f"from peer://{warm.at}"


def test_a_list_that_comes_late_is_waited_for(
    start: Callable[..., Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the time that peers get to answer."""
    brief(monkeypatch, ask_s=5.0)
    warm = start()
    warm.finish()
    listed = tmp_path / "peers"
    beside = tmp_path / "beside"
    beside.write_text(f"{warm.at}\n")
    writer = threading.Timer(0.3, beside.rename, (listed,))
    writer.start()
    new = start(peers_from=(f"awaited://60{listed}",))
    new.finish()
    writer.join()
    assert new.load.weights.why == f"from peer://{warm.at}"


def test_a_list_that_never_comes_holds_nothing_up_for_ever(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    new = start(peers_from=(f"awaited://0.05{tmp_path}/peers",))
    new.finish()
    assert str(new.load.weights.why).startswith("from no peer; ")
    assert "nobody has said in time where peers are" in str(new.load.weights.why)
    assert new.tensors() == reference(model)


def test_another_model_gives_not_a_byte(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    other = layered(tmp_path / "other", layers=STAGES - 2, nbytes=30_001)
    with peer_of(other, node=Node(str(other))) as peer:
        new = start(place_of(peer))
        new.finish()
        assert str(new.load.weights.why).startswith("from no peer; ")
        assert "has another model" in str(new.load.weights.why)
        assert new.tensors() == reference(model)


def test_a_place_that_is_out_of_reach_is_no_hindrance(
    model: Path, start: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    brief(monkeypatch, probe_s=0.2)
    gone = f"http://127.0.0.1:{free_port()}/m"
    with peer_of(model, node=Node(gone)) as peer, peer_of(model, node=Node("else")) as other:
        new = start(place_of(other), place_of(peer), root=gone)
        new.finish()
        assert str(new.load.weights.why).startswith(
            f"from peer://{place_of(peer)}; peer://{place_of(other)}"
        )
        assert new.tensors() == reference(model)


def test_what_is_no_peer_is_told_at_once(start: Callable[..., Replica]) -> None:
    with pytest.raises(RequestError):
        start("10.0.0.1")


# -- a row of them ---------------------------------------------------------------------------------


def test_those_who_start_together_stand_in_a_row(
    model: Path, start: Callable[..., Replica]
) -> None:
    with peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first:
        row = [start(place_of(first)) for _ in range(3)]
        places = [place_of(first), *(each.at for each in row)]
        assert [each.load.weights.why for each in row] == [f"from peer://{at}" for at in places[:3]]
        for stage in range(STAGES):
            first.bring(stage)
            # The last of them has it before the first has the next one.
            assert row[-1].there[stage].wait(30)
            if stage < STAGES - 1:
                assert row[-1].facts().state == LOADING
        first.finish()
        for each in row:
            each.finish()
            assert each.tensors() == reference(model)
        # However many there are, the first has sent each byte once.
        assert first.server.served_bytes < 1.5 * first.plan.weights_bytes


def test_a_piece_goes_on_before_its_stage_is_complete(
    tmp_path: Path, start: Callable[..., Replica]
) -> None:
    root = layered(tmp_path / "large", layers=1, nbytes=3 << 20, shards=1)
    with peer_of(root, loaded=False, limits=BEAT, node=Node(str(root))) as first:
        new = start(place_of(first), root=root)
        last = start(place_of(first), root=root)
        (extent,) = first.plan.stages[0].extents
        half = extent.file_offset + extent.length // 2
        shard = first.checkpoint.shards[extent.shard].name
        file = Path(root, shard).read_bytes()
        base = first.plan.placements["model.embed_tokens.weight"].arena_offset
        first.memory[base : base + half - extent.file_offset] = file[extent.file_offset : half]
        first.offer.gate.arrived(shard, extent.file_offset, half)
        until(lambda: last.load.board.progress.done > 0)
        assert last.load.board.state(0) is StageState.PENDING
        first.bring(*range(len(first.plan.stages)))
        first.finish()
        for each in (new, last):
            each.finish()
            assert each.tensors() == reference(root)


def test_more_readers_at_once_where_that_is_asked_for(
    model: Path, start: Callable[..., Replica]
) -> None:
    node = Node(str(model), readers=2)
    with peer_of(model, loaded=False, limits=BEAT, node=node) as first:
        row = [start(place_of(first)) for _ in range(3)]
        assert [each.load.weights.why for each in row[:2]] == [f"from peer://{place_of(first)}"] * 2
        assert row[2].load.weights.why in [f"from peer://{each.at}" for each in row[:2]]
        first.bring(*range(STAGES))
        first.finish()
        for each in row:
            each.finish()


def test_a_reader_that_serves_nobody_is_no_end(model: Path, start: Callable[..., Replica]) -> None:
    with peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first:
        quiet = start(place_of(first), serve_peers=None)
        new = start(place_of(first))
        assert new.load.weights.why == quiet.load.weights.why == f"from peer://{place_of(first)}"
        first.bring(*range(STAGES))
        first.finish()
        quiet.finish()
        new.finish()


def test_all_start_cold(model: Path, start: Callable[..., Replica], tmp_path: Path) -> None:
    """Whoever goes to the store, all are loaded in the end, and nobody waits for a circle."""
    ports = [free_port() for _ in range(4)]
    peers = [f"127.0.0.1:{port}" for port in ports]
    made: list[Replica] = []
    errors: list[BaseException] = []
    slow = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 0.5

    def one(own: str) -> None:
        try:
            made.append(start(*peers, serve_peers=own, throttle=slow))
        except BaseException as error:  # noqa: BLE001 - the test's to raise
            errors.append(error)

    threads = [threading.Thread(target=one, args=(own,)) for own in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for each in made:
        each.finish()
        assert each.tensors() == reference(model)
    sources = [str(each.load.weights.why).partition(";")[0] for each in made]
    assert 1 <= sources.count("from no peer") <= 4


# -- what can go wrong -----------------------------------------------------------------------------


def test_after_a_death_the_place_itself_goes_on(model: Path, start: Callable[..., Replica]) -> None:
    with peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first:
        new, last = start(place_of(first)), start(place_of(first))
        first.bring(0, 1)
        assert last.there[1].wait(30)
        first.server.close()
        for each in (new, last):
            each.finish()
            assert each.tensors() == reference(model)
        assert f"went on with {model}" in str(new.load.weights.why)
        # Who was behind it has not noticed.
        assert last.load.weights.why == f"from peer://{new.at}"
        until(lambda: not new.facts().seated)


def test_after_a_death_another_peer_goes_on_where_it_was(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    listed = tmp_path / "peers"
    with (
        peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first,
        peer_of(model, node=Node(str(model))) as second,
    ):
        listed.write_text(place_of(first))
        new = start(peers_from=(f"file://{listed}",))
        first.bring(0, 1)
        assert new.there[1].wait(30)
        listed.write_text(f"{place_of(first)}\n{place_of(second)}")
        first.server.close()
        new.finish()
        assert new.tensors() == reference(model)
        assert f"went on with peer://{place_of(second)}" in str(new.load.weights.why)
        done = sum(stage.nbytes for stage in first.plan.stages[:2])
        total = first.plan.weights_bytes
        assert second.server.served_bytes < total - done + 100_000


def test_a_dead_end_of_the_row_is_gone_around(model: Path, start: Callable[..., Replica]) -> None:
    with peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first:
        assert first.node is not None
        dead = f"127.0.0.1:{free_port()}"
        assert first.node.seats.take("d" * 32, dead) is None
        new = start(place_of(first))
        assert new.load.weights.why == f"from peer://{place_of(first)}"
        first.bring(*range(STAGES))
        first.finish()
        new.finish()


def test_a_peer_that_hangs_is_given_up(
    model: Path, start: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    brief(monkeypatch)
    with peer_of(model, loaded=False, limits=BEAT, node=Node(str(model))) as first:
        new = start(place_of(first))
        first.bring(0, 1)
        assert new.there[1].wait(30)
        first._done = first.plan.weights_bytes  # it says that it has all of it, and gives nothing
        new.finish()
        assert new.tensors() == reference(model)
        assert "the peer gave nothing for" in str(new.load.weights.why)
        until(lambda: facts_at(place_of(first)).readers == 0)


def test_a_peer_that_was_replaced_by_another_model(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    other = layered(tmp_path / "other", layers=STAGES - 2, nbytes=30_001)
    with ExitStack() as stack:
        first = stack.enter_context(
            peer_of(model, loaded=False, limits=BEAT, node=Node(str(model)))
        )
        new = start(place_of(first))
        first.bring(0)
        assert new.there[0].wait(30)
        first.server.close()
        replaced = Serving(other, port=first.port, node=Node(str(other)))
        stack.callback(replaced.close)
        new.finish()
        assert new.tensors() == reference(model)


def test_a_load_that_fails_says_so_to_whoever_would_read_from_it(
    start: Callable[..., Replica], tmp_path: Path
) -> None:
    port = free_port()
    with pytest.raises(SourceError):
        start(root=tmp_path / "nowhere", serve_peers=f"127.0.0.1:{port}")
    assert facts_at(f"127.0.0.1:{port}").state == "failed"


def test_it_can_be_ended_while_it_waits_for_others(
    model: Path, start: Callable[..., Replica], tmp_path: Path
) -> None:
    """One that never finds its own source is not waited for beyond the end of the load."""
    node = Node(str(model))
    node.id = "0" * 32
    with ExitStack() as stack:
        peer = stack.enter_context(peer_of(model, limits=BEAT))
        peer.server._node = node  # it has not opened anything yet
        assert facts_at(place_of(peer)).state == CHOOSING
        made = Replica(model, tmp_path, place_of(peer))
        thread = threading.Thread(target=lambda: _ended_early(made))
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        made.load._resolver.stop()  # type: ignore[union-attr]
        thread.join(30)
        assert not thread.is_alive()
        made.close()


def _ended_early(replica: Replica) -> None:
    try:
        replica.load.run()
    except ColdframeError:
        return
