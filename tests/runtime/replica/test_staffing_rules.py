"""Who is started, who goes and who stays: staffing over a router, with workers that only count."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions, ScalingOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.headcount import RETRY_S
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.router import Router
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.staffing import Staffing

SHARE = 100
DOWN_S = 5.0


class Client:
    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: ColdframeError) -> None:
        raise error


class House:
    """A replica without processes: the router's transport, and who has the workers."""

    def __init__(self, scale: Scale) -> None:
        self.now = 1000.0
        self.router = Router(self, lambda: self.now)
        self.workers: dict[str, WorkerProcess] = {}
        self.ended: list[str] = []
        self.recorder = Recorder("front")
        self.room = True
        self._names = 0
        self._requests = 0
        options = ReplicaOptions("m", prefill=scale, scaling=ScalingOptions(SHARE, 8, DOWN_S))
        self.staffing = Staffing(self, self.router, self.recorder, options, lambda: self.now)
        for _ in range(scale.least):
            self.come_up(self.start("prefill"))

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        assert worker in self.workers

    def to_memory(self, message: dict[str, Any]) -> None: ...

    def kill(self, worker: str) -> None:
        raise AssertionError("nobody hangs here")

    def start(self, role: str) -> WorkerProcess:
        if not self.room:
            raise PlatformError("no process is left")
        worker = WorkerProcess(f"{role}-{self._names}", role, cast(Any, None), cast(Any, None))
        self._names += 1
        self.workers[worker.name] = worker
        self.router.worker_added(worker.name, role)
        return worker

    def end(self, worker: WorkerProcess, why: str) -> None:
        assert self.router.is_free(worker.name)
        assert worker.up
        self.ended.append(worker.name)
        del self.workers[worker.name]
        self.router.worker_gone(worker.name)

    def come_up(self, worker: WorkerProcess) -> None:
        worker.up = True
        self.router.on_message(worker.name, {"type": "up"})

    def die(self, worker: WorkerProcess) -> None:
        """As the workforce does it."""
        del self.workers[worker.name]
        if not self.staffing.replace(worker):
            self.start(worker.role)
        self.router.worker_gone(worker.name)

    def ask(self, tokens: int) -> str:
        self._requests += 1
        request = f"r{self._requests}"
        params = SamplingParams(max_tokens=1)
        self.router.submit(request, params, Client(), prompt_ids=(1,) * tokens)
        return request

    def answer_all(self) -> None:
        for request in list(self.router._requests):
            self.router.cancel(request)

    def seconds(self, count: float) -> None:
        for _ in range(int(count)):
            self.now += 1
            self.staffing.tick()

    @property
    def staff(self) -> tuple[int, int, int]:
        """How many start, are up, are to go."""
        starting, up, leaving = self.staffing.counts()["prefill"].values()
        return starting, up, leaving


@pytest.fixture
def house() -> House:
    house = House(Scale(1, 3))
    house.staffing.begin()
    return house


def two_up(house: House) -> tuple[WorkerProcess, WorkerProcess]:
    """With a request in each of them."""
    for _ in range(2):
        house.ask(SHARE)
    house.seconds(2)
    first, second = house.workers.values()
    house.come_up(second)
    return first, second


def test_before_the_first_token_nobody_comes() -> None:
    house = House(Scale(1, 3))
    for _ in range(9):
        house.ask(SHARE)
    house.seconds(60)
    assert house.staff == (0, 1, 0)
    # And one worker has it all: there is nobody to wait for.
    assert house.router.work_of("prefill-0") == 9 * SHARE
    house.staffing.begin()
    house.seconds(2)
    assert house.staff == (2, 1, 0)


def test_a_number_that_is_fixed_stays_so() -> None:
    house = House(Scale(2, 2))
    house.staffing.begin()
    for _ in range(9):
        house.ask(SHARE)
    house.seconds(60)
    assert house.staff == (0, 2, 0)
    assert house.recorder.drain() == []


def test_one_goes_only_when_it_has_nothing(house: House) -> None:
    two_up(house)
    house.router.cancel("r1")
    house.ask(1)  # which goes to the first, so that both have something
    house.router.cancel("r2")
    house.ask(1)
    house.seconds(DOWN_S + 1)
    assert house.staff == (0, 1, 1)
    house.seconds(60)
    assert house.staff == (0, 1, 1)
    house.answer_all()
    house.seconds(1)
    assert house.staff == (0, 1, 0)
    assert len(house.ended) == 1


