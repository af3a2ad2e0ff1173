"""How a worker is known to Dynamo: by flags, by Dynamo's own variables, and by default."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.integrations.dynamo.settings import (
    DynamoSettings,
    Role,
    check_installed,
)
from tests.runtime.serving import COLDFRAME
from tests.support import without_settings

OPERATORS = {
    "DYN_NAMESPACE": "team-llm",
    "DYN_COMPONENT": "workers",
    "DYN_DISCOVERY_BACKEND": "kubernetes",
    "DYN_REQUEST_PLANE": "nats",
    "DYN_EVENT_PLANE": "nats",
}


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("aggregated", "dynamo.backend.generate"),
        ("prefill", "dynamo.prefill.generate"),
        ("decode", "dynamo.backend.generate"),
    ],
)
def test_by_default_it_is_where_dynamos_own_workers_are(role: Role, path: str) -> None:
    found = DynamoSettings.of(role, environ={})
    assert (found.path, found.discovery, found.request_plane) == (path, "etcd", "tcp")
    assert found.event_plane is None
    assert DynamoSettings.from_wire(found.to_wire()) == found


def test_what_the_operator_sets_is_gone_by_and_flags_win() -> None:
    found = DynamoSettings.of("prefill", environ=OPERATORS)
    assert found.path == "team-llm.workers.generate"
    assert (found.discovery, found.request_plane, found.event_plane) == (
        "kubernetes",
        "nats",
        "nats",
    )
    found = DynamoSettings.of(
        "prefill", namespace="n", discovery="file", request_plane="tcp", environ=OPERATORS
    )
    assert found.path == "n.workers.generate"
    assert (found.discovery, found.request_plane) == ("file", "tcp")


def test_a_generation_of_workers_has_a_namespace_of_its_own() -> None:
    suffixed = {**OPERATORS, "DYN_NAMESPACE_WORKER_SUFFIX": "3f2a91bc"}
    found = DynamoSettings.of("prefill", environ=suffixed)
    assert found.path == "team-llm-3f2a91bc.workers.generate"
    assert found.namespace == "team-llm"  # of the peers: old and new ones feed one another
    assert DynamoSettings.from_wire(found.to_wire()) == found
    # The flag names the namespace, and not the generation.
    found = DynamoSettings.of("prefill", namespace="n", environ=suffixed)
    assert found.path == "n-3f2a91bc.workers.generate"
    none = {**OPERATORS, "DYN_NAMESPACE_WORKER_SUFFIX": ""}
    assert DynamoSettings.of("prefill", environ=none).path == "team-llm.workers.generate"
    with pytest.raises(RequestError) as raised:
        DynamoSettings.of("prefill", environ={"DYN_NAMESPACE_WORKER_SUFFIX": "a.b"})
    assert raised.value.where == "DYN_NAMESPACE_WORKER_SUFFIX"


@pytest.mark.parametrize(
    ("where", "given"),
    [
        ("--namespace", {"namespace": "a.b"}),
        ("--component", {"component": "a/b"}),
        ("--endpoint", {"endpoint": " "}),
        ("--discovery-backend", {"discovery": "consul"}),
        ("--request-plane", {"request_plane": "udp"}),
        ("--request-plane", {"request_plane": "http"}),
        ("--event-plane", {"event_plane": "kafka"}),
    ],
)
def test_what_cannot_be_is_refused(where: str, given: dict[str, str]) -> None:
    with pytest.raises(RequestError) as raised:
        DynamoSettings.of("aggregated", environ={}, **given)  # type: ignore[arg-type]
    assert raised.value.where == where


def test_without_dynamo_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match=r"coldframe\[dynamo\]"):
        check_installed()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a worker is somebody's"),
        (["--dynamo", "other"], "a worker has one model"),
        (["--dynamo", "--discovery-backend", "consul"], "kubernetes, etcd, file, mem"),
        (["--dynamo", "--role", "both"], "invalid choice"),
        (["--role", "decode", "--listen", "127.0.0.1:0", "--peers-from", "dynamo"], "--dynamo"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [COLDFRAME, "worker", str(tmp_path), "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**without_settings(), "COLDFRAME_RUN_DIR": str(tmp_path), "COLDFRAME_SNAPSHOT": "off"},
    )
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
