"""Second requests for slow ranges. The proxy is slow for one range, nginx is behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.errors import SourceUnreachable
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.ranges import Opening, RangeReader
from tests.loader.web.reader_kit import nothing_left, read_range, reader_of, write_random
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx

SIZE = 400_000
LIMITS = Limits(patience_s=20.0, stall_s=20.0, backoff_s=0.01, hedge_after_s=0.15)
SLOW = (100_000, 199_999)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_random(tmp_path / "file", SIZE)


@pytest.fixture
def proxy(tmp_path: Path, content: bytes) -> Iterator[FaultProxy]:
    with nothing_left(), nginx(tmp_path) as base, FaultProxy(base) as proxy:
        yield proxy


def warmed(reader: RangeReader) -> Opening:
    """With some ranges read: only then it is known how long one takes."""
    opening = reader.open("file", 100)
    for start in range(0, 60_000, 10_000):
        read_range(reader, opening, start, 10_000)
    return opening


def once(proxy: FaultProxy, wanted: tuple[int, int], fault: Fault) -> None:
    seen: list[Request] = []

    def script(request: Request) -> Fault | None:
        if request.range == wanted and not seen:
            seen.append(request)
            return fault
        return None

    proxy.faults = script


@pytest.mark.parametrize(
    "fault", [Fault(stall_after=30_000), Fault(head_delay_s=30.0), Fault(trickle=(500, 0.5))]
)
def test_the_second_request_wins_against_a_slow_one(
    proxy: FaultProxy, content: bytes, fault: Fault
) -> None:
    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        once(proxy, SLOW, fault)
        assert read_range(reader, opening, 100_000, 100_000) == content[100_000:200_000]
        assert reader.counters.hedges == reader.counters.hedges_won == 1
        assert reader.counters.retries == 0
    # What is inside a system call, up to 1 MiB, is not known to have come.
    second = proxy.log[-1]
    assert second.range is not None
    assert second.range[1] == SLOW[1]
    assert second.headers["if-match"] == opening.version


def test_the_loser_never_touches_the_buffer_again(proxy: FaultProxy, content: bytes) -> None:
    buffer = memoryview(bytearray(100_000))
    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        once(proxy, SLOW, Fault(stall_after=30_000, stall_s=2.0))
        reader.read_into("file", opening.version, SIZE, 100_000, [buffer])
        assert reader.counters.hedges_won == 1
        assert buffer == content[100_000:200_000]
        buffer[:] = bytes(100_000)
        time.sleep(2.2)  # meanwhile the first answer goes on, to nobody
        assert buffer == bytes(100_000)


def test_the_first_request_wins_against_a_slower_second(proxy: FaultProxy, content: bytes) -> None:
    requests: list[Request] = []

    def script(request: Request) -> Fault | None:
        if request.range is None or request.range[1] != SLOW[1]:
            return None
        requests.append(request)
        if len(requests) == 1:
            return Fault(stall_after=30_000, stall_s=1.5)
        return Fault(stall_after=1000)

    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        proxy.faults = script
        assert read_range(reader, opening, 100_000, 100_000) == content[100_000:200_000]
        assert reader.counters.hedges == 1
        assert reader.counters.hedges_won == 0
    assert len(requests) == 2


def test_a_second_request_that_fails_harms_nobody(proxy: FaultProxy, content: bytes) -> None:
    requests: list[Request] = []

    def script(request: Request) -> Fault | None:
        if request.range is None or request.range[1] != SLOW[1]:
            return None
        requests.append(request)
        if len(requests) == 1:
            return Fault(stall_after=30_000, stall_s=1.5)
        return Fault(status=403)

    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        proxy.faults = script
        assert read_range(reader, opening, 100_000, 100_000) == content[100_000:200_000]
    assert len(requests) == 2


def test_where_all_are_slow_nothing_is_asked_twice(proxy: FaultProxy) -> None:
    with reader_of(proxy.url, replace(LIMITS, hedge_after_s=0.01, hedge_factor=10.0)) as reader:
        proxy.faults = lambda request: Fault(head_delay_s=0.1)
        opening = warmed(reader)
        read_range(reader, opening, 0, 100_000)
        assert reader.counters.hedges == 0


def test_none_without_hedges(proxy: FaultProxy) -> None:
    with reader_of(proxy.url, replace(LIMITS, hedges=0, stall_s=0.5, patience_s=0.1)) as reader:
        opening = warmed(reader)
        before = threading.active_count()
        proxy.faults = lambda request: Fault(stall_after=0)
        with pytest.raises(SourceUnreachable):
            read_range(reader, opening, 100_000, 100_000)
        assert threading.active_count() <= before + 2  # those of the proxy's connections


def test_not_while_the_server_has_too_much_to_do(proxy: FaultProxy, content: bytes) -> None:
    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        proxy.faults = [Fault(status=503), Fault(stall_after=30_000, stall_s=0.5)]
        assert read_range(reader, opening, 100_000, 100_000) == content[100_000:200_000]
        assert reader.counters.hedges == 0


def test_several_at_once_and_closing_in_the_middle(proxy: FaultProxy) -> None:
    """Threads and connections of second requests that nobody waits for any more end, too."""
    failed = []
    with reader_of(proxy.url, LIMITS) as reader:
        opening = warmed(reader)
        proxy.faults = lambda request: Fault(stall_after=10)

        def read(start: int) -> None:
            try:
                read_range(reader, opening, start, 50_000)
            except Exception as error:  # noqa: BLE001 - looked at below
                failed.append(error)

        threads = [threading.Thread(target=read, args=(n * 50_000,)) for n in range(4)]
        for thread in threads:
            thread.start()
        while reader.counters.hedges < 2:
            time.sleep(0.01)
        reader.cancel()
        for thread in threads:
            thread.join()
        assert reader.counters.hedges == LIMITS.hedges
    assert ["given up" in str(error) for error in failed] == [True] * 4
