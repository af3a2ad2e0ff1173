from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from coldframe.loader.errors import (
    CheckpointError,
    SourceBusy,
    SourceChanged,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.throttle import Throttle
from coldframe.loader.web.limits import Limits
from tests.loader.web.reader_kit import (
    FAST,
    SHORT,
    nothing_left,
    read_range,
    reader_of,
    write_random,
)
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx

SIZE = 300_000


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_random(tmp_path / "file", SIZE)


@pytest.fixture
def proxy(tmp_path: Path, content: bytes) -> Iterator[FaultProxy]:
    with nothing_left(), nginx(tmp_path) as base, FaultProxy(base) as proxy:
        yield proxy


def ranges(proxy: FaultProxy) -> list[tuple[int, int] | None]:
    return [request.range for request in proxy.log]


def test_open_tells_beginning_size_and_version_in_one_request(
    proxy: FaultProxy, content: bytes
) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 1000)
        assert opening.data == content[:1000]
        assert opening.size == SIZE
        assert opening.version.startswith('"')
        assert reader.open("file").data == content
    assert ranges(proxy) == [(0, 999), (0, 524287)]


def test_an_empty_file(proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with reader_of(proxy.url) as reader:
        assert reader.open("empty").size == 0
        assert reader.read_small("empty", 10) == b""


def test_small_files(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        assert reader.read_small("file", SIZE) == content
        with pytest.raises(CheckpointError, match="too large"):
            reader.read_small("file", SIZE - 1)
        with pytest.raises(SourceNotFound):
            reader.read_small("nothing", 10)
        with pytest.raises(SourceNotFound):
            reader.open("nothing")


def test_small_files_without_a_length(content: bytes, tmp_path: Path) -> None:
    body = b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nTrailer: 1\r\n\r\n"
    chunked = {"content-length": None, "transfer-encoding": "chunked"}
    with FaultProxy("http://unused") as proxy, reader_of(proxy.url) as reader:
        proxy.faults = [Fault(status=200, headers=chunked, body=body)] * 2
        assert reader.read_small("file", 100) == b"hello!"
        with pytest.raises(CheckpointError, match="too large"):
            reader.read_small("file", 5)
        until_closed = Fault(status=200, headers={"content-length": None}, body=b"abc", close=True)
        proxy.faults = [until_closed]
        assert reader.read_small("file", 100) == b"abc"
        proxy.faults = [Fault(status=200, headers=chunked, body=b"zz\r\n")]
        with pytest.raises(SourceProtocol):
            reader.read_small("file", 100)


def test_a_cut_small_file_is_read_again(proxy: FaultProxy, content: bytes) -> None:
    proxy.faults = [Fault(cut_after=10), Fault(reset_after=1000)]
    with reader_of(proxy.url) as reader:
        assert reader.read_small("file", SIZE) == content
        assert reader.counters.retries == 2


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (0, 1), (SIZE - 1, 1), (4095, 70_000)])
def test_ranges_go_into_several_buffers(
    proxy: FaultProxy, content: bytes, offset: int, length: int
) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        assert read_range(reader, opening, offset, length) == content[offset : offset + length]


def test_many_tiny_buffers(proxy: FaultProxy, content: bytes) -> None:
    found = memoryview(bytearray(SIZE))
    cuts = range(0, SIZE + 7, 7)
    parts = [found[a:b] for a, b in pairwise(cuts)]
    parts.insert(5, found[:0])
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        reader.read_into("file", opening.version, SIZE, 0, parts)
    assert found == content


def test_nothing_to_read_asks_nothing(proxy: FaultProxy) -> None:
    with reader_of(proxy.url) as reader:
        reader.read_into("file", "", 10, 5, [])
    assert proxy.log == []


