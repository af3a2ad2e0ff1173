"""The image run as platforms run it: limits, rights, probes, requests and signals."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.images.conftest import Image
from tests.images.container import Container, Platform
from tests.images.platforms import (
    ASK,
    COUNT,
    LIMIT,
    PLATFORMS,
    ready,
    startup,
    text_of,
    without_rights,
)
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

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
        assert text_of(answer) == expected
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
                    text_of(container.post(contract.port, "/v1/completions", ASK).json())
                    == expected
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
