"""Who may do what: clients without a key, and the processes themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.runtime.serving import Server, served

pytestmark = pytest.mark.heavy

KEY = "sk-0123456789abcdef0123456789abcdef"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def server(demo_model: Make) -> Iterator[Server]:
    flags = ("--platform", "kserve", "--model-name", "org/demo")
    with served(demo_model(), *flags, COLDFRAME_API_KEYS=KEY, HF_TOKEN="hf-not-yours") as server:
        server.ready()
        yield server


def with_key(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"})


def test_an_error_below_the_routes_has_the_platforms_shape(server: Server) -> None:
    flood = httpx.get(server.url + "/v2", headers={"x": "y" * 40_000})
    assert flood.status_code == 431
    assert isinstance(flood.json()["error"], str)
    nobody = server.post("/v2/models/demo/infer", {})
    assert nobody.status_code == 401
    assert isinstance(nobody.json()["error"], str)
    with server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error": "' in answer


def test_openais_routes_keep_openais_shape(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "Hi"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    with with_key(server) as client:
        assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
        assert isinstance(client.get("/nothing").json()["error"], str)


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/", "/v2/health/ready", "/v2/models/org/demo/ready"]
)
def test_probes_show_no_key(server: Server, path: str) -> None:
    assert server.get(path).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/startup", "/metrics", "/openapi.json", "/v1/models"])
def test_all_else_needs_one(server: Server, path: str) -> None:
    assert server.get(path).status_code == 401
    with with_key(server) as client:
        assert client.get(path).status_code == 200


def rights(process: psutil.Process) -> list[dict[str, str]]:
    """What the kernel says of each of a process's threads."""
    found = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
        found.append({name: value.strip() for name, _, value in lines})
    return found


def test_who_talks_to_clients_and_who_computes_is_nobody(server: Server) -> None:
    with with_key(server) as client:  # all threads that there will be are there
        assert client.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200
    for process in (server.gateway(), server.worker("prefill"), server.worker("decode")):
        for thread in rights(process):
            assert thread["Uid"].split() == ["65532"] * 4
            assert thread["Gid"].split() == ["65532"] * 4
            assert thread["Groups"] == ""
            assert thread["NoNewPrivs"] == "1"
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(thread[name], 16) == 0, (process, name)


def test_no_child_that_needs_none_has_a_secret(server: Server) -> None:
    assert KEY not in server.log
    for child in psutil.Process(server.process.pid).children(recursive=True):
        assert KEY not in str([child.environ(), child.cmdline()])
    for process in (server.gateway(), server.worker("prefill"), server.worker("decode")):
        assert "HF_TOKEN" not in process.environ()


def test_a_probe_is_not_told_where_the_model_is(demo_model: Make, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in demo_model().iterdir():
        if not file.name.endswith(".safetensors"):
            (broken / file.name).write_bytes(file.read_bytes())
    with served(broken, COLDFRAME_API_KEYS=KEY) as server:
        server.ends_with = (1,)
        answer = server.get("/readyz")
        assert answer.status_code == 503
        assert str(broken) not in answer.text
        assert answer.json()["error"]["what"]
        server.process.wait(20)
        assert str(broken) in server.log