def test_connections_are_kept(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        for start in range(0, SIZE, 30_000):
            assert read_range(reader, opening, start, 30_000) == content[start : start + 30_000]
        with pytest.raises(SourceNotFound):
            reader.open("nothing")  # an answer that is read to its end, too
        reader.open("file", 100)
    assert {request.connection for request in proxy.log} == {0}


def test_a_connection_that_was_closed_while_idle_is_no_failure(
    proxy: FaultProxy, content: bytes
) -> None:
    with reader_of(proxy.url, replace(FAST, patience_s=0.0)) as reader:
        proxy.faults = [Fault(close=True)]
        opening = reader.open("file", 100)
        time.sleep(0.05)
        assert read_range(reader, opening, 0, 100) == content[:100]
        # And one that is closed as the request goes out, which no look beforehand can tell.
        proxy.faults = [Fault(silent=True)]
        assert read_range(reader, opening, 100, 100) == content[100:200]
        assert reader.counters.retries == 0
    assert [request.connection for request in proxy.log] == [0, 1, 1, 2]


def test_a_new_connection_that_is_closed_without_an_answer_is_a_failure(
    proxy: FaultProxy, content: bytes
) -> None:
    with reader_of(proxy.url) as reader:
        proxy.faults = [Fault(silent=True)]
        assert reader.open("file").data == content
        assert reader.counters.retries == 1


FAULTS = {
    "cut": Fault(cut_after=100_000),
    "reset": Fault(reset_after=100_000),
    "stall": Fault(stall_after=100_000),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_only_the_lost_part_is_asked_for_again(
    proxy: FaultProxy, content: bytes, kind: str
) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        proxy.faults = [FAULTS[kind], FAULTS[kind]]
        assert read_range(reader, opening, 1000, 250_000) == content[1000:251_000]
        assert reader.counters.retries == 2
    assert ranges(proxy)[1:] == [(1000, 250_999), (101_000, 250_999), (201_000, 250_999)]
    # All of the one version that was seen first.
    assert all(request.headers["if-match"] == opening.version for request in proxy.log[1:])


def test_refusals_for_a_while_are_waited_out(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        busy = Fault(status=503, body=b"<Error><Code>SlowDown</Code></Error>")
        proxy.faults = [busy, busy, Fault(cut_after=50_000), busy, Fault(status=500)]
        assert read_range(reader, opening, 0, SIZE) == content
        assert reader.counters.retries == 5
    assert ranges(proxy)[-1] == (50_000, SIZE - 1)


def test_retry_after_is_honoured(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        proxy.faults = [Fault(status=503, headers={"Retry-After": "1"})]
        assert read_range(reader, opening, 0, 100) == content[:100]
    assert proxy.log[2].time - proxy.log[1].time >= 1


def test_retry_after_beyond_patience_ends_it_now(proxy: FaultProxy) -> None:
    with reader_of(proxy.url) as reader:
        proxy.faults = [Fault(status=503, headers={"Retry-After": "3600"})]
        with pytest.raises(SourceBusy, match="503"):
            reader.open("file")
    assert len(proxy.log) == 1


def test_a_server_that_stays_busy(proxy: FaultProxy) -> None:
    with reader_of(proxy.url, SHORT) as reader:
        opening = reader.open("file", 100)
        proxy.faults = lambda request: Fault(status=503)
        with pytest.raises(SourceBusy) as caught:
            read_range(reader, opening, 100, 200)
    text = str(caught.value)
    assert f"{proxy.url}/file, bytes 100-299" in text
    assert "status 503" in text
    assert f"{len(proxy.log) - 1} attempts" in text


def test_a_server_that_always_stalls(proxy: FaultProxy) -> None:
    with reader_of(proxy.url, SHORT) as reader:
        opening = reader.open("file", 100)
        proxy.faults = lambda request: Fault(stall_after=0)
        with pytest.raises(SourceUnreachable, match=r"no byte came for 0\.5 s") as caught:
            read_range(reader, opening, 0, 100)
    assert not isinstance(caught.value, SourceBusy)


def test_slow_is_not_dead(proxy: FaultProxy, content: bytes) -> None:
    """Each byte is progress: longer than patience, and never a stall."""
    limits = replace(FAST, patience_s=0.2, stall_s=5.0)
    with reader_of(proxy.url, limits) as reader:
        opening = reader.open("file", 100)
        proxy.faults = [Fault(trickle=(1000, 0.04))]
        assert read_range(reader, opening, 0, 10_000) == content[:10_000]
        # Cut again and again, for longer than patience, but each time a little later.
        proxy.faults = [Fault(cut_after=500, head_delay_s=0.03)] * 15
        assert read_range(reader, opening, 0, 10_000) == content[:10_000]
    assert len(proxy.log) == 18


def test_a_replaced_file(proxy: FaultProxy, tmp_path: Path) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        write_random(tmp_path / "new", SIZE + 1, seed=1)
        (tmp_path / "new").rename(tmp_path / "file")
        with pytest.raises(SourceChanged) as caught:  # nginx sees by the If-Match that it is gone
            read_range(reader, opening, 0, 100)
    assert proxy.log[-1].status == 412
    assert "bytes 0-99" in str(caught.value)


@pytest.mark.parametrize("etag", ['"other"', None, 'W/"other"'])
def test_another_version_from_a_server_that_knows_no_conditions(
    proxy: FaultProxy, etag: str | None
) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        proxy.faults = [Fault(cut_after=10), Fault(headers={"ETag": etag})]
        with pytest.raises(SourceChanged) as caught:
            read_range(reader, opening, 0, 100)
    assert caught.value.expected == opening.version


def test_weak_etags_are_compared_here(proxy: FaultProxy, content: bytes) -> None:
    weak = Fault(headers={"ETag": 'W/"1"'})
    with reader_of(proxy.url) as reader:
        proxy.faults = [weak, weak, Fault(headers={"ETag": 'W/"2"'})]
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 0, 100) == content[:100]
        with pytest.raises(SourceChanged):
            read_range(reader, opening, 0, 100)
    assert all("if-match" not in request.headers for request in proxy.log)


def test_without_an_etag_the_time_of_modification_counts(tmp_path: Path, content: bytes) -> None:
    with (
        nothing_left(),
        nginx(tmp_path, extra="etag off;") as base,
        FaultProxy(base) as proxy,
        reader_of(proxy.url) as reader,
    ):
        opening = reader.open("file", 100)
        assert read_range(reader, opening, 0, 100) == content[:100]
        assert "if-unmodified-since" in proxy.log[-1].headers
        proxy.faults = [Fault(headers={"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"})]
        with pytest.raises(SourceChanged):
            read_range(reader, opening, 0, 100)
        proxy.faults = [Fault(headers={"Last-Modified": None})] * 2
        assert reader.open("file", 100).version == ""
        assert read_range(reader, replace(opening, version=""), 0, 100) == content[:100]


def test_a_file_that_was_cut(proxy: FaultProxy) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        short = Fault(status=416, headers={"Content-Range": "bytes */50", "ETag": opening.version})
        proxy.faults = [short]
        with pytest.raises(SourceChanged, match="cut"):
            read_range(reader, opening, 100, 100)


WRONG: dict[str, dict[str, str | None]] = {
    "another range": {"Content-Range": "bytes 1-100/300000"},
    "a shorter range": {"Content-Range": "bytes 0-50/300000"},
    "another size": {"Content-Range": "bytes 0-99/300001"},
    "no size": {"Content-Range": "bytes 0-99/*"},
    "no range": {"Content-Range": None},
    "several ranges": {"Content-Range": None, "Content-Type": "multipart/byteranges; boundary=x"},
    "a wrong length": {"Content-Length": "50"},
    "chunks": {"Content-Length": None, "Transfer-Encoding": "chunked"},
    "a coding": {"Content-Encoding": "gzip"},
    "two lengths": {"Content-Length": "100, 101"},
}


@pytest.mark.parametrize("kind", WRONG)
def test_answers_that_are_not_what_was_asked_for(proxy: FaultProxy, kind: str) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 200)
        proxy.faults = [Fault(headers=WRONG[kind])]
        with pytest.raises(SourceProtocol) as caught:
            read_range(reader, opening, 0, 100)
        assert f"{proxy.url}/file, bytes 0-99" in str(caught.value)
        # What was left of that answer is not taken for the next one's.
        assert reader.open("file", 200) == opening


def test_the_whole_file_for_a_range(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        proxy.faults = lambda request: Fault(whole=True)
        assert reader.open("file").data == content
        with pytest.raises(SourceProtocol, match="ranges"):
            reader.open("file", 100)
        opening = reader.open("file")
        assert read_range(reader, opening, 0, SIZE) == content
        with pytest.raises(SourceProtocol, match="ranges"):
            read_range(reader, opening, 1, SIZE - 1)
        with pytest.raises(SourceProtocol, match="ranges"):
            read_range(reader, opening, 0, SIZE - 1)


def test_what_is_cut_of_a_whole_file_cannot_be_asked_for(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url) as reader:
        opening = reader.open("file")
        proxy.faults = [Fault(whole=True, cut_after=1000), Fault(whole=True)]
        with pytest.raises(SourceProtocol, match="ranges"):
            read_range(reader, opening, 0, SIZE)


REFUSALS = [
    (401, SourceCredentials),
    (403, SourceDenied),
    (404, SourceNotFound),
    (400, SourceError),
]


@pytest.mark.parametrize(("status", "kind"), REFUSALS)
def test_refusals_for_good_are_not_asked_again(
    proxy: FaultProxy, status: int, kind: type[SourceError]
) -> None:
    with reader_of(f"{proxy.url}?sig=SECRET") as reader:
        opening = reader.open("file", 100)
        proxy.faults = lambda request: Fault(status=status, body=b"SECRET")
        with pytest.raises(kind) as caught:
            read_range(reader, opening, 0, 100)
    assert len(proxy.log) == 2
    assert f"{proxy.url}/file, bytes 0-99" in str(caught.value)
    assert f"{status}" in str(caught.value)
    assert "SECRET" not in f"{caught.value} {caught.value.to_wire()}"


def test_redirects_without_an_end(proxy: FaultProxy) -> None:
    proxy.faults = lambda request: Fault(status=302, headers={"Location": "/file"})
    with reader_of(proxy.url, replace(FAST, redirects=3)) as reader, pytest.raises(SourceProtocol):
        reader.open("file")
    assert len(proxy.log) == 4


def test_what_is_not_http(tmp_path: Path) -> None:
    def script(request: Request) -> Fault:
        return Fault(status=200, headers={"no colon in sight\r\nnothing": "x"})

    with nothing_left(), FaultProxy("http://unused", script) as proxy:
        with reader_of(proxy.url) as reader, pytest.raises(SourceProtocol, match="HTTP"):
            reader.open("file")
        proxy.faults = lambda request: Fault(status=200, headers={"x": "y" * 100_000})
        with reader_of(proxy.url) as reader, pytest.raises(SourceProtocol, match="head"):
            reader.open("file")


def test_identity_is_asked_for(proxy: FaultProxy) -> None:
    with reader_of(proxy.url) as reader:
        reader.open("file")
    assert proxy.log[0].headers["accept-encoding"] == "identity"
    assert proxy.log[0].headers["host"] == proxy.url.removeprefix("http://")


@pytest.mark.heavy
def test_many_threads_with_many_faults(proxy: FaultProxy, content: bytes) -> None:
    counted = iter(range(10**6))
    faults = [
        None,
        Fault(cut_after=5000),
        Fault(status=503),
        Fault(reset_after=100),
        Fault(stall_after=3000),
        None,
        Fault(status=500),
        Fault(cut_after=0),
    ]
    found = memoryview(bytearray(SIZE))
    with reader_of(proxy.url) as reader:
        opening = reader.open("file", 100)
        proxy.faults = lambda request: faults[next(counted) % len(faults)]

        def read(start: int) -> None:
            parts = [found[start : start + 10_000]]
            reader.read_into("file", opening.version, SIZE, start, parts)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(0, SIZE, 10_000)))
    assert found == content


class _Booked(Throttle):
    """Remembers what was booked."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.pieces: list[int] = []

    def book(self, nbytes: int) -> float:
        self.pieces.append(nbytes)
        return super().book(nbytes)


def test_all_that_comes_is_booked_in_small_pieces(proxy: FaultProxy, content: bytes) -> None:
    throttle = _Booked(10e6)
    began = time.monotonic()
    with reader_of(proxy.url, throttle=throttle) as reader:
        opening = reader.open("file", 1000)
        with ThreadPoolExecutor(3) as pool:
            thirds = pool.map(
                lambda start: read_range(reader, opening, start, 100_000), range(0, SIZE, 100_000)
            )
            assert b"".join(thirds) == content
    assert sum(throttle.pieces) == SIZE + 1000  # once each, however they come
    assert max(throttle.pieces) <= 64 << 10
    assert time.monotonic() - began >= 0.9 * SIZE / throttle.rate


def test_cancelling_ends_what_is_waited_for(proxy: FaultProxy) -> None:
    limits = Limits(patience_s=60, stall_s=60, connections=3, first_connections=3)
    errors: list[BaseException] = []
    with reader_of(proxy.url, limits) as reader:
        opening = reader.open("file", 100)
        # Some stall, one waits until it may try again, the others wait for their turn.
        proxy.faults = lambda request: (
            Fault(status=503, headers={"Retry-After": "50"})
            if request.range == (0, 0)
            else Fault(stall_after=0)
        )

        def read(start: int) -> None:
            try:
                read_range(reader, opening, start, 1)
            except SourceError as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(start,)) for start in range(5)]
        for thread in threads:
            thread.start()
        while len(proxy.log) < 3:
            time.sleep(0.01)
        time.sleep(0.05)
        reader.cancel()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        with pytest.raises(SourceError, match="given up"):
            reader.open("file")
    assert len(errors) == 5
    assert all("given up" in str(error) for error in errors)
