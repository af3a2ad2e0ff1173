"""Bodies: too large, too slow, cut, compressed, or of another type."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from coldframe.runtime.gateway import bodies
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.bodies import BodyBudget, read_body, read_json
from coldframe.runtime.gateway.gone import ClientGone
from coldframe.runtime.gateway.strict_json import parse
from tests.runtime.gateway.raw import Served, answer, error_of, serving, status_of, until

LIMIT = 2 << 20


class Request:
    """What the readers need of a request."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self.scope = scope
        self.receive = receive


class Reader:
    """Answers with the JSON that it read; `/bytes` with the bytes, `/hasty` without patience."""

    def __init__(self) -> None:
        self.budget = BodyBudget(4 << 20)
        self.gone = 0
        self.sizes: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        limits: Any = {"limit": LIMIT, "timeout_s": 30.0, "budget": self.budget}
        if scope["path"] == "/hasty":
            limits |= {"timeout_s": 0.3, "stall_s": 0.15, "rate": 1 << 20}
        try:
            if scope["path"] == "/bytes":
                await answer(send, 200, await read_body(request, **limits))
                return
            value, size = await read_json(request, **limits)
            self.sizes.append(size)
            await answer(send, 200, json.dumps(value).encode(), b"application/json")
        except ApiError as error:
            body = json.dumps(error.to_openai()).encode()
            await answer(send, error.status, body, b"application/json")
        except ClientGone:
            self.gone += 1


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Served, Reader]]:
    reader = Reader()
    with serving(reader) as served:
        yield served, reader
    assert served.records.bad == []


@pytest.fixture
def served(shared: tuple[Served, Reader]) -> Iterator[Served]:
    yield shared[0]
    until(lambda: shared[1].budget.held == 0)


@pytest.fixture
def reader(shared: tuple[Served, Reader]) -> Reader:
    return shared[1]


def post(body: bytes, *headers: str, path: str = "/", length: int | None = None) -> bytes:
    """A request, and the last of its connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Connection: close", *headers]
    if not any("Transfer-Encoding" in line for line in lines):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*parts: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    return post(framed, "Transfer-Encoding: chunked")


JSON = "Content-Type: application/json"


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (JSON,),
        ("Content-Type: application/json; charset=UTF-8",),
        ('Content-Type: Application/JSON;charset="utf-8"',),
        ("Content-Type: application/vnd.api+json",),
        ("Content-Type: application/x-www-form-urlencoded",),
        ("Content-Type: text/plain",),
        (JSON, "Origin: https://page"),
        (JSON, "Content-Encoding: identity"),
    ],
)
def test_json_is_read(served: Served, headers: tuple[str, ...]) -> None:
    got = served.ask(post('{"a": ["\u00e9", 1.5]}'.encode(), *headers))
    assert status_of(got) == 200
    assert json.loads(got.partition(b"\r\n\r\n")[2]) == {"a": ["\u00e9", 1.5]}


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Type: multipart/form-data; boundary=x",),
        ("Content-Type: application/xml",),
        ("Content-Type: nonsense",),
        ("Content-Type: application/json; charset=latin-1",),
        ("Content-Type: text/plain", "Origin: https://page"),
        ("Content-Type: application/x-www-form-urlencoded", "Origin: null"),
        (JSON, "Content-Encoding: gzip"),
        (JSON, "Content-Encoding: br, identity"),
    ],
)
def test_other_types_and_encodings_are_415(served: Served, headers: tuple[str, ...]) -> None:
    got = served.ask(post(b"{}", *headers))
    assert status_of(got) == 415
    error_of(got)


def test_the_size_is_told(served: Served, reader: Reader) -> None:
    served.ask(chunked(b'{"a"', b": 1}"))
    assert reader.sizes[-1] == 8


def test_bytes_are_read_as_they_are(served: Served) -> None:
    assert served.ask(post(b"\xff{", path="/bytes")).endswith(b"\r\n\r\n\xff{")


def test_too_large_is_413_before_it_is_sent(served: Served) -> None:
    got = served.ask(post(b"", JSON, length=LIMIT + 1))
    assert status_of(got) == 413
    assert error_of(got)["code"] == "request_too_large"


def test_too_large_without_saying_so_is_413(served: Served) -> None:
    got = served.ask(chunked(*[b" " * 65536] * 40))
    assert status_of(got) == 413


def test_exactly_the_limit_is_read(served: Served) -> None:
    text = json.dumps("a" * (LIMIT - 2)).encode()
    assert len(text) == LIMIT
    assert status_of(served.ask(post(text, JSON))) == 200


@pytest.mark.parametrize("sent", [b"", b'{"a": '])
def test_half_a_body_is_408(served: Served, sent: bytes) -> None:
    got = served.ask(post(sent, JSON, path="/hasty", length=100))
    assert status_of(got) == 408
    error_of(got)


def test_a_body_that_trickles_is_408(served: Served) -> None:
    sock = served.connect()
    sock.sendall(post(b"", JSON, path="/hasty", length=10_000))
    sock.settimeout(0.02)
    got = b""
    while not got:
        try:
            got = sock.recv(1 << 16)
        except TimeoutError:
            sock.sendall(b" ")
    assert status_of(got) == 408


def test_a_client_that_goes_in_the_middle_ends_quietly(served: Served, reader: Reader) -> None:
    before = reader.gone
    sock = served.connect()
    sock.sendall(post(b'{"a"', JSON, length=100))
    sock.close()
    until(lambda: reader.gone == before + 1)


def test_slow_clients_share_a_budget(served: Served, reader: Reader) -> None:
    part = b" " * (1 << 20)
    slow = [served.connect() for _ in range(4)]
    for sock in slow:
        sock.sendall(post(part, JSON, length=LIMIT))
    until(lambda: reader.budget.held == 4 << 20)
    got = served.ask(post(b"{}", JSON))
    assert status_of(got) == 503
    assert error_of(got)["code"] == "overloaded"
    for sock in slow:
        sock.close()
    until(lambda: reader.budget.held == 0)
    assert status_of(served.ask(post(b"{}", JSON))) == 200


def test_a_large_body_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed in a thread: while that runs, the loop does."""
    raw = json.dumps([{"a": number} for number in range(150_000)]).encode()
    begun, went_on = threading.Event(), threading.Event()

    def held_up(body: bytes) -> Any:
        begun.set()
        assert went_on.wait(30), "the loop stood still"
        return parse(body)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    async def main() -> None:
        reading = asyncio.ensure_future(
            read_json(Request({"headers": []}, receive), limit=8 << 20, timeout_s=60)
        )
        while not begun.is_set():
            await asyncio.sleep(0.001)
        went_on.set()
        value, size = await reading
        assert (len(value), size) == (150_000, len(raw))

    assert len(raw) > 1 << 20
    monkeypatch.setattr(bodies, "parse", held_up)
    asyncio.run(main())
