"""Logs: one line each, whatever is in it, and nothing secret."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coldframe.runtime.gateway.gone import until_gone
from coldframe.runtime.gateway.logs import Log, Redactor
from coldframe.runtime.gateway.request_log import RequestLog, notes_of
from tests.runtime.gateway.raw import (
    Served,
    answer,
    error_of,
    serving,
    status_of,
    until,
    whole_body,
)

SECRET = 'sk-0123"456\\789/abc'


class Sink:
    """A log's lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)

    def lines(self) -> list[str]:
        return self._path.read_text().split("\n")[:-1]

    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    sink = Sink(tmp_path / "log")
    yield sink
    os.close(sink.fd)


def test_a_line_is_an_object(sink: Sink) -> None:
    Log("json", process="gateway", fd=sink.fd).info("started", port=80, none=None, took=0.12345678)
    (line,) = sink.json()
    when = line.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", when)
    assert line == {
        "level": "info",
        "process": "gateway",
        "event": "started",
        "port": 80,
        "took": 0.123457,
    }


def test_a_line_is_text(sink: Sink) -> None:
    log = Log("text", process="front", fd=sink.fd)
    log.warning("hm", path="/a b\n", plain="x", number=1)
    (line,) = sink.lines()
    assert line.endswith('Z WARNING front: hm path="/a b\\n" plain=x number=1')


def test_what_is_below_the_level_is_not_written(sink: Sink) -> None:
    log = Log("json", "warning", process="front", fd=sink.fd)
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [line["event"] for line in sink.json()] == ["c", "d"]


