"""The line before the workers: in order, bounded, and left without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.api import ApiError, Generation, Piece
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.waiting import Hall, Limits, Line

LOADING = LoadState("starting", "weights", 100, 1100, 2.0)
READY = LoadState("ready", None, 1100, 1100, 2.0)


class Front:
    """What a line speaks to, written down."""

    def __init__(
        self,
        limits: Limits,
        state: LoadState = READY,
        *,
        hall: Hall | None = None,
        model: str = "m",
    ) -> None:
        self.state = state
        self.sent: list[dict[str, Any]] = []
        self.metrics = Metrics()
        self.hall = hall or Hall(1000)
        send, metrics = self.sent.append, self.metrics
        self.line = Line(model, limits, self.hall, send, metrics, lambda: self.state)
        self.line.open_gate()

    def enter(self, sequences: int = 1, size: int = 10, name: str = "p") -> Any:
        made = [Generation(name, SamplingParams()) for _ in range(sequences)]
        return self.line.enter(made, size)

    def token(self, number: int, text: str, finish: str | None = None) -> None:
        def piece(choice: int, _: Any) -> Piece:
            return Piece(choice, 7, text, finish, 3)

        self.line.token(number, [], piece)

    @property
    def submitted(self) -> list[int]:
        return [m["id"] for m in self.sent if m["type"] == "submit"]

    @property
    def cancelled(self) -> list[int]:
        return [m["id"] for m in self.sent if m["type"] == "cancel"]


def limits(running: int = 2, waiting: int = 3, wait_s: float = 60.0) -> Limits:
    return Limits(running, waiting, wait_s)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))  # type: ignore[arg-type]


async def collect(stream: Any) -> list[str]:
    return [piece.text async for piece in stream]


def test_first_come_first_served() -> None:
    async def test() -> None:
        front = Front(limits())
        streams = [front.enter() for _ in range(4)]
        assert front.submitted == [1, 2]
        front.token(2, "b", "stop")
        front.token(1, "a", "stop")
        assert front.submitted == [1, 2, 3, 4]
        front.token(3, "c", "stop")
        front.token(4, "d", "length")
        assert [await collect(stream) for stream in streams] == [["a"], ["b"], ["c"], ["d"]]
        assert (front.line.running, front.line.waiting) == (0, 0)

    run(test)


def test_nothing_goes_before_the_model_is_known() -> None:
    async def test() -> None:
        front = Front(limits())
        send = front.sent.append
        line = Line("m", limits(), front.hall, send, front.metrics, lambda: LOADING)
        line.enter([Generation((1, 2), SamplingParams())], 1)
        assert not front.sent
        line.open_gate()
        (message,) = front.sent
        assert message["prompt"] is None
        assert message["prompt_ids"] == (1, 2)

    run(test)


def test_one_request_of_several_sequences() -> None:
    async def test() -> None:
        front = Front(limits(running=1))
        stream = front.enter(2)
        front.token(1, "a")
        front.token(1, "b", "stop")
        front.token(2, "c", "stop")
        assert [(piece.choice, piece.text) async for piece in stream] == [
            (0, "a"),
            (0, "b"),
            (1, "c"),
        ]

    run(test)


def test_who_goes_frees_the_place_and_the_worker() -> None:
    async def test() -> None:
        front = Front(limits(running=1))
        first, second, third = (front.enter() for _ in range(3))
        second.cancel()
        assert front.cancelled == []  # no worker had it
        first.cancel()
        assert front.cancelled == [1]
        assert front.submitted == [1, 3]
        front.token(1, "late")  # nobody's any more
        front.token(3, "x", "stop")
        assert await collect(third) == ["x"]
        first.cancel()
        assert front.cancelled == [1]

    run(test)


def test_who_waits_for_pieces_of_what_was_cancelled_waits_no_more() -> None:
    async def test() -> None:
        front = Front(limits())
        stream = front.enter()
        waiting = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        stream.cancel()
        assert await waiting == []

    run(test)


def test_leaving_the_iteration_cancels() -> None:
    async def test() -> None:
        front = Front(limits())
        pieces = front.enter().__aiter__()
        front.token(1, "a")
        assert (await anext(pieces)).text == "a"
        await pieces.aclose()
        assert front.cancelled == [1]

    run(test)


def test_full_while_cold_says_when_from_the_measured_rate() -> None:
    async def test() -> None:
        front = Front(limits(), LOADING)
        for _ in range(5):
            front.enter()
        with pytest.raises(ApiError) as caught:
            front.enter()
        error = caught.value
        assert (error.status, error.code) == (503, "queue_full")
        assert error.retry_after_s == pytest.approx(1000 / (100 / 2.0))
        assert error.more["eta_s"] == pytest.approx(20.0)
        assert error.more["progress"] == pytest.approx(100 / 1100)
        assert error.more["stage"] == "weights"

    run(test)


def test_full_once_warm_is_saturation() -> None:
    async def test() -> None:
        front = Front(limits())
        for _ in range(5):
            front.enter()
        with pytest.raises(ApiError) as caught:
            front.enter()
        assert (caught.value.status, caught.value.code) == (429, "saturated")
        assert caught.value.retry_after_s is not None
        front.token(1, "x", "stop")
        front.enter()

    run(test)


def test_bytes_count_too() -> None:
    async def test() -> None:
        front = Front(limits(), hall=Hall(100))
        stream = front.enter(size=90)
        with pytest.raises(ApiError):
            front.enter(size=20)
        stream.cancel()
        front.enter(size=20)

    run(test)


def test_memory_is_one_for_all_lines_and_places_are_not() -> None:
    async def test() -> None:
        hall = Hall(100)
        here, there = (Front(limits(), hall=hall, model=name) for name in ("a", "b"))
        streams = [here.enter(size=18) for _ in range(5)]
        with pytest.raises(ApiError, match="all places are taken"):
            here.enter(size=1)
        stream = there.enter(size=10)  # it has places of its own
        with pytest.raises(ApiError, match="all places are taken"):
            there.enter(size=1)  # but there is no memory left
        streams.pop().cancel()
        there.enter(size=18).cancel()
        stream.cancel()
        ids = [*here.submitted, *there.submitted]
        assert len(set(ids)) == len(ids)
        assert {m["model"] for m in here.sent if m["type"] == "submit"} == {"a"}
        assert {m["model"] for m in there.sent if m["type"] == "submit"} == {"b"}

    run(test)


def test_more_than_there_will_ever_be_room_for() -> None:
    async def test() -> None:
        front = Front(limits())
        with pytest.raises(ApiError) as caught:
            front.enter(6)
        assert (caught.value.status, caught.value.param) == (400, "n")

    run(test)


@pytest.mark.parametrize("state", [LOADING, READY])
def test_a_deadline_ends_the_wait(state: LoadState) -> None:
    async def test() -> None:
        front = Front(limits(running=1, wait_s=0.05), state)
        first, second = front.enter(), front.enter()
        front.token(1, "in time")
        with pytest.raises(ApiError) as caught:
            await collect(second)
        assert (caught.value.status, caught.value.code) == (503, "deadline")
        assert front.line.waiting == 0
        front.token(1, "", "stop")
        assert await collect(first) == ["in time", ""]

    run(test)


def test_a_failure_reaches_the_client_behind_what_it_has() -> None:
    async def test() -> None:
        front = Front(limits())
        stream = front.enter(2)
        front.token(1, "a")
        front.line.failed(2, ApiError(400, "no"))
        pieces = stream.__aiter__()
        assert (await anext(pieces)).text == "a"
        with pytest.raises(ApiError, match="no"):
            await anext(pieces)
        assert front.cancelled == [1]

    run(test)


def test_the_end_of_the_replica_is_everybodys() -> None:
    async def test() -> None:
        front = Front(limits(running=1))
        streams = [front.enter() for _ in range(3)]
        front.line.fail_all(ApiError(503, "gone"))
        for stream in streams:
            with pytest.raises(ApiError, match="gone"):
                await collect(stream)

    run(test)


def test_timing() -> None:
    async def test() -> None:
        front = Front(limits())
        stream = front.enter()
        await asyncio.sleep(0.01)
        front.token(1, "a", "stop")
        timing = stream.timing()
        assert 0 <= timing["queue"] <= timing["first_token"] <= timing["total"]
        assert timing["first_token"] >= 0.01

    run(test)


EVENTS = st.tuples(
    st.sampled_from(["enter", "finish", "cancel", "fail"]), st.integers(0, 9), st.sampled_from("ab")
)


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS))
def test_whatever_happens_nothing_is_lost(events: list[tuple[str, int, str]]) -> None:
    async def test() -> None:
        hall = Hall(100)
        lines = {name: Front(limits(2, 4), hall=hall, model=name) for name in "ab"}
        opened: dict[str, dict[int, Any]] = {name: {} for name in lines}
        numbers: dict[str, list[int]] = {name: [] for name in lines}
        entered = 0
        for event, which, name in events:
            front, streams = lines[name], opened[name]
            held = sum(map(len, opened.values()))
            if event == "enter":
                if len(streams) == 6 or held == 10:  # of 10 bytes each
                    with pytest.raises(ApiError, match="all places are taken"):
                        front.enter()
                else:
                    entered += 1
                    streams[entered] = front.enter(name=str(entered))
                    numbers[name].append(entered)
            elif streams:
                number = sorted(streams)[which % len(streams)]
                if event == "cancel":
                    streams.pop(number).cancel()
                elif number in front.submitted:
                    stream, line = streams.pop(number), hall.line_of(number)
                    assert line is front.line
                    if event == "finish":
                        front.token(number, "x", "stop")
                        assert await collect(stream) == ["x"]
                    else:
                        front.line.failed(number, ApiError(500, "failed"))
                        with pytest.raises(ApiError):
                            await collect(stream)
            running = [n for n in streams if n in front.submitted]
            assert len(running) == front.line.running == min(2, len(streams))
            assert front.line.waiting == len(streams) - len(running)
        for name, front in lines.items():
            assert front.submitted == sorted(front.submitted)
            assert set(front.submitted) <= set(numbers[name])
            for number in numbers[name]:
                there = front.line if number in opened[name] else None
                assert hall.line_of(number) is there
            for stream in opened[name].values():
                stream.cancel()
        assert (hall.fits(100), hall.fits(101)) == (True, False)

    run(test)
