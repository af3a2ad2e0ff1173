from __future__ import annotations

from email.utils import formatdate
from http.client import HTTPResponse
from io import BytesIO
from typing import Any, cast

import pytest

from coldframe.loader.errors import RequestError
from coldframe.loader.peers.http import (
    Answer,
    ByteRange,
    _date,
    matches,
    parse_range,
    parse_request,
)


def test_a_request_as_curl_sends_it() -> None:
    head = b"GET /v1/plan HTTP/1.1\r\nHost: x:1\r\nUser-Agent: curl/8\r\nAccept:*/*\r\nX: a \t"
    request = parse_request(head)
    assert (request.method, request.target) == ("GET", "/v1/plan")
    assert request.headers == {"host": "x:1", "user-agent": "curl/8", "accept": "*/*", "x": "a"}
    assert request.keep_alive
    assert request.interim


def test_what_keeps_a_connection() -> None:
    assert not parse_request(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: TE, Close").keep_alive
    old = parse_request(b"GET / HTTP/1.0")
    assert not old.keep_alive
    assert not old.interim


def test_a_field_twice_is_a_list() -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nVia: a\r\nVia: b"
    assert parse_request(head).headers["via"] == "a, b"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET /",
        b"GET / HTTP/2.0\r\nHost: x",
        b"GET  / HTTP/1.1\r\nHost: x",
        b"GET http://x/ HTTP/1.1\r\nHost: x",
        b"GET /\x80 HTTP/1.1\r\nHost: x",
        b"G\xe9T / HTTP/1.1\r\nHost: x",
        b"GET / HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon",
        b"GET / HTTP/1.1\r\nHost : x",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\nC: d",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
    ],
)
def test_what_is_no_request(head: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(head)
    assert caught.value.expected


def test_a_token_in_a_broken_head_is_not_quoted() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(b"GET / HTTP/1.1\r\nAuthorization: Bearer sec\x00ret")
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes=0-0", ByteRange(0, 1)),
        ("bytes=2-5", ByteRange(2, 6)),
        ("Bytes=2-5", ByteRange(2, 6)),
        ("bytes=5-", ByteRange(5, 10)),
        ("bytes=5-100", ByteRange(5, 10)),
        ("bytes=-3", ByteRange(7, 10)),
        ("bytes=-30", ByteRange(0, 10)),
        ("bytes=-0", ByteRange(10, 10)),
        ("bytes=10-11", ByteRange(10, 10)),
        ("bytes=99-", ByteRange(10, 10)),
        ("items=0-1", None),
        ("bytes=0-1,3-4", None),
    ],
)
def test_ranges(text: str, expected: ByteRange | None) -> None:
    assert parse_range(text, 10) == expected


@pytest.mark.parametrize("text", ["bytes=", "bytes=-", "bytes=5-2", "bytes=a-b", "bytes=1-2-3"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(RequestError):
        parse_range(text, 10)


def test_entity_tags_are_compared_strongly() -> None:
    assert matches('"a"', '"a"')
    assert matches('"b", "a"', '"a"')
    assert matches("*", '"a"')
    assert not matches('W/"a"', '"a"')
    assert not matches('"ab"', '"a"')


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> BytesIO:
        return BytesIO(self._data)


@pytest.mark.parametrize("keep_alive", [True, False])
def test_an_answer_as_the_standard_library_reads_it(keep_alive: bool) -> None:
    answer = Answer(206, {"ETag": '"x"'}, 3, (memoryview(b"abc"),))
    head = answer.head(keep_alive=keep_alive)
    response = HTTPResponse(cast(Any, _Socket(head + b"abc and what is not its own")))
    response.begin()
    assert (response.status, response.reason) == (206, "Partial Content")
    assert response.getheader("ETag") == '"x"'
    assert response.will_close is not keep_alive
    assert response.read() == b"abc"


@pytest.mark.parametrize("seconds", [0, 951782399, 1795237200, 4102444799])
def test_dates_are_those_of_the_standard_library(seconds: int) -> None:
    assert _date(seconds) == formatdate(seconds, usegmt=True)
