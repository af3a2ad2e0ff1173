from __future__ import annotations

import http.client
import io
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.web.head import Garbled, length_of, parse_head
from coldframe.loader.web.parts import Parts


def by_python(raw: bytes) -> Message:
    return http.client.parse_headers(io.BytesIO(raw + b"\r\n\r\n"))


def test_reads_what_pythons_own_client_reads() -> None:
    lines = b'ETag: "a:b"\r\nContent-Length:  12 \r\nX-Empty:\r\nVia: a\r\nVia: b'
    version, status, reason, headers = parse_head(b"HTTP/1.1 206 Partial Content\r\n" + lines)
    assert (version, status, reason) == ("1.1", 206, "Partial Content")
    theirs = by_python(lines)
    assert headers == {
        name.lower(): ", ".join(value.strip() for value in theirs.get_all(name) or [])
        for name in theirs.keys()  # noqa: SIM118 - a Message is no mapping
    }
    assert length_of(headers) == 12
    assert parse_head(b"HTTP/1.0 200")[:3] == ("1.0", 200, "")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 OK",
        b"SSH-2.0-OpenSSH",
        b"\x15\x03\x03\x00\x02\x02\x16",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\n: no name",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded: line",
        b"HTTP/1.1 200 OK\r\nA : b",
    ],
)
def test_refuses_what_two_readers_could_read_differently(head: bytes) -> None:
    with pytest.raises(Garbled):
        parse_head(head)


@given(st.binary(max_size=200))
def test_never_fails_in_another_way(head: bytes) -> None:
    try:
        parse_head(head)
        parse_head(b"HTTP/1.1 200 OK\r\n" + head)
    except Garbled:
        pass


@pytest.mark.parametrize("text", ["", "-1", "1.5", "0x10", "1, 2", "\u0663"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(Garbled):
        length_of({"content-length": text})


def test_lengths() -> None:
    assert length_of({}) is None
    assert length_of({"content-length": "5, 5"}) == 5


@given(
    st.lists(st.integers(0, 50), max_size=20),
    st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1),
)
def test_parts_are_filled_like_one_buffer(sizes: list[int], steps: list[tuple[int, bool]]) -> None:
    buffers = [bytearray(size) for size in sizes]
    parts = Parts([memoryview(buffer) for buffer in buffers])
    content = bytes(index % 251 + 1 for index in range(sum(sizes)))
    turn = 0
    while parts.left:
        most, copied = steps[turn % len(steps)]
        turn += 1
        at = len(content) - parts.left
        if copied:
            parts.put(content[at : at + most])
            continue
        for piece in parts.next(most):
            piece[:] = content[at : at + len(piece)]
            at += len(piece)
        came = at - (len(content) - parts.left)
        assert 0 < came <= most
        parts.advance(came)
    assert b"".join(buffers) == content
    assert parts.next(10) == []
