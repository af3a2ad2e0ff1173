from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.traffic.streams import Stamped, read_stream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(text: str = "", finish: str | None = None, **more: object) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n".encode()


EVENTS = [
    event("a"),
    event("\u00e9\r\n"),
    event(),
    event("c"),
    event(finish="length"),
    b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n',
    b"data: [DONE]\n\n",
]


def chunked(parts: list[bytes]) -> bytes:
    frames = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + frames + b"0\r\n\r\n"


def stamped(raw: bytes, cuts: list[int]) -> Stamped:
    """The bytes as they would come in pieces, each at a time that is where it ends."""
    found = Stamped()
    for start, end in pairwise(sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})):
        found.add(float(end), raw[start:end])
    return found


@given(st.lists(st.integers(1, 2000), max_size=12), st.lists(st.integers(1, 400), max_size=8))
def test_each_part_came_with_the_piece_that_its_last_byte_is_in(
    cuts: list[int], chunk_cuts: list[int]
) -> None:
    body = b"".join(EVENTS)
    edges = sorted({0, len(body), *(cut for cut in chunk_cuts if cut < len(body))})
    raw = chunked([body[a:b] for a, b in pairwise(edges)])
    pieces = sorted({len(raw), *(cut for cut in cuts if cut < len(raw))})
    read = read_stream(stamped(raw, cuts))
    assert (read.status, read.error, read.tokens) == (200, None, 4)

    def whole(number: int) -> float:
        """When the first so many events were there, by counting bytes one by one."""
        wanted = sum(map(len, EVENTS[:number]))
        seen = 0
        at = raw.index(b"\r\n\r\n") + 4
        for start, end in pairwise(edges):
            at = raw.index(b"\r\n", at) + 2
            if seen + end - start >= wanted:
                at += wanted - seen
                return float(next(piece for piece in pieces if piece >= at))
            seen += end - start
            at += end - start + 2
        raise AssertionError

    assert read.text_at == [whole(1), whole(2), whole(4)]
    assert read.end_at == whole(5)


def test_an_answer_with_a_length_is_read_too() -> None:
    body = b"".join(EVENTS)
    read = read_stream(stamped(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, []))
    assert (len(read.text_at), read.tokens) == (3, 4)


@given(st.integers(0, len(chunked(EVENTS))))
def test_what_breaks_off_is_read_as_far_as_it_came(length: int) -> None:
    raw = chunked(EVENTS)[:length]
    read = read_stream(stamped(raw, []))
    assert len(read.text_at) == sum(part in raw for part in (EVENTS[0], EVENTS[1], EVENTS[3]))
    assert (read.end_at is None) == (EVENTS[4] not in raw)
    assert (read.status is None) == (b"\r\n\r\n" not in raw)


def test_refusals_and_errors_are_what_they_are() -> None:
    raw = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nlate"
    refused = read_stream(stamped(raw, []))
    assert (refused.status, refused.error, refused.text_at) == (429, "late", [])
    broken = chunked([event("a"), b'data: {"error": {"message": "it died"}}\n\n'])
    read = read_stream(stamped(broken, []))
    assert (read.status, len(read.text_at), read.end_at) == (200, 1, None)
    assert read.error is not None
    assert "it died" in read.error


def test_the_moments_are_those_of_the_pieces() -> None:
    stream = stamped(b"abcdef", [2, 5])
    assert stream.raw == b"abcdef"
    assert stream.moments([1, 2, 3, 6]) == [2, 2, 5, 6]
    with pytest.raises(IndexError):
        stream.moments([7])
