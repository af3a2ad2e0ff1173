"""The port, bound before anything else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.listen import bind, bind_early, take_secrets


@pytest.fixture(autouse=True)
def _no_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "K_SERVICE", "COLDFRAME_PORT", "COLDFRAME_HOST", "COLDFRAME_PLATFORM"):
        monkeypatch.delenv(name, raising=False)


def test_a_client_is_held_from_the_first_moment_on() -> None:
    _, (listener,) = bind_early(["MODEL", "--host", "127.0.0.1", "--port=0"])
    with listener, socket.create_connection(listener.getsockname(), timeout=5) as client:
        client.sendall(b"x")
        served, _ = listener.accept()
        with served:
            assert served.recv(1) == b"x"


def test_the_platform_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("K_SERVICE", "s")
    monkeypatch.setenv("PORT", str(port))
    profile, (listener,) = bind_early(["MODEL"])
    with listener:
        assert profile.name == "cloud-run"
        assert listener.getsockname() == ("0.0.0.0", port)


def test_a_health_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", 0) as other:
        ports = [one.getsockname()[1], other.getsockname()[1]]
    monkeypatch.setenv("PORT", str(ports[0]))
    monkeypatch.setenv("PORT_HEALTH", str(ports[1]))
    _, listeners = bind_early(["--platform", "runpod", "--host", "127.0.0.1"])
    assert [listener.getsockname()[1] for listener in listeners] == ports
    for listener in listeners:
        listener.close()


def test_a_kubernetes_service_of_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("PORT", "0")
    _, (listener,) = bind_early(["--host", "127.0.0.1"])
    listener.close()


def test_ipv6() -> None:
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize("port", ["-1", "65536", "eighty", "8 0"])
def test_no_port(port: str) -> None:
    with pytest.raises(PlatformError, match="no such port"):
        bind_early([f"--port={port}", "--host", "127.0.0.1"])


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(PlatformError, match="cannot listen"):
        bind("127.0.0.1", first.getsockname()[1])


def test_no_such_address() -> None:
    with pytest.raises(PlatformError, match="cannot listen"):
        bind("192.0.2.1", 0)


def test_keys_are_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_API_KEYS", "k" * 32)
    monkeypatch.delenv("COLDFRAME_API_KEYS_FILE", raising=False)
    assert take_secrets() == {"COLDFRAME_API_KEYS": "k" * 32}
    assert "COLDFRAME_API_KEYS" not in os.environ


def test_it_imports_next_to_nothing() -> None:
    code = (
        "import sys; import coldframe.runtime.gateway.listen; "
        "print(*sorted(m for m in ('asyncio', 'dataclasses', 'json', 'argparse', 'fastapi') "
        "if m in sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    alone = subprocess.run(
        [sys.executable, "-c", code.replace("import coldframe.runtime.gateway.listen", "pass")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(told.stdout.split()) <= set(alone.stdout.split())
