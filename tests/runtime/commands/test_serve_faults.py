"""`coldframe serve` when things go wrong: bad input, dead processes, signals, no model, no port."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, APIError

from tests.runtime.helpers import prompt_of
from tests.runtime.serving import (
    COLDFRAME,
    Server,
    everything,
    greedy,
    request,
    served,
    status,
    together,
)
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
LONG = [5, *prompt_of(23)]
COUNT = 900
"""Tokens of a stream that is long enough to be interfered with."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


# -- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """It has OpenAI's routes, /invoke and Vertex AI's."""
    with served(model, "--platform", "vertex", "--max-body", "1MiB") as server:
        yield server


def _plain(fields: dict[str, Any]) -> Any:
    return {"prompt": "Hi", "max_tokens": 2, **fields}


def _instances(fields: dict[str, Any]) -> Any:
    return {"instances": [_plain(fields)]}


ROUTES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "/v1/completions": _plain,
    "/invoke": _plain,
    "/predict": _instances,
}

WRONG: dict[str, tuple[dict[str, Any], int]] = {
    "a temperature that is text": ({"temperature": "hot"}, 400),
    "a prompt that is a number": ({"prompt": 7}, 400),
    "an empty list of prompts": ({"prompt": []}, 400),
    "token ids out of the vocabulary": ({"prompt": [1 << 40]}, 400),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
    "structured output": ({"response_format": {"type": "json_object"}}, 400),
    "another model": ({"model": "gpt-4"}, 404),
    "a prompt that is too long": ({"prompt": "so " * 20_000}, 400),
    "token ids that are too many": ({"prompt": [5] * 2000}, 400),
    "an absurd n": ({"n": 1_000_000}, 400),
    "an absurd max_tokens": ({"max_tokens": 10**30}, 400),
    "max_tokens over the context": ({"max_tokens": 100_000}, 400),
    "a negative max_tokens": ({"max_tokens": -1}, 400),
    "too many stop strings": ({"stop": ["x"] * 100_000}, 400),
    "an empty stop string": ({"stop": [""]}, 400),
    "a long stop string": ({"stop": "x" * 100_000}, 400),
    "a bias for no token": ({"logit_bias": {"never": 1}}, 400),
    "an absurd seed": ({"seed": 1 << 70}, 400),
}
RAW: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "half an object": (b'{"prompt": "Hi"', 400),
    "two values": (b"{} {}", 400),
    "no object": (b"[1]", 400),
    "null": (b"null", 400),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', 400),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', 400),
    "an endless number": (b'{"prompt": "a", "temperature": 1e999}', 400),
    "a number of many digits": (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", 400),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', 400),
    "lists in lists": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "a third of a million stop strings": (
        b'{"prompt": "a", "stop": [' + b'"",' * 340_000 + b'""]}',
        400,
    ),
    "too much": (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413),
}


