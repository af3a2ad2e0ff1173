"""Peers found by Dynamo's real discovery: a folder, the request plane TCP, all on loopback."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from coldframe.loader.errors import RequestError, SourceUnreachable
from coldframe.loader.peers.directory import PeerDirectory, open_directory
from coldframe.loader.peers.node import LOADED, LOADING
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.peer_talk import NodeFacts, PeerTalk
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.integrations.dynamo.peer_finder import PeerFinder, wait_of
from coldframe.runtime.integrations.dynamo.settings import DynamoSettings
from tests.runtime.integrations.dynamo.cluster import Cluster, environment, free_port, installed
from tests.runtime.listening import ports
from tests.runtime.serving import Server, greedy
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

FILE = DynamoSettings(discovery="file", suffix="old")
PATIENCE = "dynamo:60"
Make = Callable[..., Path]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_leaks: Path) -> Path:
    """What every process is told; nothing is left afterwards."""
    installed()
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    return tmp_path


def told(finder: PeerFinder) -> PeerDirectory:
    return open_directory([], [finder.place(60)])


def test_nodes_of_a_model_are_listed_while_they_are_there(here: Path) -> None:
    newer = DynamoSettings(discovery="file", suffix="new")
    one, two = Peer("127.0.0.1", 9401), Peer("127.0.0.1", 9402)
    with (
        closing(PeerFinder(FILE, "s3://b/m", "127.0.0.1:9401")) as first,
        closing(PeerFinder(FILE, "s3://b/n", "127.0.0.1:9403")) as other,
        closing(PeerFinder(FILE, "s3://b/m", None)) as looks,
    ):
        # Who is first finds nobody, and knows that.
        assert list(told(first).peers()) == []
        assert list(told(other).peers()) == []
        # The first list that there is has whoever was there before.
        with closing(PeerFinder(newer, "s3://b/m", "127.0.0.1:9402")) as second:
            assert list(told(second).peers()) == [one]
            eventually(lambda: list(told(first).peers()) == [two], seconds=60)
            eventually(lambda: list(told(looks).peers()) == [one, two], seconds=60)
        eventually(lambda: list(told(first).peers()) == [], seconds=60)
        eventually(lambda: list(told(looks).peers()) == [one], seconds=60)


def test_one_that_dies_is_started_anew(here: Path) -> None:
    log = Log("text", process="test")
    with closing(PeerFinder(FILE, "s3://b/m", None)) as first:
        assert list(told(first).peers()) == []
        process = first._process.child
        os.kill(process.pid, signal.SIGKILL)
        eventually(lambda: first.step(log) or first._process.child is not process, seconds=60)
        with closing(PeerFinder(FILE, "s3://b/m", "127.0.0.1:9402")):
            eventually(lambda: len(told(first).peers()) == 1, seconds=60)


def test_all_addresses_are_told_as_that_of_the_pod(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_IP", "10.1.2.3")
    with (
        closing(PeerFinder(FILE, "s3://b/m", "0.0.0.0:9400")) as _,
        closing(PeerFinder(FILE, "s3://b/m", None)) as looks,
    ):
        eventually(lambda: list(told(looks).peers()) == [Peer("10.1.2.3", 9400)], seconds=60)


@pytest.mark.parametrize(
    ("discovery", "serves", "where"),
    [
        ("kubernetes", "10.0.0.7:9400", "--peers-from"),
        ("file", "10.0.0.7:0", "--serve-peers"),
        ("file", "10.0.0.7", "--serve-peers"),
    ],
)
def test_what_cannot_be_told_is_refused(
    here: Path, discovery: str, serves: str, where: str
) -> None:
    with pytest.raises(RequestError) as raised:
        PeerFinder(DynamoSettings(discovery=discovery), "s3://b/m", serves)
    assert raised.value.where == where


def test_how_long_a_load_waits() -> None:
    assert wait_of("dynamo") == 2
    assert wait_of("dynamo:0.5") == 0.5
    assert wait_of("dns://dynamo:9400") is None
    for wrong in ("dynamo:", "dynamo:soon", "dynamo:-1", "dynamo:nan", "dynamo://etcd"):
        with pytest.raises(RequestError):
            wait_of(wrong)


def test_without_a_discovery_a_load_waits_no_longer_than_that(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = here / "file"
    blocked.touch()
    monkeypatch.setenv("DYN_FILE_KV", str(blocked / "kv"))  # no folder can be there
    with closing(PeerFinder(FILE, "s3://b/m", None)) as finder:
        eventually(lambda: finder._process.child.poll() is not None, seconds=60)
        with pytest.raises(SourceUnreachable, match="nobody has said in time"):
            open_directory([], [finder.place(0.1)]).peers()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Workers without a front end: they find each other by the discovery alone."""
    installed()
    made = Cluster(tmp_path, free_port(), tmp_path / "none")
    yield made
    made.http.close()