@given(text=st.text(), form=st.sampled_from(["json", "text"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nobody_writes_lines_of_their_own(sink: Sink, text: str, form: str) -> None:
    before = len(sink.lines())
    Log(form, process="front", fd=sink.fd).info(text, value=text, deep={text: [text]})
    lines = sink.lines()
    assert len(lines) == before + 1
    assert lines[-1].isascii()
    assert lines[-1].isprintable()
    if form == "json":
        assert json.loads(lines[-1])["value"] == text


def test_what_no_json_can_hold_is_written_too(sink: Sink) -> None:
    log = Log(process="front", fd=sink.fd)
    log.info("odd", nan=float("nan"), error=ValueError("x"), raw=b"\xff", half="\ud800")
    deep: list[Any] = []
    deep.append(deep)
    log.info("deep", value=deep, long="x" * 100_000, many=list(range(10_000)))
    odd, cut = sink.json()
    assert odd["nan"] == "nan"
    assert odd["error"] == "x"
    assert len(cut["long"]) < 5000
    assert len(cut["many"]) < 100


def test_a_log_that_cannot_be_written_stops_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    Log(process="front", fd=writer).info("into the void")
    os.close(writer)
    Log(process="front", fd=writer).info("into nothing at all")


def test_secrets_are_replaced_however_they_are_written(sink: Sink) -> None:
    from urllib.parse import quote

    log = Log(process="front", secrets=[SECRET, SECRET + "-longer"], fd=sink.fd)
    log.info(
        f"key {SECRET}",
        plain=f"a{SECRET}b",
        longer=f"{SECRET}-longer!",
        json=json.dumps({"k": SECRET}),
        python=repr([SECRET]),
        url=quote(SECRET, safe=""),
        deep={"k": [SECRET]},
        error=ValueError(SECRET),
        cut="x" * 4090 + SECRET,
    )
    (line,) = sink.lines()
    assert "0123" not in line
    assert json.loads(line)["longer"] == "***!"


def test_bearer_tokens_are_replaced_unknown_as_they_are() -> None:
    redact = Redactor()
    assert redact("Authorization: Bearer abc.def, x") == "Authorization: Bearer ***, x"
    assert redact("authorization: bearer  abc") == "authorization: bearer  ***"
    assert redact("the bearer") == "the bearer"


def test_short_words_are_no_secrets() -> None:
    assert Redactor(["", "a", "abc"])("abc a") == "abc a"


class Wait(Response):
    """An answer that begins, and whose client goes."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await until_gone(receive, asyncio.Event().wait())


async def wait(request: Request) -> Response:
    await until_gone(request.receive, asyncio.Event().wait())
    return Response()


async def begin(request: Request) -> Response:
    return Wait()


class App:
    """Routes of all fates."""

    def __init__(self) -> None:
        self._starlette = Starlette(
            routes=[Route("/starlette/wait", wait), Route("/starlette/begun", begin)]
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/starlette"):
            await self._starlette(scope, receive, send)
            return
        await whole_body(receive)
        path = scope["path"]
        if path == "/fails":
            raise ValueError("broken " + "x" * 1000)
        if path == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ValueError("broken in the middle")
        if path == "/wait":
            await until_gone(receive, asyncio.Event().wait())
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            notes_of(scope).completion_tokens = 7
            await send({"type": "http.response.body", "body": b"b"})
            return
        await answer(send, 200, b"ok")


@pytest.fixture
def served(sink: Sink) -> Iterator[Served]:
    log = Log(process="gateway", level="debug", secrets=[SECRET], fd=sink.fd)
    with serving(RequestLog(App(), log, quiet={"/healthz"})) as served:
        yield served
    # uvicorn's word for an answer that broke off; ours has said why.
    assert served.records.bad == ["ASGI callable returned without completing response."]


def ask(served: Served, path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: a", "Connection: close", *headers, "", ""]
    return served.ask("\r\n".join(lines).encode())


def test_requests_leave_a_line_each(served: Served, sink: Sink) -> None:
    """One server for the whole story: what a request was, and nothing of what was in it."""
    got = ask(
        served, f"/x%0Ay?key={SECRET[:8]}", "X-Request-Id: mine-1", "Authorization: Bearer zz"
    )
    assert b"x-request-id: mine-1\r\n" in got
    until(lambda: len(sink.lines()) == 1)
    line = sink.json()[0]
    assert (line["event"], line["level"]) == ("request", "info")
    assert (line["method"], line["path"], line["status"]) == ("GET", "/x\ny", 200)
    assert line["request_id"] == "mine-1"
    assert line["seconds"] >= 0
    assert "ttft" not in line
    assert "key" not in sink.lines()[0]
    assert "zz" not in sink.lines()[0]

    for bad in ("", "a b", "a;b", "x" * 129, '"'):
        got = ask(served, "/healthz", f"X-Request-Id: {bad}")
        assert re.search(rb"x-request-id: req-[0-9a-f]{24}\r\n", got)
    until(lambda: len(sink.lines()) == 6)
    assert {line["level"] for line in sink.json()[1:]} == {"debug"}

    ask(served, "/stream")
    until(lambda: len(sink.lines()) == 7)
    line = sink.json()[6]
    assert 0 <= line["ttft"] <= line["seconds"]
    assert line["completion_tokens"] == 7

    got = ask(served, "/fails")
    assert status_of(got) == 500
    assert error_of(got)["type"] == "server_error"
    assert b"broken" not in got
    until(lambda: len(sink.lines()) == 9)
    failed, line = sink.json()[7:]
    assert (failed["level"], failed["event"]) == ("error", "request failed")
    assert "ValueError: broken" in failed["traceback"]
    assert len(failed["traceback"]) < 1500
    assert failed["request_id"] == line["request_id"]
    assert line["status"] == 500

    for number, (path, status) in enumerate(
        [("/wait", None), ("/starlette/wait", None), ("/starlette/begun", 200)], start=10
    ):
        sock = served.connect()
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        if status is not None:
            sock.recv(1)
        sock.close()
        until(lambda number=number: len(sink.lines()) == number)  # type: ignore[misc]
        line = sink.json()[-1]
        assert (line["client_gone"], line.get("status")) == (True, status)

    ask(served, "/late")  # uvicorn ends the connection: the client sees that something is missing
    until(lambda: len(sink.lines()) == 14)


def test_what_libraries_log_comes_the_same_way() -> None:
    code = """
import logging, warnings, uvicorn
from coldframe.runtime.gateway.log_bridge import route_logging
from coldframe.runtime.gateway.logs import Log
async def app(scope, receive, send): pass
route_logging(Log(process="gateway", level="debug", secrets=["hush-hush"]))
uvicorn.Config(app, log_config=None)
logging.getLogger("uvicorn.error").info("up %d", 1)
logging.getLogger("uvicorn.error").warning("hush-hush\\nline")
logging.getLogger("other").info("said %s", "x")
logging.getLogger("other").info("wrong %d", "x")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("asyncio").exception("oops")
warnings.warn("beware")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    found = [(line["level"], line["logger"], line["message"]) for line in lines[:4]]
    assert found == [
        ("debug", "uvicorn.error", "up 1"),
        ("warning", "uvicorn.error", "***\nline"),
        ("info", "other", "said x"),
        ("info", "other", "wrong %d"),
    ]
    assert "ZeroDivisionError" in lines[4]["traceback"]
    assert "beware" in lines[5]["message"]


def test_the_front_logs_without_logging() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from coldframe.runtime.gateway.logs import Log\n"
        "Log(process='front').info('x')\n"
        "print(*(sys.modules.keys() - before) & {'logging', 'typing', 'asyncio', 'urllib.parse'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