def test_one_that_was_to_go_stays_where_there_is_more_to_do(house: House) -> None:
    first, second = two_up(house)
    house.answer_all()
    house.ask(10)
    house.ask(1)
    house.seconds(DOWN_S + 1)
    assert house.staff == (0, 1, 1)
    for _ in range(2):
        house.ask(SHARE)
    house.seconds(2)
    assert house.staff == (1, 2, 0)  # what is missing beyond it is started
    assert house.ended == []
    assert {first.name, second.name} < set(house.workers)


def test_one_that_was_to_go_takes_the_place_of_the_dead(house: House) -> None:
    first, second = two_up(house)
    house.answer_all()
    house.ask(10)
    house.ask(1)
    house.seconds(DOWN_S + 1)
    leaving = first if house.router.is_leaving(first.name) else second
    other = second if leaving is first else first
    house.die(other)
    assert house.workers == {leaving.name: leaving}
    assert house.staff == (0, 1, 0)
    assert house.router.work_of(leaving.name) == 11


def test_one_that_was_to_go_and_dies_is_not_missed(house: House) -> None:
    first, second = two_up(house)
    house.answer_all()
    house.ask(10)
    house.ask(1)
    house.seconds(DOWN_S + 1)
    leaving = first if house.router.is_leaving(first.name) else second
    house.die(leaving)
    assert house.staff == (0, 1, 0)
    assert sum(house.router.work_of(name) for name in house.workers) == 11


def test_one_that_never_comes_up_is_not_tried_again_at_once(house: House) -> None:
    for _ in range(2):
        house.ask(SHARE)
    house.seconds(2)
    (starting,) = [worker for worker in house.workers.values() if not worker.up]
    house.die(starting)
    assert house.staff == (0, 1, 0)
    house.seconds(RETRY_S - 2)
    assert house.staff == (0, 1, 0)
    house.seconds(4)
    assert house.staff == (1, 1, 0)


def test_the_last_one_is_replaced_whatever_it_dies_of(house: House) -> None:
    (only,) = house.workers.values()
    house.die(only)
    assert house.staff == (1, 0, 0)
    house.die(next(iter(house.workers.values())))
    assert house.staff == (1, 0, 0)


def test_none_goes_that_still_starts(house: House) -> None:
    for _ in range(3):
        house.ask(SHARE)
    house.seconds(2)
    house.answer_all()
    house.seconds(60)
    assert house.staff == (2, 1, 0)
    for worker in list(house.workers.values()):
        house.come_up(worker)
    house.seconds(60)
    assert house.staff == (0, 1, 0)


def test_where_none_can_be_started_the_others_go_on(house: House) -> None:
    house.room = False
    for _ in range(3):
        house.ask(SHARE)
    house.seconds(RETRY_S)
    assert house.staff == (0, 1, 0)
    notes = [span.note or "" for span in house.recorder.drain()]
    assert sum("no process is left" in note for note in notes) == 1
    house.room = True
    house.seconds(RETRY_S)
    assert house.staff == (2, 1, 0)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(0, 2),
    st.lists(
        st.tuples(st.sampled_from(["ask", "answer", "up", "die", "wait"]), st.integers(0, 99)),
        max_size=60,
    ),
)
def test_there_are_never_too_many_or_too_few_and_nothing_is_lost(
    least: int, more: int, events: list[tuple[str, int]]
) -> None:
    house = House(Scale(least, least + more))
    house.staffing.begin()
    deaths = 0
    for kind, number in events:
        workers = list(house.workers.values())
        worker = workers[number % len(workers)]
        if kind == "ask":
            house.ask(1 + 3 * number)
        elif kind == "answer" and house.router.open_requests:
            requests = list(house.router._requests)
            house.router.cancel(requests[number % len(requests)])
        elif kind == "up" and not worker.up:
            house.come_up(worker)
        elif kind == "die" and deaths < 3:  # one more under the same request would end it
            deaths += 1
            house.die(worker)
        house.seconds(1 + number % 4 * (kind == "wait"))
        starting, up, _ = house.staff
        assert least <= starting + up <= least + more
        for found in house.router._requests.values():
            assert found.worker is None or found.worker in house.workers
    for worker in list(house.workers.values()):
        if not worker.up:
            house.come_up(worker)
    # Whatever waits is given out in the end.
    while any(found.worker is None for found in house.router._requests.values()):
        given = [r for r, found in house.router._requests.items() if found.worker is not None]
        assert given
        house.router.cancel(given[0])
    house.answer_all()
    house.seconds(3 * DOWN_S)
    assert house.staff == (0, least, 0)