def test_workers_feed_one_another(cluster: Cluster, demo_model: Make) -> None:
    """The second one from the first; the third one from the second, which has little itself yet.

    The first is the best of all, having everything: it has a reader, and sends the next one on.
    """
    model = demo_model("qwen3", "float32")
    at = [f"127.0.0.1:{free_port()}" for _ in range(3)]

    def worker(number: int, *flags: str) -> Server:
        peers = ("--serve-peers", at[number], "--peers-from", PATIENCE)
        return stack.enter_context(cluster.worker(model, *peers, *flags))

    with ExitStack() as stack:
        first = worker(0)
        first.ready()
        assert source(first) == "from no peer"
        second = worker(1, "--throttle", "300kB/s")  # the third one has 15 s to find it
        eventually(lambda: state(at[1]) == (LOADING, 0) and state(at[0]) == (LOADED, 1), seconds=60)
        third = worker(2)
        eventually(lambda: state(at[1]) == (LOADING, 1), seconds=60)
        assert state(at[0]) == (LOADED, 1)
        for started in (second, third):
            started.ready()
        assert source(second) == f"from peer://{at[0]}"
        assert source(third) == f"from peer://{at[1]}"
        prompt = (5, 6, 7)
        texts = [each.complete(prompt=list(prompt), max_tokens=4) for each in (second, third)]
        assert texts == [greedy(model, prompt, 4)] * 2


def test_what_listens_is_what_the_page_on_security_says(cluster: Cluster, demo_model: Make) -> None:
    at = f"127.0.0.1:{free_port()}"
    flags = ("--serve-peers", at, "--peers-from", "dynamo:0")
    with cluster.worker(demo_model("qwen3", "float32"), *flags) as worker:
        worker.ready()
        # Who asks gets answers at a port of its own; who publishes is heard at all addresses.
        told = Counter({"front": 1, "memory": 1, "gateway": 1, "peers": 2})
        eventually(lambda: listeners(worker) == (told, Counter({"gateway": 2})), seconds=60)


def listeners(worker: Server) -> tuple[Counter[str], Counter[str]]:
    """How many each process has at the address that it was told, and at all of them."""
    found = [(who, ip) for who, (ip, _) in ports(worker)]
    here, everywhere = (
        Counter(who for who, ip in found if ip == address) for address in ("127.0.0.1", "0.0.0.0")
    )
    assert len(found) == here.total() + everywhere.total(), found
    return here, everywhere


def source(worker: Server) -> str:
    """Where its weights came from."""
    return str(worker.get("/startup").json()["load_mode_reason"])


def state(at: str) -> tuple[str, int] | None:
    """What a node says of its load, and how many read from it; None where it says nothing yet."""
    host, _, port = at.rpartition(":")
    try:
        facts: NodeFacts = PeerTalk().node(Peer(host, int(port)))
    except Exception:  # noqa: BLE001 - it does not listen yet
        return None
    return facts.state, facts.readers
