"""What the front makes of weights that leave and come back, or do not."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, DeviceFull
from coldframe.runtime.replica.resting import Resting, RestingTogether

FULL = DeviceFull("no memory of the GPU can be had", where="cuda:0")


class Front:
    """The parts of a front around it."""

    def __init__(self) -> None:
        self.time = 100.0
        self.sent: list[str] = []
        self.failed: list[ColdframeError] = []
        self.warned: list[str] = []
        self.resting = Resting(
            lambda message: self.sent.append(message["type"]),
            self.failed.append,
            lambda: self.time,
            self.warned.append,
        )

    def hear(self, kind: str, error: ColdframeError | None = None, **more: Any) -> None:
        told = {"type": kind, "error": error and error.to_wire(), "left": True, **more}
        self.resting.heard(kind, {"seconds": 1.5, "note": "in locked memory", **told})


@pytest.fixture
def front() -> Front:
    return Front()


def test_there_and_back(front: Front) -> None:
    resting = front.resting
    resting.wake()  # it has never left
    assert front.sent == []
    resting.park()
    assert not resting.left
    front.hear("parked")
    assert resting.left
    assert resting.told == {"seconds": 1.5, "note": "in locked memory", "why": None}
    resting.wake()
    resting.wake()
    front.hear("woken")
    assert not resting.left
    assert front.sent == ["park", "wake"]
    assert resting.wait_s is None


def test_they_are_leaving_until_something_is_heard_of_it(front: Front) -> None:
    resting = front.resting
    for error in (None, DeviceFull("there is no host memory to park the weights in")):
        resting.park()
        assert resting.leaving
        front.hear("woken")  # of before
        assert resting.leaving
        front.hear("parked", error)
        assert not resting.leaving
        resting.wake()
    resting.park()
    resting.wake()
    assert not resting.leaving


def test_who_leaves_on_the_way_back_has_not_left_before_that_is_said(front: Front) -> None:
    resting = front.resting
    resting.park()
    front.hear("parked")
    resting.wake()
    assert resting.left
    resting.park()
    assert not resting.left
    front.hear("woken")  # of before
    assert not resting.left
    front.hear("parked")
    assert resting.left


def test_they_are_kept_once(front: Front) -> None:
    front.resting.keep()
    front.resting.keep()
    assert front.sent == ["keep"]


def test_on_the_cpu_nothing_leaves(front: Front) -> None:
    front.resting.park()
    front.hear("parked", left=False)
    assert not front.resting.left


def test_weights_that_cannot_leave_stay(front: Front) -> None:
    front.resting.park()
    front.hear("parked", DeviceFull("there is no host memory to park the weights in"))
    assert not front.resting.left
    assert "no host memory" in front.resting.told["why"]
    assert "stay on the device: there is no host memory" in front.warned[0]
    assert front.failed == []


def test_memory_that_others_have_is_asked_for_again_and_again_and_not_for_ever(
    front: Front,
) -> None:
    front.resting.park()
    front.hear("parked")
    front.resting.wake()
    asked = 0
    while not front.failed:
        front.hear("woken", FULL)
        assert front.resting.left
        if front.failed:
            break
        assert front.resting.wait_s is not None
        front.resting.tick()  # not yet
        assert front.sent.count("wake") == 1 + asked
        front.time += front.resting.wait_s
        front.resting.tick()
        asked += 1
        assert front.sent.count("wake") == 1 + asked
    assert 30 < front.time - 100.0 < 31
    assert isinstance(front.failed[0], DeviceFull)


def test_who_rests_again_meanwhile_does_not_ask(front: Front) -> None:
    front.resting.park()
    front.hear("parked")
    front.resting.wake()
    front.hear("woken", FULL)
    front.resting.park()
    assert front.resting.wait_s is None
    front.time += 5
    front.resting.tick()
    assert front.sent == ["park", "wake", "park"]
    front.hear("woken", FULL)  # of before
    assert front.resting.wait_s is None
    assert front.failed == []


def test_weights_that_cannot_be_copied_back_end_the_replica(front: Front) -> None:
    front.resting.park()
    front.hear("parked")
    front.resting.wake()
    front.hear("woken", DeviceError("bytes cannot be copied to the GPU"))
    assert [error.what for error in front.failed] == ["bytes cannot be copied to the GPU"]


def test_on_several_devices_all_leave_and_all_come_back() -> None:
    fronts = [Front(), Front()]
    together = RestingTogether([front.resting for front in fronts])
    one, other = fronts
    together.keep()
    together.park()
    assert together.leaving
    one.hear("parked")
    assert together.leaving
    assert not together.left
    assert together.told == {}
    other.hear("parked", seconds=2.5)
    assert together.left
    assert not together.leaving
    assert together.told == {"seconds": 2.5, "note": "in locked memory", "why": None}
    together.wake()
    one.hear("woken")
    other.hear("woken", FULL)
    # Only the one that has none asks again for memory.
    assert together.wait_s == other.resting.wait_s
    other.time += 1
    together.tick()
    assert one.sent == ["keep", "park", "wake"]
    assert other.sent == ["keep", "park", "wake", "wake"]
    other.hear("woken")
    assert not together.left
    assert together.wait_s is None


def test_weights_that_cannot_leave_one_device_have_not_left() -> None:
    fronts = [Front(), Front()]
    together = RestingTogether([front.resting for front in fronts])
    together.park()
    fronts[0].hear("parked")
    fronts[1].hear("parked", DeviceFull("there is no host memory to park the weights in"))
    assert not together.left
    assert not together.leaving
    assert "no host memory" in together.told["why"]
