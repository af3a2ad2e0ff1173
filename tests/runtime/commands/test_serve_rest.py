"""`coldframe serve` when nobody asks: to zero and back, parked, put to sleep, ended."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.serving import Server, greedy, served, together
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
PROMPT = [5, *prompt_of(23)]
MB = 1e6


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def state(server: Server) -> str:
    return str(server.get("/startup").json()["state"])


def is_in(server: Server, wanted: str) -> Callable[[], bool]:
    return lambda: state(server) == wanted


def complete(server: Server) -> str:
    return server.complete(prompt=PROMPT, max_tokens=8, ignore_eos=True)


def is_light(server: Server) -> bool:
    """Whether front, gateway and templates are all that is left, and without torch."""
    front = psutil.Process(server.process.pid)
    left = [front, *front.children(recursive=True)]
    try:
        whole = sum(process.memory_full_info().pss for process in left)
        maps = [found.path for process in left for found in process.memory_maps()]
    except psutil.NoSuchProcess:  # which ends just now
        return False
    return len(left) <= 4 and whole < 80 * MB and not any("torch" in path for path in maps)


def test_at_zero_it_is_light_and_listens_on(model: Path) -> None:
    with served(model, "--idle", 0.2, "--model-name", "demo") as server:
        want = greedy(model, tuple(PROMPT), 8)
        assert complete(server) == want
        starts = 0.0
        # Probes and metrics, which come all the time, keep nobody warm.
        while state(server) != "zero":
            assert server.get("/healthz").status_code == 200
            assert server.get("/readyz").status_code == 200
            starts = server.metrics()["coldframe_coldstarts_total{fresh}"]
            assert server.get("/v1/models").json()["data"][0]["id"] == "demo"
        # With the gateway, its templates and their fork; what has served may be ending still.
        eventually(lambda: is_light(server))
        assert server.get("/readyz").json()["state"] == "zero"
        # openai-python does not know that there was nobody.
        with server.openai() as client:
            answer = client.completions.create(
                model="demo",
                prompt=PROMPT,
                max_tokens=8,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
        assert answer.choices[0].text == want
        numbers = server.metrics()
        assert numbers["coldframe_coldstarts_total{fresh}"] == starts + 1
        assert numbers["coldframe_zero_seconds_total"] > 0
        loaded = numbers["coldframe_weights_loaded_bytes_total"]
        assert loaded == (starts + 1) * numbers["coldframe_weights_bytes"]


@pytest.mark.heavy
def test_many_at_once_wake_it_once(model: Path) -> None:
    with served(model, "--idle", 0.2) as server:
        eventually(is_in(server, "zero"), seconds=60)
        want = greedy(model, tuple(PROMPT), 8)
        assert together([lambda: complete(server)] * 40) == [want] * 40
        assert server.metrics()["coldframe_coldstarts_total{fresh}"] == 2


@pytest.mark.heavy
def test_ended_when_nobody_asks_it_says_that_all_is_well(model: Path) -> None:
    with served(model, "--idle", 0.2, "--on-idle", "exit") as server:
        assert complete(server) == greedy(model, tuple(PROMPT), 8)
        assert server.process.wait(60) == 0


@pytest.mark.heavy
def test_it_sleeps_and_wakes_as_it_is_told(model: Path) -> None:
    with served(model, COLDFRAME_API_KEYS="secret") as server:
        key = {"authorization": "Bearer secret"}

        def post(path: str, **more: object) -> httpx.Response:
            return httpx.post(server.url + path, timeout=60, **{"headers": key, **more})  # type: ignore[arg-type]

        def sleeping() -> bool:
            told = httpx.get(server.url + "/is_sleeping", headers=key, timeout=30).json()
            return bool(told["is_sleeping"])

        server.ready()
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        want = greedy(model, tuple(PROMPT), 8)
        assert post("/sleep", headers={}).status_code == 401
        assert post("/sleep?level=3").status_code == 400
        for level in ("", "?level=1", "?level=2"):
            assert not sleeping()
            assert post(f"/sleep{level}").status_code == 200
            assert sleeping()
            assert server.get("/readyz").json()["state"] == ("zero" if "2" in level else "parked")
            assert post("/wake_up?tags=weights").status_code == 200
            assert not sleeping()
            assert post("/sleep?level=1").status_code == 200
            # Who asks wakes it as well.
            answer = post("/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == want


@pytest.mark.heavy
def test_all_that_it_has_may_die_and_it_stays_ready(model: Path) -> None:
    with served(model) as server:
        assert complete(server) == greedy(model, tuple(PROMPT), 8)
        (memory,) = server._children("loader.memory_service.service")
        memory.kill()
        eventually(lambda: "died" in server.log)
        assert server.get("/readyz").status_code == 200
        assert complete(server) == greedy(model, tuple(PROMPT), 8)


@pytest.mark.heavy
@pytest.mark.parametrize("rest", ["zero", "parked"])
def test_a_signal_at_rest_ends_it(model: Path, rest: str) -> None:
    park = 0 if rest == "zero" else 1000
    with served(model, "--idle", 0.2, "--park", park) as server:
        eventually(is_in(server, rest), seconds=60)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - started < 20


@pytest.mark.heavy
def test_a_gateway_that_is_killed_again_and_again_comes_back(model: Path) -> None:
    with served(model) as server:
        want = greedy(model, tuple(PROMPT), 8)
        for _ in range(8):
            assert complete(server) == want
            gateway = server.gateway()
            gateway.kill()
            gateway.wait(10)
        # From the fourth on it takes its time, and who has connected is held by the kernel.
        assert complete(server) == want
        assert re.findall(r'"next_in_s": (\S+)}', server.log)[2:5] == ["0.0", "0.4", "0.8"]
        server.gateway().kill()
        # Told to end while there is none.
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


@pytest.mark.heavy
def test_a_gateway_that_is_killed_before_it_comes_up_comes_back(model: Path) -> None:
    # As where memory is short, and the kernel's choice falls on whoever has just started.
    quick = {"coldframe.runtime.endpoint.endpoint._GATEWAY_MOST_DELAY_S": 0.1}
    with served(model, front=quick) as server:
        want = greedy(model, tuple(PROMPT), 8)
        for _ in range(7):
            eventually(lambda: server._children("coldframe.runtime.gateway.process"))
            gateway = server.gateway()
            gateway.kill()
            gateway.wait(10)
        assert complete(server) == want


@pytest.mark.heavy
def test_a_gateway_that_never_comes_up_ends_the_server(model: Path, tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise SystemExit(3)\n")
    quick = {"coldframe.runtime.endpoint.endpoint._GATEWAY_MOST_DELAY_S": 0.1}
    with served(model, front=quick, PYTHONPATH=str(tmp_path)) as server:
        server.ends_with = (1,)
        assert server.process.wait(60) == 1
        assert "no gateway comes up, got exit status 3" in server.log
