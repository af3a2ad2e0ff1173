"""The port against clients that are slow, wrong, greedy or gone: raw bytes to a real uvicorn."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldframe.runtime.gateway.limits import HttpLimits
from tests.runtime.gateway.raw import (
    PATIENT,
    QUICK,
    Served,
    answer,
    error_of,
    read_all,
    read_answer,
    serving,
    status_of,
    until,
    whole_body,
)

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class App:
    """Answers with what it got; `/early` before the body, `/large` with much, `/held` when told."""

    def __init__(self) -> None:
        self.bodies: list[bytes | None] = []
        self.gone = 0
        self.running = 0
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.running += 1
        try:
            if path == "/early":
                await answer(send, 413, b"no")
                return
            body = await whole_body(receive)
            self.bodies.append(body)
            if body is None:
                self.gone += 1
            elif path == "/held":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.gone += 1
            elif path == "/large":
                await self._large(receive, send)
            else:
                await answer(send, 200, path.encode() + b" " + body)
        finally:
            self.running -= 1

    async def _large(self, receive: Any, send: Any) -> None:
        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone += 1

        watch = asyncio.create_task(left())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            self.sent += 1
            await asyncio.sleep(0)
            if watch.done():
                return
        watch.cancel()
        await send({"type": "http.response.body", "body": b""})


class Current:
    """The application of the test that runs; all share a server."""

    app: App

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[HttpLimits, tuple[Served, Current]]]:
    with ExitStack() as stack:
        started = {}
        for limits in (PATIENT, QUICK):
            current = Current()
            started[limits] = (stack.enter_context(serving(current, limits)), current)
        yield started


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def served(servers: dict[HttpLimits, tuple[Served, Current]], app: App) -> Iterator[Served]:
    yield from _serve(*servers[PATIENT], app)


@pytest.fixture
def hasty(servers: dict[HttpLimits, tuple[Served, Current]], app: App) -> Iterator[Served]:
    """A server that does not wait long."""
    yield from _serve(*servers[QUICK], app)


def _serve(served: Served, current: Current, app: App) -> Iterator[Served]:
    current.app = app
    yield served
    # Whatever the test did, the next client is served, and nothing blew up.
    assert status_of(served.ask(LAST)) == 200
    for client in served.clients:
        client.close()
    until(lambda: app.running == 0)
    assert served.records.bad == []


def test_requests_one_after_the_other_share_a_connection(served: Served) -> None:
    sock = served.connect()
    for _ in range(3):
        sock.sendall(GET)
        assert read_answer(sock).endswith(b"/x ")


def test_an_answer_waits_for_no_acknowledgement(served: Served) -> None:
    sock = served.connect()
    sock.sendall(GET)
    read_answer(sock)
    connections = served.server.server_state.connections
    until(lambda: len(connections) == 1)
    (connection,) = connections
    there = connection.transport.get_extra_info("socket")
    assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_half_a_head_is_408_and_nothing_is_nothing(hasty: Served) -> None:
    silent = hasty.connect()
    first, second, behind = (hasty.connect() for _ in range(3))
    first.sendall(b"GET / HTTP/1.1\r\nHost: ")
    behind.sendall(GET + b"POST /y")
    second.sendall(GET)
    read_answer(second)
    second.sendall(b"GET")
    assert status_of(read_answer(behind)) == 200
    for sock in (first, second, behind):
        got = read_all(sock)
        assert status_of(got) == 408
        assert "in time" in error_of(got)["message"]
    # Opened in advance, and who sends a request just now must not take a 408 for its answer.
    assert read_all(silent) == b""


def test_a_head_that_trickles_is_408(hasty: Served) -> None:
    sock = hasty.connect()
    sock.sendall(b"GET / HTTP/1.1\r\n")
    sock.settimeout(0.02)
    got = b""
    for _ in range(500):
        try:
            got = sock.recv(1 << 16)
            break
        except TimeoutError:
            sock.sendall(b"a: b\r\n")
    assert status_of(got) == 408


def test_an_idle_connection_is_closed(hasty: Served) -> None:
    sock = hasty.connect()
    sock.sendall(GET)
    read_answer(sock)
    assert read_all(sock) == b""


def test_empty_lines_do_not_keep_a_connection(hasty: Served) -> None:
    sock = hasty.connect()
    sock.settimeout(0.02)
    end = time.monotonic() + 10
    got = None
    while got is None and time.monotonic() < end:
        try:
            got = sock.recv(100)
        except TimeoutError:
            sock.sendall(b"\r\n")
        except ConnectionError:
            got = b""
    assert got == b""


def test_empty_lines_before_a_request_are_skipped(served: Served) -> None:
    assert status_of(served.ask(b"\r\n\r\n" + LAST)) == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, id="tls"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, id="http2"),
        pytest.param(b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505, id="http9"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, id="two hosts"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nx: a\x00b\r\n\r\n", 400, id="nul"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nx y: b\r\n\r\n", 400, id="name"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nx : b\r\n\r\n", 400, id="space"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400, id="no name"),
        pytest.param(b"GET / HTTP/1.1\r\n folded\r\nHost: a\r\n\r\n", 400, id="fold"),
        pytest.param(b"G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="method"),
        pytest.param(b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="target"),
        pytest.param(b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="proxy"),
        pytest.param(b"CONNECT b:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="connect"),
        pytest.param(b"hello\r\n\r\n", 400, id="hello"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n", 400, id="lengths"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400, id="negative"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1" + b"0" * 30 + b"\r\n\r\n",
            400,
            id="astronomic",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
            400,
            id="smuggling",
        ),
        pytest.param(
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, id="chunked 1.0"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
            id="gzip",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            id="chunk size",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef",
            400,
            id="chunk end",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1\r\na\r\n" * 1000,
            400,
            id="crumbs",
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            400,
            id="websocket",
        ),
        pytest.param(
            b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, id="long target"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431, id="many headers"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 40000 + b"\r\n\r\n", 431, id="large header"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 200_000, 431, id="header flood"
        ),
    ],
)
def test_what_is_wrong_is_refused_in_json(
    served: Served, app: App, raw: bytes, status: int
) -> None:
    got = served.ask(raw)
    assert status_of(got) == status
    error_of(got)
    assert b"connection: close" in got
    until(lambda: app.running == 0)
    assert [body for body in app.bodies if body is not None] == []


def test_an_error_does_not_repeat_what_was_sent(served: Served) -> None:
    got = served.ask(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization Bearer sk-secret\r\n\r\n")
    assert status_of(got) == 400
    assert b"secret" not in got
    assert not any("secret" in record.getMessage() for record in served.records.found)


def test_http_1_0_is_answered_and_closed(served: Served) -> None:
    got = served.ask(b"POST /x HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi")
    assert got.endswith(b"/x hi")
    assert b"connection: close" in got.lower()


def test_more_than_was_announced_does_not_spoil_the_answer(served: Served) -> None:
    sock = served.connect()
    sock.sendall(LAST)
    got = bytearray()
    # What comes when it is closed already may reset the connection, but behind the answer.
    with suppress(ConnectionError):
        sock.sendall(b"\r\n")
    with suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            got += part
    assert got.endswith(b"/x ")


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    raw = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi" % number
        for number in range(50)
    )
    got = served.ask(raw + LAST)
    where = [got.index(b"/%d hi" % number) for number in range(50)]
    assert where == sorted(where)
    assert got.endswith(b"/x ")


def test_who_waits_for_100_gets_it(served: Served) -> None:
    sock = served.connect()
    sock.sendall(
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
        b"Connection: close\r\n\r\n"
    )
    assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
    sock.sendall(b"hi")
    assert read_all(sock).endswith(b"/x hi")


def test_who_waits_for_100_can_be_refused_before(served: Served) -> None:
    got = served.ask(
        b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\nExpect: 100-continue\r\n\r\n"
    )
    assert status_of(got) == 413
    assert b"connection: close" in got.lower()


def test_a_client_in_the_middle_of_a_body_reads_why_it_is_refused(served: Served) -> None:
    sock = served.connect()
    size = 8 << 20
    sock.sendall(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
    sock.sendall(bytes(size - 1))  # no reset: the server listens on for a moment
    assert status_of(read_all(sock)) == 413


def test_a_refused_client_that_never_ends_is_cut_off(app: App) -> None:
    with serving(app, replace(PATIENT, linger_s=60, linger_bytes=1 << 20)) as served:
        sock = served.connect()
        with pytest.raises(ConnectionError):
            sock.sendall(bytes(64 << 20))
    assert served.records.bad == []


def test_an_upgrade_that_nobody_takes_up_is_ignored(served: Served) -> None:
    sock = served.connect()
    upgrade = (
        b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nContent-Length: 2\r\n\r\nhi"
    )
    for _ in range(2):
        sock.sendall(upgrade)
        assert read_answer(sock).endswith(b"/x hi")


def test_a_client_that_does_not_read_is_dropped(hasty: Served, app: App) -> None:
    sock = hasty.connect(receive_buffer=4096)
    sock.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    until(lambda: app.gone == 1)
    assert app.sent < 1000
    rest = b""
    with suppress(ConnectionError):
        rest = read_all(sock)
    assert not rest.endswith(b"0\r\n\r\n")  # it can see that something is missing


def test_a_client_that_reads_slowly_but_steadily_gets_everything(app: App) -> None:
    with serving(app, replace(QUICK, write_s=0.6, rate=1 << 10)) as served:
        sock = served.connect(receive_buffer=64 << 10)
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(0.1)
        total = 0
        begun = time.monotonic()
        while part := sock.recv(1 << 20):
            total += len(part)
            if time.monotonic() - begun < 1.0:
                time.sleep(0.02)
        assert total > 1000 << 16
        assert app.gone == 0


def test_the_end_of_a_connection_is_seen_behind_pipelined_bytes(served: Served, app: App) -> None:
    sock = served.connect()
    sock.sendall(b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n")
    until(lambda: app.running == 1)
    sock.sendall(b"GET /held HTTP/1.1\r\n")
    time.sleep(0.05)
    sock.close()
    until(lambda: app.gone == 1)


def test_a_reset_is_seen(served: Served, app: App) -> None:
    sock = served.connect()
    sock.sendall(b"GET /held HTTP/1.1\r\nHost: a\r\n\r\n")
    until(lambda: app.running == 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    until(lambda: app.gone == 1)


def test_a_connection_too_many_is_told_so(app: App) -> None:
    with serving(app, replace(PATIENT, connections=3)) as served:
        first = [served.connect() for _ in range(3)]
        until(lambda: len(served.server.server_state.connections) == 3)
        got = served.ask(LAST)
        assert status_of(got) == 503
        assert error_of(got)["type"] == "server_error"
        for sock in first:
            sock.sendall(LAST)
            assert status_of(read_all(sock)) == 200
        until(lambda: not served.server.server_state.connections)
        assert status_of(served.ask(LAST)) == 200
        # Those beyond the room for refusals are closed without a word.
        crowd = [served.connect() for _ in range(100)]
        until(lambda: len(served.server.server_state.connections) <= 3 + 32)
        for sock in crowd:
            sock.close()
    assert served.records.bad == []


def test_an_end_in_the_middle_of_things_is_quick_and_clean(app: App) -> None:
    with serving(app, replace(PATIENT, linger_s=60)) as served:
        served.connect()
        half = served.connect()
        half.sendall(b"GET / HT")
        refused = served.connect()
        refused.sendall(b"\x00\r\n")
        until(lambda: bool(refused.recv(1, socket.MSG_PEEK)))
        held = served.connect()
        held.sendall(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        until(lambda: app.running == 1)
        served.server.should_exit = True
        until(lambda: len(served.server.server_state.connections) == 1)
        held.sendall(b"hi")
        got = read_all(held)
        assert got.endswith(b"/x hi")
        assert b"connection: close" in got.lower()
    assert served.records.bad == []


def test_httpx_gets_along_with_it(served: Served) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", trust_env=False) as client:
        for _ in range(3):
            assert client.post("/x", content=b"hi").text == "/x hi"
        parts = (b"a" * 3 for _ in range(5))
        assert client.post("/x", content=parts).text == "/x " + "a" * 15
        assert client.post("/early", content=bytes(4 << 20)).status_code == 413
        assert client.get("/x").status_code == 200


LINES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\n",
        b"POST /early HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: upgrade\r\n",
        b"Upgrade: h2c\r\n",
        b"Expect: 100-continue\r\n",
        b"\r\n",
        b"\n",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"abc",
    ]
)


@given(st.lists(st.lists(LINES | st.binary(max_size=20), max_size=8), max_size=3), st.booleans())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_bytes_whatsoever_harm_the_server(
    served: Served, pieces: list[list[bytes]], reads: bool
) -> None:
    sock = served.connect()
    with suppress(OSError):
        for piece in pieces:
            sock.sendall(b"".join(piece))
        sock.shutdown(socket.SHUT_WR)
        if reads:
            read_all(sock)
    sock.close()
    assert status_of(served.ask(LAST)) == 200
    assert served.records.bad == []


def test_the_limit_of_connections_follows_that_of_files() -> None:
    code = (
        "import resource\n"
        "from coldframe.runtime.gateway.limits import connection_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, {hard}))\n"
        "print(connection_limit(most=300, reserved=64))\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    limits = {}
    for hard in (30, 200, min(4000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])):
        done = subprocess.run(
            [sys.executable, "-c", code.format(hard=hard)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        limits[hard] = done.stdout.split()
    assert limits[30] == ["7", "30", "30"]
    assert limits[200] == ["136", "200", "200"]
    assert limits[4000] == ["300", "364", "4000"]


def test_a_connection_outlives_those_of_load_balancers() -> None:
    assert HttpLimits().keep_alive_s > 60