def shaped(route: str, answer: httpx.Response) -> str:
    """The message of an error, which must have the platform's shape."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    if route == "/predict":
        assert error["code"] == answer.status_code
        assert error["status"] in ("INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL")
    else:
        assert {"message", "type", "param", "code"} <= set(error)
        assert error["type"] == "invalid_request_error"
    return str(error["message"])


@pytest.mark.parametrize("route", ROUTES)
def test_bad_input_is_refused_and_the_server_goes_on(server: Server, route: str) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for name, (fields, code) in WRONG.items():
            answer = client.post(route, json=ROUTES[route](fields))
            assert answer.status_code == code, (name, answer.text)
            message = shaped(route, answer)
            assert 0 < len(message) < 1000, name
            if name == "structured output":
                assert "vLLM" in message
        for name, (body, code) in RAW.items():
            answer = client.post(route, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == code, (name, answer.text)
            assert shaped(route, answer)
        answer = client.post(route, json=ROUTES[route]({}))
        assert answer.status_code == 200, answer.text


def test_bad_chats_are_refused(server: Server) -> None:
    for messages in (
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
        [{"role": "owl", "content": "hoo"}],
        [{"content": "who?"}],
        "hello",
        [[]] * 5000,
    ):
        answer = server.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400
        assert str(answer.json()["error"]["param"]).startswith("messages")
    ended = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "{% for %}"},
    )
    assert ended.status_code == 400


@pytest.mark.parametrize("route", ROUTES)
def test_bad_bytes_are_refused_and_the_server_goes_on(server: Server, route: str) -> None:
    body = json.dumps(ROUTES[route]({})).encode()
    good = request(route, body)
    flood = "".join(f"x-{i}: y\r\n" for i in range(5000))
    for sent, code in (
        (b"GARBAGE\r\n\r\n", 400),
        (request(route, body, more=flood), 431),
        (request(route, body, more=f"x: {'y' * 100_000}\r\n"), 431),
        (request("/" + "a" * 20_000, body), 414),
        (request(route, body, more="transfer-encoding: chunked\r\n"), 400),
        (request(route, b"", more="expect: \x00\r\n"), 400),
        (good.replace(b"application/json", b"text/html"), 415),
        (request(route, body, more="content-encoding: gzip\r\n"), 415),
        (request(route, body, method="DELETE"), 405),
        (request("/v1/nothing", body), 404),
        (good.replace(b"content-length: ", b"content-length: 9999999"), 413),
        (good, 200),
    ):
        with server.connect() as sock:
            with suppress(OSError):  # it may be refused before it is all sent
                sock.sendall(sent)
            assert status(everything(sock)) == code, sent[:200]
    # Half a body, and then nobody.
    with server.connect() as sock:
        sock.sendall(good[:-5])
    assert server.post(route, ROUTES[route]({})).status_code == 200


@pytest.mark.heavy
def test_half_a_body_is_not_waited_for(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(request("/v1/completions", b'{"prompt": "a"}')[:-5])
        assert status(everything(sock)) == 408


# -- signals --------------------------------------------------------------------------------------


def stream(server: Server, **more: Any) -> Iterator[str]:
    """The texts of a long streamed answer, as they come."""
    with server.openai(max_retries=0) as client:
        for chunk in client.completions.create(
            model="demo",
            prompt=LONG,
            max_tokens=COUNT,
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
            **more,
        ):
            yield chunk.choices[0].text


@contextmanager
def held(server: Server) -> Iterator[None]:
    """A request that waits for a model that still loads."""
    with server.connect() as sock:
        sock.sendall(request("/v1/completions", b'{"prompt": "a"}'))
        eventually(lambda: server.get("/startup").json()["queue"]["running"] == 1)
        yield


def undisturbed(server: Server) -> str:
    """The text of that stream. That it is right is shown where nothing goes wrong."""
    return server.complete(prompt=LONG, max_tokens=COUNT, ignore_eos=True)


@pytest.mark.heavy
def test_sigterm_in_mid_stream_lets_it_end(model: Path) -> None:
    with served(model, "--model-name", "demo") as server:
        want = undisturbed(server)
        pieces = stream(server)
        text = next(pieces)
        server.process.terminate()
        eventually(lambda: not server.listens())
        text += "".join(pieces)
        assert text == want


@pytest.mark.heavy
def test_sigterm_while_it_is_cold_lets_all_have_their_answers(model: Path) -> None:
    with served(model, "--model-name", "demo", "--throttle", "2MB/s") as server:

        def ask() -> str:
            return server.complete(prompt=LONG, max_tokens=8, ignore_eos=True)

        def end() -> None:
            eventually(lambda: server.get("/startup").json()["queue"]["running"] == 3)
            assert server.get("/readyz").status_code == 503
            server.process.terminate()

        *texts, _ = together([ask, ask, ask, end])
        assert texts == [greedy(model, tuple(LONG), 8)] * 3


@pytest.mark.heavy
def test_who_has_connected_before_the_end_is_told_of_it(model: Path) -> None:
    with served(model) as server:
        with server.connect() as sock:  # nobody accepts yet
            sock.sendall(request("/v1/completions", b'{"prompt": "a"}'))
            eventually(lambda: '"listening"' in server.log)
            time.sleep(0.05)
            server.process.terminate()
            answer = everything(sock)
        assert status(answer) == 503
        assert b'"draining"' in answer
        assert b"retry-after: 1" in answer


@pytest.mark.heavy
def test_a_second_sigterm_ends_it_at_once(model: Path) -> None:
    # It would drain for longer than this test may take.
    with served(model, "--throttle", "20kB/s", "--drain", 600) as server, held(server):
        server.process.terminate()
        eventually(lambda: '"draining"' in server.log)
        server.process.terminate()
        server.process.wait(20)


@pytest.mark.heavy
def test_who_takes_too_long_is_not_waited_for(model: Path) -> None:
    with served(model, "--throttle", "20kB/s", "--drain", 1) as server, held(server):
        server.process.terminate()
        server.process.wait(20)


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_nothing(model: Path, number: signal.Signals) -> None:
    for step in range(12):
        with served(model) as server:
            # Before it has a handler it ends as Python does.
            server.ends_with = (0, -number, 128 + number)
            assert server.port
            time.sleep(step * 0.04)
            server.process.send_signal(number)
            server.process.wait(20)


# -- processes that die ---------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_dies_is_not_noticed(model: Path, role: str) -> None:
    with served(model, "--model-name", "demo") as server:
        want = undisturbed(server)
        pieces = stream(server)
        text = "".join(next(pieces) for _ in range(5))
        server.worker(role).kill()
        # One that comes now, and the one that was there.
        short = server.complete(prompt=LONG, max_tokens=8, ignore_eos=True)
        assert short == greedy(model, tuple(LONG), 8)
        assert text + "".join(pieces) == want


@pytest.mark.heavy
def test_a_gateway_that_dies_is_replaced_behind_the_same_port(model: Path) -> None:
    with served(model, "--model-name", "demo", "--kv-memory", "2MiB") as server:
        pieces = stream(server)
        next(pieces)
        before = server.gateway()
        before.kill()
        # The port was never closed: who comes now waits a moment.
        short = server.complete(prompt=LONG, max_tokens=8, ignore_eos=True)
        assert short == greedy(model, tuple(LONG), 8)
        with pytest.raises((httpx.TransportError, APIConnectionError, APIError)):
            list(pieces)
        assert server.gateway() != before
        # And what its requests held is free.
        assert server.complete(prompt=LONG, max_tokens=1000, ignore_eos=True)
        assert server.get("/readyz").status_code == 200


# -- models and ports that cannot be had ----------------------------------------------------------


def _no_shard(path: Path) -> None:
    next(path.glob("*-00002-of-*.safetensors")).unlink()


def _torn_shard(path: Path) -> None:
    shard = next(path.glob("*-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4096])


def _no_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def _other_family(path: Path) -> None:
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "spoil", [_no_shard, _torn_shard, _no_config, _other_family, _no_tokenizer, shutil.rmtree]
)
def test_a_model_that_cannot_be_loaded_is_an_error_for_all(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    bad = shutil.copytree(model, tmp_path / "bad")
    spoil(bad)
    with served(bad, "--model-name", "demo") as server:
        server.ends_with = (1,)
        with server.connect() as sock:
            sock.sendall(request("/v1/completions", b'{"prompt": "a", "max_tokens": 2}'))
            answer = everything(sock)
        assert status(answer) in (500, 503), answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["type"], error["message"] != "") == ("server_error", True)
        assert str(bad) not in error["message"]
        assert server.process.wait(20) == 1
        assert re.search(r"^coldframe: [A-Z]\w+: .", server.log, re.MULTILINE)


def test_a_port_that_is_taken_starts_nothing(model: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [COLDFRAME, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)],
            capture_output=True,
            text=True,
            env={"COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_SNAPSHOT": "off"},
        )
    assert done.returncode == 1
    assert done.stderr.startswith("coldframe: PlatformError: cannot listen, in 127.0.0.1 port ")
    assert str(port) in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(runs.iterdir()) == []
