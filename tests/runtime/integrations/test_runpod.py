"""RunPod's queue: jobs through the real SDK to a real server, and what can go wrong on the way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from coldframe.runtime.integrations.runpod import job_handler

KEY = "the-key"
CHAT = [{"role": "user", "content": "good day"}]
WHOLE = {"choices": [{"tokens": ["good day"]}], "usage": {"input": 5, "output": 2}}

MAIN = "import sys; from coldframe.runtime.integrations.runpod import main; main(*{arguments!r})"


def outputs(url: str, given: object, key: str | None = KEY) -> list[Any]:
    """All that the handler yields for one job."""

    async def collect() -> list[Any]:
        return [output async for output in job_handler(url, key)({"id": "1", "input": given})]

    return asyncio.run(collect())


def tokens(parts: list[Any]) -> list[str]:
    """The tokens of the first choice, of all parts."""
    return [token for part in parts for token in part["choices"][0]["tokens"]]


@pytest.mark.parametrize(
    ("given", "path", "said"),
    [
        ({"prompt": "good day"}, "/v1/completions", WHOLE),
        ({"messages": CHAT}, "/v1/chat/completions", WHOLE),
        ({"prompt": "good day", "apply_chat_template": True}, "/v1/chat/completions", WHOLE),
    ],
)
def test_a_job_is_answered_whole(
    given: dict[str, Any], path: str, said: object, openai_server: Any
) -> None:
    given["sampling_params"] = {"max_tokens": 3, "temperature": 0}
    assert outputs(openai_server.url, given) == [said]
    ((asked, body),) = openai_server.seen
    assert asked == path
    assert (body["max_tokens"], body["temperature"]) == (3, 0)
    assert "stream" not in body


def test_a_job_in_openais_words_gets_openais_document(openai_server: Any) -> None:
    job = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": CHAT}}
    (said,) = outputs(openai_server.url, job)
    assert said["choices"][0]["message"]["content"] == "good day"
    (models,) = outputs(openai_server.url, {"openai_route": "/v1/models"})
    assert models["data"][0]["id"] == "demo"


def test_a_stream_is_complete_however_it_is_cut(openai_server: Any) -> None:
    words = [f"w{i}" for i in range(200)]
    parts = outputs(openai_server.url, {"prompt": " ".join(words), "stream": True})
    assert tokens(parts) == words
    assert parts[-1]["usage"] == {"input": 5, "output": 200}


def test_openais_stream_comes_as_it_is(openai_server: Any) -> None:
    request = {"messages": CHAT, "stream": True}
    job = {"openai_route": "/v1/chat/completions", "openai_input": request}
    text = "".join(outputs(openai_server.url, job))
    assert text.startswith("data: {")
    assert text.endswith("}\n\ndata: [DONE]\n\n")
    assert re.findall(r'"content": "(\w+)"', text) == ["good", "day"]


def test_the_first_tokens_do_not_wait_for_a_batch(openai_server: Any) -> None:
    async def steps() -> list[Any]:
        job = {"id": "1", "input": {"prompt": "slow but sure", "stream": True}}
        stream = job_handler(openai_server.url, KEY)(job)
        found = []
        for _ in range(3):
            openai_server.go.release()
            found.append(await anext(stream))
        return [*found, *[output async for output in stream]]

    parts = asyncio.run(steps())
    assert tokens(parts[:1]) == ["slow"]
    assert tokens(parts[1:2]) == ["but"]
    assert tokens(parts) == ["slow", "but", "sure"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "one of messages and prompt"),
        ("text", "object"),
        ({"prompt": "a", "messages": CHAT}, "one of messages and prompt"),
        ({"prompt": "refuse"}, "temperature must be at most 2"),
        ({"prompt": "teapot"}, "status 503"),
        ({"prompt": "half", "stream": True}, "broke off"),
        ({"prompt": "broken", "stream": True}, "the worker is gone"),
        ({"openai_route": "/v1/../metrics"}, "openai_route"),
    ],
)
def test_a_job_that_fails_says_why(given: object, message: str, openai_server: Any) -> None:
    last = outputs(openai_server.url, given)[-1]
    assert set(last) == {"error"}
    assert message in last["error"]


def test_a_wrong_key_and_a_replica_that_is_gone(openai_server: Any) -> None:
    assert "no such key" in outputs(openai_server.url, {"prompt": "a"}, "other")[0]["error"]
    assert "no such key" in outputs(openai_server.url, {"prompt": "a"}, None)[0]["error"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert "cannot be reached" in outputs(url, {"prompt": "a"})[0]["error"]


@contextmanager
def worker(arguments: tuple[str, ...], environ: dict[str, str], *flags: str) -> Iterator[Any]:
    """The handler under the SDK, in a process of its own, as on the platform."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN.format(arguments=arguments), *flags],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.heavy
def test_the_sdk_runs_jobs(openai_server: Any, runpod_queue: Any) -> None:
    with worker((openai_server.url, KEY), runpod_queue.environment) as process:
        streamed, result = runpod_queue.run("a", {"prompt": "good day"})
        assert result == {"output": [WHOLE]}
        assert streamed == [{"output": WHOLE}]

        request = {"prompt": "slow stream", "stream": True}
        runpod_queue.jobs.put({"id": "b", "input": request})
        openai_server.go.release()
        first = runpod_queue.streamed.get(timeout=30)
        assert first == ("b", {"output": {"choices": [{"tokens": ["slow"]}]}})
        openai_server.go.release()
        _, result = runpod_queue.result("b")
        assert tokens(result["output"]) == ["slow", "stream"]

        _, result = runpod_queue.run("c", {"prompt": "refuse"})
        assert result == {"error": "temperature must be at most 2."}
        _, result = runpod_queue.run("d", {"prompt": "broken", "stream": True})
        assert result == {"error": "the worker is gone"}

        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "good day" not in output, "answers are not logged"
        assert "fitness" not in output


@pytest.mark.heavy
def test_the_sdk_runs_jobs_at_once_and_stops_one(openai_server: Any, runpod_queue: Any) -> None:
    with worker((openai_server.url, KEY), runpod_queue.environment):
        # Each is answered when the other is there.
        for name in ("a", "b"):
            runpod_queue.jobs.put({"id": name, "input": {"prompt": "meet"}})
        assert {runpod_queue.done.get(timeout=30)[0] for _ in range(2)} == {"a", "b"}

        runpod_queue.jobs.put({"id": "c", "input": {"prompt": "slow " * 1000, "stream": True}})
        openai_server.go.release()
        wait_until(lambda: runpod_queue.streamed.get(timeout=30)[0] == "c")
        runpod_queue.stops.put("c")
        # The server finds out when it writes.
        wait_until(lambda: openai_server.go.release() or openai_server.gone.is_set())


@pytest.mark.heavy
def test_the_sdks_own_test_server(openai_server: Any) -> None:
    flags = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", "0")
    with worker((openai_server.url, KEY), {}, *flags) as process:
        lines = iter(process.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127\S+", line)))
        body = {"input": {"messages": CHAT}}
        said = httpx.post(f"{url}/runsync", json=body, timeout=30).json()
        assert (said["status"], said["output"]) == ("COMPLETED", [WHOLE])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
