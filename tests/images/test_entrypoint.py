"""The image run as platforms run it: limits, rights, probes, requests and signals."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from openai import OpenAI

from tests.images.building import Builder
from tests.images.conftest import Image
from tests.images.container import FOR_CRIU, Container, Platform
from tests.runtime.serving import greedy, ids_of
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

PROMPT = "Once upon a time a replica slept"
COUNT = 6
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
LIMIT = 3 << 30


class Contract(NamedTuple):
    """What a platform sets, asks and grants (docs/platforms.md).

    Args:
        place: Where it puts the model.
        env: Variables that it sets.
        args: What it starts the image with.
        port: Where it asks.
        health: Its route, which says 503 while weights load and 200 then.
        route: To which it sends requests.
        body: Makes one of OpenAI's.
        text: The answer's.
        grace_s: Between SIGTERM and SIGKILL.
    """

    place: str
    env: Mapping[str, str]
    args: list[str] | None
    port: int
    health: str
    route: str
    body: Callable[[dict[str, Any]], Any]
    text: Callable[[Any], str]
    grace_s: float


def _text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


PLATFORMS = {
    "docker": Contract(
        "/models/demo",
        {"COLDFRAME_MODEL": "/models/demo"},
        None,
        8000,
        "/readyz",
        "/v1/completions",
        dict,
        _text,
        10,
    ),
    "cloud-run": Contract(
        "/models/demo",
        {"COLDFRAME_MODEL": "/models/demo", "K_SERVICE": "demo", "PORT": "8080"},
        None,
        8080,
        "/readyz",
        "/v1/completions",
        dict,
        _text,
        10,
    ),
    "sagemaker": Contract(
        "/opt/ml/model",
        {"SAGEMAKER_BIND_TO_PORT": "8080"},
        ["serve"],
        8080,
        "/ping",
        "/invocations",
        dict,
        _text,
        30,
    ),
    "vertex": Contract(
        "/models/demo",
        {
            "AIP_HTTP_PORT": "8085",
            "AIP_HEALTH_ROUTE": "/alive",
            "AIP_PREDICT_ROUTE": "/answer",
            "COLDFRAME_MODEL": "/models/demo",
        },
        ["serve"],
        8085,
        "/alive",
        "/answer",
        lambda fields: {"instances": [fields]},
        lambda answer: str(answer["predictions"][0]),
        30,
    ),
}


def without_rights(contract: Contract, model: Path, **more: Any) -> Platform:
    """A container of the platform's that has no right to anything."""
    env = {**contract.env, **more.pop("env", {})}
    mounts = {contract.place: model}
    return Platform(env=env, args=contract.args, mounts=mounts, memory=LIMIT, **more)


def ready(container: Container, contract: Contract) -> None:
    eventually(lambda: container.get(contract.port, contract.health).status_code == 200, seconds=90)


def startup(container: Container, port: int) -> Any:
    return container.get(port, "/startup").json()


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    return greedy(model, ids_of(model, PROMPT), COUNT)


# -- contracts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLATFORMS)
def test_it_keeps_a_platforms_contract(image: Image, model: Path, expected: str, name: str) -> None:
    contract = PLATFORMS[name]
    # So slow that the first probes meet a replica that loads.
    platform = without_rights(contract, model, env={"COLDFRAME_THROTTLE": "500KB/s"})
    with image.run(platform) as container:
        container.listens(contract.port)
        first = container.get(contract.port, contract.health).status_code
        assert first == 503, container.log
        answer = container.post(contract.port, contract.route, contract.body(ASK))
        assert answer.status_code == 200, answer.text
        assert contract.text(answer.json()) == expected
        ready(container, contract)
        assert startup(container, contract.port)["tier"] == "fresh"
        container.signal("TERM")
        assert container.end(contract.grace_s) == 0, container.log
        assert "Traceback" not in container.log


