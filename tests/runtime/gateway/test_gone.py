"""Clients that go away: the work ends with them, and frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from coldframe.runtime.gateway.gone import ClientGone, send_stream, until_gone
from tests.runtime.gateway.raw import (
    PATIENT,
    Served,
    answer,
    read_all,
    read_answer,
    serving,
    status_of,
    until,
    whole_body,
)


class App:
    """`/wait` works for ever, `/quick` at once; `/stream` streams, and `/silent` before a token."""

    def __init__(self) -> None:
        self.working = 0
        self.gone = 0
        self.streaming = 0
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await whole_body(receive)
        path = scope["path"]
        try:
            if path == "/wait":
                await until_gone(receive, self._work())
            elif path == "/quick":
                await answer(send, 200, await until_gone(receive, asyncio.sleep(0, b"done")))
            else:
                headers = [(b"content-type", b"text/event-stream")]
                await send_stream(send, receive, 200, headers, self._tokens(path))
        except ClientGone:
            self.gone += 1

    async def _work(self) -> None:
        self.working += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.working -= 1

    async def _tokens(self, path: str) -> AsyncIterator[bytes]:
        self.streaming += 1
        size = 65536 if path == "/large" else 4
        try:
            if path == "/silent":
                await asyncio.Event().wait()
            for _ in range(3 if path == "/three" else 100_000):
                yield b"x" * size
                self.sent += 1
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)  # whoever frees something may have to wait
            self.streaming -= 1


@pytest.fixture
def app(shared: tuple[Served, App]) -> App:
    app = shared[1]
    app.gone = app.sent = 0
    return app


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Served, App]]:
    app = App()
    with serving(app, replace(PATIENT, write_s=0.4)) as served:
        yield served, app
    assert served.records.bad == []
    assert (app.working, app.streaming) == (0, 0)


@pytest.fixture
def served(shared: tuple[Served, App]) -> Served:
    return shared[0]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def test_work_is_cancelled_when_the_client_goes(served: Served, app: App) -> None:
    sock = served.connect()
    sock.sendall(get("/wait"))
    until(lambda: app.working == 1)
    sock.close()
    until(lambda: app.working == 0 and app.gone == 1)


def test_work_that_is_done_is_answered(served: Served, app: App) -> None:
    sock = served.connect()
    for _ in range(3):
        sock.sendall(get("/quick"))
        assert read_answer(sock).endswith(b"done")
    assert app.gone == 0


def test_a_stream_comes_whole_and_the_connection_goes_on(served: Served, app: App) -> None:
    sock = served.connect()
    sock.sendall(get("/three"))
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        got += sock.recv(1000)
    assert got.count(b"4\r\nxxxx\r\n") == 3
    assert app.gone == 0
    sock.sendall(get("/quick"))
    assert read_answer(sock).endswith(b"done")


@pytest.mark.parametrize("path", ["/silent", "/stream"])
def test_a_stream_ends_when_the_client_goes(served: Served, app: App, path: str) -> None:
    sock = served.connect()
    sock.sendall(get(path))
    assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    sock.close()
    until(lambda: app.gone == 1 and app.streaming == 0)


def test_a_stream_ends_when_the_client_does_not_read(served: Served, app: App) -> None:
    sock = served.connect(receive_buffer=4096)
    sock.sendall(get("/large"))
    until(lambda: app.gone == 1 and app.streaming == 0)
    assert app.sent < 100_000


def test_a_stream_to_http_1_0_ends_with_the_connection(served: Served) -> None:
    sock = served.connect()
    sock.sendall(b"GET /three HTTP/1.0\r\n\r\n")
    got = read_all(sock)
    assert status_of(got) == 200
    assert got.endswith(b"\r\n\r\n" + b"x" * 12)


class Client:
    """ASGI's two ends, without a network."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.got: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(message)
        if not message.get("more_body", True):
            self.left.set()  # as uvicorn does after a whole answer


def test_the_works_own_error_comes_through() -> None:
    async def fails() -> None:
        raise ValueError("mine")

    async def main() -> None:
        await until_gone(Client().receive, fails())

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())


def test_who_cancels_from_outside_is_obeyed() -> None:
    async def main() -> None:
        client = Client()
        task = asyncio.create_task(until_gone(client.receive, asyncio.Event().wait()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.left.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_deadline_inside_is_no_client_that_went() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await until_gone(Client().receive, asyncio.Event().wait())

    asyncio.run(main())


def test_the_task_goes_on_after_a_client_that_went() -> None:
    async def main() -> None:
        client = Client()
        asyncio.get_running_loop().call_later(0.01, client.left.set)
        with pytest.raises(ClientGone):
            await until_gone(client.receive, asyncio.Event().wait())
        await asyncio.sleep(0.01)  # nothing of the cancelling is left
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_stream_that_fails_is_closed_and_the_failure_comes_through() -> None:
    closed = []

    async def tokens() -> AsyncIterator[bytes]:
        try:
            yield b"a"
            raise ValueError("mine")
        finally:
            closed.append(True)

    async def main() -> None:
        client = Client()
        await send_stream(client.send, client.receive, 200, [], tokens())

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())
    assert closed == [True]
