"""Weights that leave the device and come back, with workers, orders and errors in any order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.parked import StayingWeights
from coldframe.loader.errors import ColdframeError, DeviceFull, ReplicaError
from coldframe.loader.memory_service.parking import Parking
from tests.loader.devices.emulator import GRANULARITY, Emulator
from tests.loader.devices.parkinglot import MEMORY, SIZE, STAGES, ParkingLot, TestWorker

ALL = set(range(len(STAGES)))


@pytest.fixture
def lot(emulator: Emulator) -> Iterator[ParkingLot]:
    """With a worker that has everything attached."""
    emulator.memory = MEMORY
    lot = ParkingLot(emulator)
    lot.hire()
    lot.settle()
    yield lot
    lot.close()


def test_they_leave_when_nobody_has_them_and_come_back_to_everybody(lot: ParkingLot) -> None:
    (worker,) = lot.workers
    for _ in range(2):
        lot.parking.park()
        while lot.parking._job is not None:
            lot.turn(wait=True)
        # All is kept. The worker has been told, and has not let go yet.
        assert lot.weights.kept
        assert lot.parking.busy
        assert lot.emulator.used == SIZE
        worker.check()
        lot.settle()
        assert lot.last == "parked"
        assert lot.parking.away
        assert lot.emulator.used == 0
        assert worker.ready == set()
        late = lot.hire()
        assert not late.inbox
        lot.parking.wake()
        lot.settle()
        assert lot.last == "woken"
        assert worker.ready == late.ready == ALL
        worker.check()
        late.check()
        lot.bury(late)
    assert len(lot.told) == 4


def test_stages_are_told_as_they_come(lot: ParkingLot) -> None:
    lot.parking.park()
    lot.settle()
    lot.emulator.hold()
    lot.parking.wake()
    while not lot.workers[0].inbox:
        lot.turn(wait=True)
    # It may map them before a single byte is there.
    lot.let_handle(lot.workers[0])
    assert lot.workers[0].attached
    assert not lot.workers[0].inbox
    assert lot.parking.ready == []
    lot.emulator.go.set()
    while lot.parking._job is not None:
        lot.turn(wait=True)
    assert list(lot.workers[0].inbox) == [0, 1, 2]


def test_what_is_kept_ahead_leaves_at_once(lot: ParkingLot) -> None:
    lot.parking.keep()
    lot.settle()
    assert lot.weights.kept
    assert lot.told == []
    assert lot.workers[0].ready == ALL
    before = lot.emulator.calls["cuMemcpyDtoHAsync"]
    lot.parking.park()
    lot.settle()
    assert lot.last == "parked"
    assert lot.emulator.calls["cuMemcpyDtoHAsync"] == before


def test_an_order_that_is_met_already_is_answered(lot: ParkingLot) -> None:
    lot.parking.wake()
    assert lot.last == "woken"
    lot.parking.park()
    lot.settle()
    lot.parking.park()
    assert [what for what, _ in lot.told] == ["woken", "parked", "parked"]


def test_wanted_again_before_the_worker_let_go(lot: ParkingLot) -> None:
    (worker,) = lot.workers
    lot.parking.park()
    while lot.parking._job is not None:
        lot.turn(wait=True)
    second = lot.hire()
    assert not second.inbox  # it would only have to let go again
    lot.parking.wake()
    assert lot.last == "woken"
    # Nothing is sent to the one before it has answered.
    assert list(worker.inbox) == ["detach"]
    lot.settle()
    assert worker.ready == second.ready == ALL
    assert lot.emulator.calls["cuMemCreate"] == 1


def test_wanted_again_while_they_are_kept(lot: ParkingLot) -> None:
    lot.emulator.hold()
    lot.parking.park()
    lot.parking.wake()
    assert lot.last == "woken"
    lot.settle()
    # Which went on, for the next time.
    assert lot.weights.kept
    assert [what for what, _ in lot.told] == ["woken"]
    assert lot.workers[0].ready == ALL


def test_not_wanted_any_more_while_they_come_back(lot: ParkingLot) -> None:
    lot.parking.park()
    lot.settle()
    lot.emulator.hold()
    lot.parking.wake()
    while not lot.workers[0].inbox:
        lot.turn(wait=True)
    lot.stages.clear()
    lot.parking.park()
    lot.settle()
    assert lot.stages in ([], [0])  # the rest was not waited for
    assert [what for what, _ in lot.told] == ["parked", "parked"]
    assert lot.emulator.used == 0
    assert lot.workers[0].ready == set()
    lot.parking.wake()
    lot.settle()
    assert lot.workers[0].ready == ALL
    lot.workers[0].check()


def test_who_is_dead_has_let_go(lot: ParkingLot) -> None:
    other = lot.hire()
    lot.settle()
    lot.parking.park()
    while lot.parking._job is not None:
        lot.turn(wait=True)
    lot.let_handle(other)
    assert lot.parking.busy
    lot.bury(lot.workers[0])
    lot.settle()
    assert lot.last == "parked"
    assert lot.emulator.used == 0


def test_a_worker_that_turns_out_dead_while_others_are_told(
    lot: ParkingLot, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lot.workers[0], lot.hire()
    lot.settle()
    plain = lot.detach

    def detach(worker: TestWorker) -> None:
        if worker is first:
            lot.bury(worker)
        else:
            plain(worker)

    monkeypatch.setattr(lot, "detach", detach)
    lot.parking.park()
    while lot.parking._job is not None:
        lot.turn(wait=True)
    # Not before the second has let go.
    assert list(second.inbox) == ["detach"]
    assert lot.emulator.used == SIZE
    lot.settle()
    assert lot.last == "parked"


def test_without_host_memory_they_stay(emulator: Emulator) -> None:
    lot = ParkingLot(emulator, available=lambda: 1000)
    worker = lot.hire()
    lot.parking.park()
    lot.settle()
    assert "not parked: there is no host memory" in lot.last
    assert worker.ready == ALL
    worker.check()
    lot.close()


def test_what_cannot_be_kept_ahead_is_not_tried_again_and_again(emulator: Emulator) -> None:
    asked: list[int] = []

    def available() -> int:
        asked.append(0)
        return 0

    lot = ParkingLot(emulator, available=available)
    lot.parking.keep()
    lot.settle()
    assert len(asked) == 1
    assert lot.told == []
    lot.close()


def test_who_lets_go_unasked_is_refused(lot: ParkingLot) -> None:
    with pytest.raises(ReplicaError, match="that it was to keep"):
        lot.parking.detached(lot.workers[0])
    lot.settle()
    assert lot.workers[0].ready == ALL


def test_memory_that_others_have_is_an_error_that_may_pass(lot: ParkingLot) -> None:
    lot.parking.park()
    lot.settle()
    other = DeviceArena(lot.gpu, MEMORY, writable=True)
    other.grow(MEMORY)
    for _ in range(2):
        lot.parking.wake()
        lot.settle()
        assert "not woken: no memory of the GPU can be had" in lot.last
        assert isinstance(lot.told[-1][1], DeviceFull)
        assert lot.parking.away
    other.close()
    lot.parking.wake()
    lot.settle()
    assert lot.last == "woken"
    lot.workers[0].check()


def test_a_copy_that_cannot_be_made_sends_them_away_again(lot: ParkingLot) -> None:
    lot.parking.park()
    lot.settle()
    lot.emulator.fail("cuMemcpyHtoDAsync", 2)
    lot.parking.wake()
    lot.settle()
    assert "not woken" in f"not {lot.told[-2][0]}"
    assert "cuMemcpyHtoDAsync" in str(lot.told[-2][1])
    assert lot.last == "parked"
    assert lot.emulator.used == 0
    lot.parking.wake()
    lot.settle()
    assert lot.last == "woken"
    assert lot.workers[0].ready == ALL
    lot.workers[0].check()


def test_memory_that_cannot_be_given_back_is_filled_again(lot: ParkingLot) -> None:
    lot.parking.keep()
    lot.settle()
    lot.bury(lot.workers[0])
    lot.emulator.fail("cuMemUnmap")
    lot.parking.park()
    lot.settle()
    assert "cannot be unmapped" in str(lot.told[0][1])
    assert lot.last == "woken"
    worker = lot.hire()
    lot.settle()
    assert worker.ready == ALL
    worker.check()


@pytest.mark.parametrize("moment", ["keep", "bring"])
def test_a_device_that_is_lost_is_told_once(lot: ParkingLot, moment: str) -> None:
    if moment == "bring":
        lot.parking.park()
        lot.settle()
    lot.emulator.fail_copy()
    lot.parking.park() if moment == "keep" else lot.parking.wake()
    while lot.parking._job is not None:
        lot.turn(wait=True)
    assert "not lost" in lot.last
    told = len(lot.told)
    lot.parking.wake()
    lot.parking.park()
    lot.turn()
    assert len(lot.told) == told


@pytest.mark.parametrize("moment", ["keep", "bring"])
def test_closed_in_the_middle(lot: ParkingLot, moment: str) -> None:
    if moment == "bring":
        lot.parking.park()
        lot.settle()
    lot.emulator.delay = 0.01
    lot.parking.park() if moment == "keep" else lot.parking.wake()
    told = list(lot.told)
    lot.parking.close()
    lot.turn()
    assert lot.told == told
    lot.weights.close()
    assert not lot.emulator._registered


def test_on_the_cpu_each_order_is_met_at_once(emulator: Emulator) -> None:
    lot = ParkingLot(emulator)
    parking: Parking[TestWorker] = Parking(StayingWeights(3), 3, lot, lot.posted.put)
    lot.parking.close()
    lot.parking = parking
    worker = TestWorker(lot.workers)  # type: ignore[arg-type] - nobody looks at it
    assert parking.came(worker)
    parking.keep()
    parking.park()
    assert lot.last == "parked"
    assert parking.away
    assert parking.came(worker)
    parking.wake()
    assert lot.last == "woken"
    parking.wake()
    assert not worker.inbox
    assert not parking.away
    lot.close()


FAILURES = [
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuMemHostRegister",
    "cuMemCreate",
    "cuEventRecord",
    "cuEventSynchronize",
]


class Lot(RuleBasedStateMachine):
    """Orders, workers, deaths, failures and a rival for the device's memory, in any order.

    Jobs are threads, and when one ends is not the test's to say. So no rule is chosen by that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.emulator = Emulator(MEMORY)
        self.lot = ParkingLot(self.emulator)
        self.rival: DeviceArena | None = None
        self.lost = False

    def teardown(self) -> None:
        lot = self.lot
        self._make_way()
        self.emulator._failures.clear()
        assert self.emulator.is_lost == self.lost
        if not self.lost:
            # Whatever has happened, what is ordered now is done.
            for order, what in ((lot.parking.park, "parked"), (lot.parking.wake, "woken")) * 2:
                lot.settle()
                order()
                lot.settle()
                assert lot.last == what
                assert self.emulator.used == (SIZE if what == "woken" else 0)
            for worker in lot.workers:
                assert worker.ready == ALL
                worker.check()
        lot.close()
        left = self.emulator.left()
        self.emulator.close()
        assert self.lost or left == []

    def _make_way(self) -> None:
        if self.rival is not None:
            self.rival.close()
            self.rival = None

    @rule(order=st.sampled_from(["park", "wake", "keep"]))
    def order(self, order: str) -> None:
        getattr(self.lot.parking, order)()

    @precondition(lambda self: len(self.lot.workers) < 3 and not self.lost)
    @rule()
    def worker_comes(self) -> None:
        self.lot.hire()

    @precondition(lambda self: self.lot.workers and not self.lost)
    @rule(data=st.data(), dies=st.sampled_from([False, False, False, True]))
    def worker_does_something(self, data: st.DataObject, dies: bool) -> None:
        worker = data.draw(st.sampled_from(self.lot.workers))
        if dies:
            self.lot.bury(worker)
        else:
            self.lot.let_handle(worker)

    @rule()
    def loop_turns(self) -> None:
        self.lot.turn()

    @precondition(lambda self: not self.lost)
    @rule()
    def all_happens(self) -> None:
        self.lot.settle()

    @rule()
    def copies_wait(self) -> None:
        self.emulator.hold()

    @rule()
    def copies_go_on(self) -> None:
        self.emulator.go.set()

    @precondition(lambda self: not self.lost)
    @rule(call=st.sampled_from(FAILURES), nth=st.integers(1, 3))
    def fail(self, call: str, nth: int) -> None:
        self.emulator.fail(call, nth, "CUDA_ERROR_NOT_SUPPORTED")

    @precondition(lambda self: not self.lost)
    @rule()
    def rival_comes(self) -> None:
        self._make_way()
        rival = DeviceArena(self.lot.gpu, MEMORY - GRANULARITY, writable=True)
        try:
            rival.grow(rival.size)
        except ColdframeError:
            rival.close()
        else:
            self.rival = rival

    @rule()
    def rival_goes(self) -> None:
        self._make_way()

    @precondition(lambda self: not self.lost)
    @rule(really=st.sampled_from([False] * 9 + [True]))
    def device_is_lost(self, really: bool) -> None:
        if really:
            self.lost = True
            self.emulator.lose()

    @invariant()
    def who_computes_has_the_right_bytes(self) -> None:
        for worker in self.lot.workers:
            worker.check()

    @invariant()
    def memory_is_others_when_they_are_away(self) -> None:
        if self.lot.parking.away and not self.lost:
            rival = 0 if self.rival is None else self.rival.size
            assert self.emulator.used == rival
            assert self.lot.weights.kept


TestLot = Lot.TestCase
TestLot.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.mark.heavy
def test_at_length() -> None:
    run_state_machine_as_test(Lot, settings=settings(max_examples=500, stateful_step_count=50))