def test_a_replica_without_rights_stays_in_its_bounds(
    image: Image, model: Path, expected: str
) -> None:
    contract = PLATFORMS["docker"]
    with image.run(without_rights(contract, model)) as container:
        container.listens(contract.port)
        client = container.inside(
            lambda: _chat(f"http://127.0.0.1:{contract.port}/v1", "Once upon a time")
        )
        assert client.usage is not None
        assert client.usage.completion_tokens == COUNT
        answer = container.post(contract.port, "/v1/completions", ASK).json()
        assert _text(answer) == expected
        pids = container.pids()
        assert len(pids) >= 6  # PID 1, front, gateway, memory service and two workers
        for pid in pids:
            status = container.status(pid)
            assert status["Uid"].split() == ["65532"] * 4
            assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
        # Its root is read-only, and /dev/shm as small as containers have it.
        with pytest.raises(OSError, match="Read-only"):
            container_write(container.pid, "/opt/coldframe/x")
        shm = os.statvfs(f"/proc/{container.pid}/root/dev/shm")
        assert shm.f_frsize * shm.f_blocks == 64 << 20
        told = startup(container, contract.port)
    assert told["tier"] == "fresh"
    assert "no image in /var/lib/coldframe/snapshots" in told["no_clone"]


def container_write(pid: int, path: str) -> None:
    """Tries to make a file in a container's root, through its own mounts."""
    Path(f"/proc/{pid}/root{path}").write_text("")


def _chat(url: str, text: str) -> Any:
    with OpenAI(base_url=url, api_key="none", timeout=60) as client:
        return client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": text}],
            max_tokens=COUNT,
            extra_body={"ignore_eos": True},
        )


def test_it_sees_its_limits(image: Image, model: Path) -> None:
    platform = without_rights(PLATFORMS["docker"], model, cpus=1.0)
    with image.run(_with(platform, args=["doctor", "--json"])) as container:
        status = container.end(120)
        said = json.loads(container.log[container.log.index("{") :])
    found = {check["name"]: check["facts"] for check in said["checks"]}
    assert found["cpu"]["threads"] == 1
    assert found["memory"]["limit"] == LIMIT
    assert status == 0 if said["ok"] else 1


def test_any_other_command_runs_too(image: Image, model: Path) -> None:
    platform = without_rights(PLATFORMS["docker"], model)
    with image.run(_with(platform, args=["--version"])) as container:
        assert container.end() == 0, container.log
        assert container.log.startswith("coldframe ")
    ask = ["run", "/models/demo", "--prompt-ids", "5,6,7", "-n", "3", "--json"]
    with image.run(_with(platform, args=ask)) as container:
        assert container.end(120) == 0, container.log
        assert '"token_ids"' in container.log


def test_without_a_model_it_ends_and_says_so(image: Image, model: Path) -> None:
    with image.run(Platform(env={"COLDFRAME_MODEL": "/models/none"})) as container:
        assert container.end() == 1
        assert "/models/none" in container.log


def _with(platform: Platform, **changes: Any) -> Platform:
    return replace(platform, **changes)


# -- signals --------------------------------------------------------------------------------------


def test_sigterm_lets_an_open_answer_finish(image: Image, model: Path) -> None:
    contract = PLATFORMS["docker"]
    count = 400
    with image.run(without_rights(contract, model)) as container:
        container.listens(contract.port)
        begun, tokens = threading.Event(), list[int]()

        def stream() -> None:
            body = {**ASK, "max_tokens": count, "stream": True, "return_token_ids": True}
            url = f"http://127.0.0.1:{contract.port}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line.removeprefix("data: "))["choices"]:
                            tokens.extend(choice.get("token_ids") or ())
                            begun.set()

        client = threading.Thread(target=lambda: container.inside(stream))
        client.start()
        assert begun.wait(90), container.log
        assert len(tokens) < count
        container.signal("TERM")
        assert container.end(contract.grace_s) == 0, container.log
        client.join(30)
        assert len(tokens) == count


