"""The manifests' probes, asked of the real server: while it is cold, and once it is ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.images.k8s import OVERLAYS, built, environment, ours, pods
from tests.runtime.serving import served

Make = Callable[..., Path]

ALIVE, READY = "/healthz", "/readyz"
_ELSEWHERE = ("--port", "--host", "--snapshot-store", "--peers", "--serve-peers")


def probes() -> set[tuple[str, str]]:
    """Which probe asks which path, of all servers."""
    found = set()
    for overlay in OVERLAYS:
        for pod in pods(built(overlay)):
            for container in ours(pod):
                for name, probe in container.items():
                    if name.endswith("Probe"):
                        found.add((name, probe["httpGet"]["path"]))
    return found


def flags() -> list[str]:
    """What the Deployment tells its server, but for where it listens."""
    (pod,) = pods(built("deployment"))
    (container,) = ours(pod)
    _, *rest = container["args"]
    return [argument for argument in rest if not argument.startswith(_ELSEWHERE)]


def variables(place: Path) -> dict[str, str]:
    (pod,) = pods(built("deployment"))
    (container,) = ours(pod)
    given = environment(container)
    del given["COLDFRAME_MODEL"]
    for name in ("HOME", "XDG_CACHE_HOME"):
        (place / name).mkdir(exist_ok=True)
        given[name] = str(place / name)
    return {**given, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}


def test_each_probe_has_a_path_that_fits_it() -> None:
    asked = probes()
    # A slow load must not look dead, nor may any probe end it.
    assert {path for name, path in asked if name != "readinessProbe"} == {ALIVE}
    assert {path for name, path in asked if name == "readinessProbe"} == {ALIVE, READY}


def test_a_cold_server_is_alive_and_not_ready(demo_model: Make, tmp_path: Path) -> None:
    slow = ("--throttle", "20kB/s", "--drain", 1)
    with served(demo_model(), *flags(), *slow, **variables(tmp_path)) as server:
        assert server.get(ALIVE).status_code == 200
        answer = server.get(READY)
        assert answer.status_code == 503
        assert answer.json()["state"] == "starting"
        assert '"platform": "kubernetes"' in server.log


def test_a_ready_server_is_both(demo_model: Make, tmp_path: Path) -> None:
    with served(demo_model(), *flags(), **variables(tmp_path)) as server:
        server.ready()
        assert {server.get(path).status_code for _, path in probes()} == {200}
        assert server.complete(max_tokens=1)
