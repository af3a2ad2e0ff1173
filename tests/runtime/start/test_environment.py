"""What children get of the front's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldframe.loader.process import Child
from coldframe.runtime.start.early import GatewayProcess, likely_peers
from coldframe.runtime.start.environment import without_secrets
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


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_gateway_may_open_dynamos_discovery_where_it_is_to(
    dynamo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {"ETCD_AUTH_PASSWORD", "NATS_AUTH_TOKEN"}
    for name in (*stores, "HF_TOKEN", "ETCD_ENDPOINTS"):
        monkeypatch.setenv(name, "x")
    gateway = GatewayProcess(dynamo=dynamo)
    gateway.socket.close()
    found = environment_of(gateway.child)
    assert "ETCD_ENDPOINTS" in found
    assert "HF_TOKEN" not in found
    assert found & stores == (stores if dynamo else set())


def test_who_finds_peers_leaves_the_workers_ports_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "9090")
    monkeypatch.setenv("ETCD_AUTH_PASSWORD", "x")
    assert likely_peers(["--dynamo", "--peers-from", "dns://peers:9400"]) is None
    assert likely_peers(["--dynamo"]) is None
    finder = likely_peers(["--dynamo", "--peers-from=dynamo:5"])
    assert finder is not None
    finder.socket.close()
    found = environment_of(finder.child)
    assert "DYN_SYSTEM_PORT" not in found
    assert "ETCD_AUTH_PASSWORD" in found