def test_sigterm_before_the_weights_are_in(image: Image, model: Path) -> None:
    contract = PLATFORMS["docker"]
    platform = without_rights(contract, model, env={"COLDFRAME_THROTTLE": "100KB/s"})
    with image.run(platform) as container:
        container.listens(contract.port)
        assert container.get(contract.port, contract.health).status_code == 503
        container.signal("TERM")
        assert container.end(contract.grace_s) == 0, container.log


def test_who_dies_is_replaced_and_nobody_stays_a_zombie(
    image: Image, model: Path, expected: str
) -> None:
    contract = PLATFORMS["docker"]
    with image.run(without_rights(contract, model)) as container:
        container.listens(contract.port)
        ready(container, contract)
        killed = _running(container, "coldframe.runtime.gateway.process")
        os.kill(killed, signal.SIGKILL)  # whose own child, for templates, is PID 1's then
        eventually(lambda: killed not in container.pids(), seconds=30)

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return (
                    _text(container.post(contract.port, "/v1/completions", ASK).json()) == expected
                )
            return False

        eventually(answers, seconds=60)
        eventually(lambda: not _zombies(container), seconds=30)


def _running(container: Container, what: str) -> int:
    (found,) = (
        pid
        for pid in container.pids()
        if what in Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    )
    return found


def _zombies(container: Container) -> list[int]:
    found = []
    for pid in container.pids():
        with suppress(FileNotFoundError, ProcessLookupError):
            if container.status(pid)["State"].startswith("Z"):
                found.append(pid)
    return found


# -- snapshots in the image -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def baked(
    builder: Builder,
    image: Image,
    mounted: Callable[[str], Image],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Image:
    """The image with a snapshot in it, made in a container of that very image."""
    store = tmp_path_factory.mktemp("store")
    platform = Platform(
        args=["snapshot", "create", "/models/demo"],
        mounts={"/models/demo": model},
        writable={"/var/lib/coldframe/snapshots": store},
        user=(0, 0),
        capabilities=FOR_CRIU,
        confined=False,
    )
    with image.run(platform) as container:
        assert container.end(240) == 0, container.log
    assert any(store.iterdir())
    name = "localhost/coldframe:cpu-baked"
    return mounted(builder.baked(image.name, store, name))


@contextmanager
def served(image: Image, model: Path, **rights: Any) -> Iterator[Container]:
    contract = PLATFORMS["docker"]
    with image.run(without_rights(contract, model, **rights)) as container:
        container.listens(contract.port)
        yield container


def test_clones_of_a_snapshot_in_the_image_answer(baked: Image, model: Path, expected: str) -> None:
    rights = {"user": (0, 0), "capabilities": FOR_CRIU, "confined": False}
    with served(baked, model, env={"COLDFRAME_SNAPSHOT": "require"}, **rights) as container:
        answer = container.post(8000, "/v1/completions", ASK)
        assert answer.status_code == 200, answer.text
        assert _text(answer.json()) == expected
        told = startup(container, 8000)
        assert told["tier"] == "image"
        # Who answers has no rights, whatever the container has.
        owners = {container.status(pid)["Uid"].split()[0] for pid in container.pids()}
        assert "65532" in owners
        container.signal("TERM")
        assert container.end(PLATFORMS["docker"].grace_s) == 0, container.log


def test_without_the_rights_for_it_workers_start_fresh_and_say_why(
    baked: Image, model: Path, expected: str
) -> None:
    with served(baked, model) as container:
        answer = container.post(8000, "/v1/completions", ASK)
        assert answer.status_code == 200, answer.text
        assert _text(answer.json()) == expected
        told = startup(container, 8000)
        assert told["tier"] == "fresh"
        assert "namespace" in told["no_clone"] or "mounts of its own" in told["no_clone"]
        container.signal("TERM")
        assert container.end(PLATFORMS["docker"].grace_s) == 0, container.log
