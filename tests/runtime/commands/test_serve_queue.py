"""Clients that come faster than they can be served: held in order, bounded, and told when full."""

from __future__ import annotations

import json
import math
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.serving import Server, everything, greedy, request, served, status
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]
CLIENTS = 200
WEIGHTS = 4_002_304
"""Bytes of the tiny model in float32, as is checked below."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def asks(count: int = 1, **more: Any) -> bytes:
    body = {"prompt": [5] * 24, "max_tokens": count, "temperature": 0, "ignore_eos": True, **more}
    return request("/v1/completions", json.dumps(body).encode())


def queue(server: Server) -> tuple[int, int]:
    """How many sequences are with the workers, and how many wait."""
    found = server.get("/startup").json()["queue"]
    return found["running"], found["waiting"]


@contextmanager
def watched(process: psutil.Process) -> Iterator[list[int]]:
    """A process's resident bytes, again and again."""
    seen, over = [process.memory_info().rss], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_200_clients_of_a_cold_replica_are_answered_in_the_order_in_which_they_came(
    model: Path,
) -> None:
    throttle = ("--throttle", f"{WEIGHTS // 3}")  # it loads for 3 s
    # Each has a prompt of its own, and a body that would be felt if it were kept many times.
    prompts = [prompt_of(24, seed=i) for i in range(CLIENTS)]
    answers = [b""] * CLIENTS
    began: list[int] = []
    with served(model, *throttle) as server, ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        eventually(lambda: server.get("/healthz").status_code == 200)
        with watched(server.gateway()) as resident:
            for i, prompt in enumerate(prompts):
                sock = stack.enter_context(server.connect())
                sock.sendall(asks(8, prompt=prompt, stream=True, metadata={"x": "y" * 8192}))
                selector.register(sock, selectors.EVENT_READ, i)
                # So that the next one is accepted after this one.
                time.sleep(0.003)
            state = server.get("/startup").json()
            assert (state["state"], state["bytes_total"]) == ("starting", WEIGHTS)
            assert sum(state["queue"].values()) == CLIENTS
            while selector.get_map():
                for key, _ in selector.select(60):
                    assert isinstance(key.fileobj, socket.socket)
                    part = key.fileobj.recv(1 << 16)
                    if part and b"data: " not in answers[key.data] and b"data: " in part:
                        began.append(key.data)
                    answers[key.data] += part
                    if not part:
                        selector.unregister(key.fileobj)
        metrics = server.metrics()
    texts = [_text(answer) for answer in answers]
    assert texts[:8] == [greedy(model, tuple(prompt), 8) for prompt in prompts[:8]]
    assert len(set(texts)) > CLIENTS // 2
    # First come, first served. Which of two is read first here, where both have come, is chance.
    assert sorted(began) == list(range(CLIENTS))
    assert max(abs(place - i) for place, i in enumerate(began)) < 4
    # 200 bodies of 8 KiB, their connections and their answers.
    assert max(resident) - resident[0] < 24 << 20
    assert metrics["coldframe_request_success_total{length}"] == CLIENTS
    assert metrics["coldframe_num_requests_waiting"] == 0


def _text(answer: bytes) -> str:
    assert status(answer) == 200
    events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
    assert b"data: [DONE]" in answer
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_a_full_line_before_a_cold_replica_says_when_to_come_again(model: Path) -> None:
    rate = 200_000
    flags = ("--throttle", f"{rate}", "--max-running", 2, "--max-waiting", 3, "--drain", 1)
    with served(model, *flags) as server, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.connect()).sendall(asks())
        eventually(lambda: queue(server) == (2, 3))
        eventually(lambda: server.get("/startup").json()["bytes_done"] > WEIGHTS // 20)
        answer = server.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("unavailable_error", "queue_full")
        assert error["stage"] == "weights"
        assert "Loading model" in error["message"]
        assert 0 < error["progress"] < 1
        # Bytes left over the rate, which is the throttle's.
        left = WEIGHTS * (1 - error["progress"]) / rate
        assert left / 1.5 < error["eta_s"] < left * 1.5
        assert int(answer.headers["retry-after"]) == math.ceil(error["eta_s"])
        assert int(answer.headers["retry-after-ms"]) == math.ceil(error["eta_s"] * 1000)
        assert queue(server) == (2, 3)
        assert server.metrics()["coldframe_requests_refused_total{queue_full}"] == 1
        # One that can never have its place is not told to come again.
        never = server.post("/v1/completions", {"prompt": "a", "n": 6})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


def test_a_full_line_before_a_warm_replica_is_429(model: Path) -> None:
    with served(model, "--max-running", 1, "--max-waiting", 2) as server:
        server.ready()
        with ExitStack() as stack:
            held = [stack.enter_context(server.connect()) for _ in range(3)]
            for sock in held:
                sock.sendall(asks(900))
            eventually(lambda: queue(server) == (1, 2))
            answer = server.post("/v1/completions", {"prompt": "a"})
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            # Whoever goes makes room for the next.
            held.pop().close()
            eventually(lambda: queue(server)[1] == 1)
            held.append(stack.enter_context(server.connect()))
            held[-1].sendall(asks(1))
            assert [status(everything(sock)) for sock in held] == [200] * 3
        assert server.complete(max_tokens=1)


def test_who_has_waited_too_long_is_told(model: Path) -> None:
    flags = ("--throttle", "50kB/s", "--max-wait", 1.5, "--drain", 1)
    with served(model, *flags) as server:
        body = {"prompt": "a", "stream": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["code"], error["stage"]) == ("deadline", "weights")
        assert int(answer.headers["retry-after"]) > 1
        assert queue(server) == (0, 0)


def test_who_has_waited_too_long_behind_others_is_told(model: Path) -> None:
    with served(model, "--max-running", 1, "--max-wait", 0.3) as server:
        server.ready()
        with server.connect() as first, server.connect() as second:
            first.sendall(asks(900))
            eventually(lambda: queue(server) == (1, 0))
            second.sendall(asks(1))
            late = everything(second)
            assert status(late) == 503
            assert b'"deadline"' in late
            # A request that has begun has all the time that it needs.
            assert status(everything(first)) == 200
