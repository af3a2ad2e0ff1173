"""What children get of the front's environment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from coldframe.loader.process import Child
from coldframe.runtime.start.early import likely_gateway, likely_peers
from coldframe.runtime.start.environment import without_secrets
from tests.runtime.serving import Server, served
from tests.runtime.snapshots import eventually

SECRETS = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "COLDFRAME_API_KEYS",
    "COLDFRAME_PEER_TOKEN",
    "HF_TOKEN",
    "RUNPOD_API_KEY",
    "database_password",
]
PLAIN = ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "COLDFRAME_THROTTLE"]


@pytest.mark.parametrize("name", SECRETS)
def test_what_opens_doors_stays_behind(name: str) -> None:
    assert without_secrets({name: "x", "PATH": "/bin"}) == {"PATH": "/bin"}


def test_the_rest_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_secrets(dict.fromkeys(PLAIN, "x")) == dict.fromkeys(PLAIN, "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("SOMETHING", "y")
    found = without_secrets()
    assert "HF_TOKEN" not in found
    assert found["SOMETHING"] == "y"


def environment_of(child: Child) -> set[str]:
    """The names in a process's environment."""
    place = Path(f"/proc/{child.pid}/environ")
    try:
        eventually(place.read_bytes)  # there is none before the program is
        told = place.read_bytes()
    finally:
        child.kill()
    return {entry.partition(b"=")[0].decode() for entry in told.split(b"\0")}


STORES = {"ETCD_AUTH_PASSWORD", "NATS_AUTH_TOKEN"}
OTHERS = {"AWS_SECRET_ACCESS_KEY", "COLDFRAME_KV_SECRET", "COLDFRAME_PEER_TOKEN", "HF_TOKEN"}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a front may be told, and a place that is no secret."""
    for name in (*STORES, *OTHERS, "ETCD_ENDPOINTS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("COLDFRAME_DYNAMO", raising=False)


@pytest.mark.parametrize(
    ("command", "arguments", "twin", "opens"),
    [
        ("serve", ["--dynamo"], "1", False),
        ("worker", ["m", "--listen", "127.0.0.1:0"], "0", False),
        ("worker", ["m", "--dynamo"], "0", True),
        ("worker", ["m"], "1", True),
    ],
)
def test_a_gateway_may_open_dynamos_discovery_where_it_is_to_register_there(
    command: str,
    arguments: list[str],
    twin: str,
    opens: bool,
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLDFRAME_DYNAMO", twin)
    gateway = likely_gateway(command, arguments)
    gateway.socket.close()
    found = environment_of(gateway.child)
    assert "ETCD_ENDPOINTS" in found
    assert found & STORES == (STORES if opens else set())
    assert not found & OTHERS


def test_who_finds_peers_opens_the_discovery_and_nothing_else(
    secrets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"DYN_SYSTEM_ENABLED", "DYN_SYSTEM_PORT", "DYN_TCP_RPC_PORT"}  # the worker's
    for name in (*ports, "DYN_NAMESPACE"):
        monkeypatch.setenv(name, "9090")
    assert likely_peers(["--dynamo", "--peers-from", "dns://peers:9400"]) is None
    assert likely_peers(["--dynamo"]) is None
    finder = likely_peers(["--dynamo", "--peers-from=dynamo:5"])
    assert finder is not None
    finder.socket.close()
    found = environment_of(finder.child)
    assert {"DYN_NAMESPACE", "ETCD_ENDPOINTS", *STORES} <= found
    assert not found & (ports | OTHERS)


def test_gateways_of_a_decode_worker_for_other_fronts_open_no_discovery(
    demo_model: Callable[..., Path],
) -> None:
    told = dict.fromkeys([*STORES, *OTHERS, "ETCD_ENDPOINTS"], "x" * 32)
    with served(demo_model(), "--listen", "127.0.0.1:0", verb="worker", **told) as worker:
        before = 0
        for _ in range(2):
            eventually(lambda dead=before: is_there(worker, dead))
            gateway = worker.gateway()
            found = set(gateway.environ())
            assert "ETCD_ENDPOINTS" in found
            assert not found & (STORES | OTHERS)
            before = gateway.pid
            gateway.kill()  # there is another one then
        eventually(lambda: is_there(worker, before))


def is_there(worker: Server, dead: int) -> bool:
    """Whether there is a gateway, and another one than one that has died."""
    with suppress(ValueError, psutil.Error):  # none is, or it is about to be
        return worker.gateway().pid != dead and bool(worker.gateway().environ())
    return False
