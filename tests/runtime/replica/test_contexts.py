"""What the front makes of contexts that leave and come back, or do not: every order of events."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coldframe.loader.errors import (
    ColdframeError,
    ContextPoisoned,
    DeviceError,
    DeviceFull,
    NoCheckpoint,
    ReplicaError,
)
from coldframe.runtime.replica.contexts import Contexts
from coldframe.runtime.replica.launch import WorkerProcess

FULL = DeviceFull("the GPU has no room for a context that is to come back")
POISONED = ContextPoisoned("freezing a context failed half-way")
OWN = 7
UUIDS = {"GPU-1": "A GPU"}


class Front:
    """The parts of a front around it, and workers that do what they are told when a test says."""

    def __init__(self, *names: str, why: str | None = None) -> None:
        self.time = 100.0
        self.gone = True
        """Whether the weights have left."""
        self.workers: dict[str, WorkerProcess] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.orders: list[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]] = []
        self.buried: list[str] = []
        self.warned: list[str] = []
        for name in names or ("prefill-0", "decode-1"):
            self.hire(name)
        self.contexts = Contexts(self, lambda: self.time, self.warned.append, why)

    def hire(self, name: str, group: str = "") -> None:
        child = SimpleNamespace(pid=1000 + len(self.workers) + len(self.sent))
        role = name.partition("-")[0]
        worker = SimpleNamespace(name=name, role=role, up=True, group=group, child=child)
        self.workers[name] = cast(WorkerProcess, worker)

    def device_of(self, role: str) -> str:
        return "cuda:0"

    def weights_left(self, role: str) -> bool:
        return self.gone

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        self.sent.append((worker, message))

    def order(
        self, role: str, message: dict[str, Any], done: Callable[[dict[str, Any]], None]
    ) -> None:
        assert self.workers[message["name"]].child.pid == message["pid"]
        self.orders.append((message, done))

    def bury(self, worker: str, why: str) -> None:
        del self.workers[worker]
        self.buried.append(worker)

    # -- what a test does ------------------------------------------------------------------------

    def rest(self, worker: str) -> None:
        """A worker answers the last order to rest."""
        number = [message["number"] for name, message in self.sent if name == worker][-1]
        self.contexts.rested(worker, number, OWN)
        self.contexts.step()

    def answer(self, error: ColdframeError | None = None) -> dict[str, Any]:
        """The memory service answers the oldest order: which one that was."""
        message, done = self.orders.pop(0)
        told = {"bytes": 300, "uuids": UUIDS, "seconds": 0.5}
        if error is not None:
            told = {"bytes": 0, "uuids": {}, "seconds": 0.0}
        done({"name": message["name"], "error": error and error.to_wire(), **told})
        self.contexts.step()
        return message

    def passes(self, seconds: float) -> None:
        self.time += seconds
        self.contexts.step()

    def places(self) -> str:
        return " ".join(self.contexts.places.values())


@pytest.fixture
def front() -> Front:
    return Front()


def away(front: Front) -> None:
    """All of them leave."""
    front.contexts.leave()
    front.contexts.step()
    for worker in front.contexts.places:
        front.rest(worker)
    while front.orders:
        front.answer()
    assert front.contexts.left


def test_there_and_back(front: Front) -> None:
    contexts = front.contexts
    assert (contexts.left, contexts.leaving, contexts.status) == (False, False, None)
    front.gone = False
    contexts.leave()
    contexts.step()
    assert front.sent == []  # the weights first
    front.gone = True
    assert contexts.leaving
    contexts.step()
    assert [name for name, _ in front.sent] == ["prefill-0", "decode-1"]
    front.rest("prefill-0")
    front.rest("decode-1")
    assert front.places() == "leaving ready"
    order = front.answer()
    assert (order["type"], order["own_bytes"]) == ("checkpoint", OWN)
    assert contexts.leaving
    front.answer()
    assert (front.places(), contexts.left, contexts.leaving) == ("away away", True, False)
    assert contexts.told == {"bytes": 600, "seconds": 1.0}
    assert contexts.status == {"away": 2, "of": 2, "bytes": 600, "seconds": 1.0, "why": None}
    contexts.come()
    contexts.come()
    assert not contexts.left
    # Who makes the first token comes first, whatever came when.
    assert [message["name"] for message, _ in front.orders] == ["prefill-0", "decode-1"]
    for _ in range(2):
        order = front.answer()
        assert (order["type"], order["bytes"], order["uuids"]) == ("restore", 300, UUIDS)
    assert front.places() == "here here"
    assert (contexts.wait_s, front.warned, front.buried) == (None, [], [])


def test_of_those_that_may_leave_prefill_is_the_last(front: Front) -> None:
    front.contexts.leave()
    front.contexts.step()
    for worker in ("prefill-0", "decode-1"):
        front.contexts.rested(worker, front.sent[worker == "decode-1"][1]["number"], OWN)
    front.contexts.step()
    assert front.places() == "ready leaving"


def test_a_wake_forgets_what_was_asked_and_its_answer_is_late(front: Front) -> None:
    contexts = front.contexts
    contexts.leave()
    contexts.step()
    contexts.come()
    assert front.places() == "here here"
    front.rest("prefill-0")
    contexts.leave()
    contexts.step()
    number = front.sent[0][1]["number"]
    contexts.rested("prefill-0", number, OWN)  # of the first time
    contexts.step()
    assert front.places() == "asked asked"
    assert front.orders == []
    front.rest("prefill-0")
    assert front.places() == "leaving asked"


def test_who_is_told_to_come_back_while_it_leaves_comes_back_whatever_follows(
    front: Front,
) -> None:
    contexts = front.contexts
    contexts.leave()
    contexts.step()
    front.rest("prefill-0")
    contexts.come()
    contexts.leave()
    front.gone = False
    assert front.answer()["type"] == "checkpoint"
    assert front.places() == "coming here"
    assert front.answer()["type"] == "restore"
    assert front.places() == "here here"
    front.gone = True
    contexts.step()
    assert front.places() == "asked asked"


def test_a_gpu_that_is_full_is_asked_again_and_not_for_ever(front: Front) -> None:
    away(front)
    front.contexts.come()
    front.answer(FULL)
    assert front.places() == "waiting coming"
    front.answer()
    began = front.time
    while not front.buried:
        assert front.contexts.wait_s is not None
        front.passes(front.contexts.wait_s)
        assert front.orders[0][0]["bytes"] == 300
        front.answer(FULL)
    assert 30 < front.time - began < 31
    assert front.buried == ["prefill-0"]
    assert "no room for a context" in front.warned[0]


def test_a_park_behind_a_wake_does_not_leave_anybody_waiting(front: Front) -> None:
    away(front)
    front.contexts.come()
    front.answer(FULL)
    front.contexts.leave()
    front.gone = False  # until all have let go, and it does so only when it is back
    front.passes(1)
    assert [order["type"] for order, _ in front.orders] == ["restore", "restore"]


@pytest.mark.parametrize("error", [POISONED, DeviceError("no"), NoCheckpoint("no")])
def test_who_cannot_come_back_is_replaced(front: Front, error: ColdframeError) -> None:
    away(front)
    front.contexts.come()
    front.answer()
    front.answer(error)
    assert front.buried == ["decode-1"]
    front.hire("decode-2")
    front.contexts.leave()
    front.contexts.step()
    assert front.places() == "asked asked"


def test_who_could_not_leave_is_asked_the_next_time(front: Front) -> None:
    front.contexts.leave()
    front.contexts.step()
    front.rest("prefill-0")
    front.answer(DeviceError("the context cannot leave the GPU"))
    front.passes(5)
    assert front.places() == "here asked"
    assert "a context stays on its device: the context cannot leave" in front.warned[0]
    front.contexts.come()
    front.contexts.leave()
    front.contexts.step()
    assert front.places() == "asked asked"
    assert front.buried == []


def test_where_it_cannot_be_done_nobody_is_asked_again(front: Front) -> None:
    error = NoCheckpoint("the driver has no such call")
    for _ in range(2):
        front.contexts.leave()
        front.contexts.step()
        if not front.contexts.why:
            front.rest("prefill-0")
            front.answer(error)
        assert "asked" not in front.places()
        assert (front.contexts.leaving, front.contexts.left) == (False, False)
        assert front.contexts.status is not None
        assert front.contexts.status["why"] == str(error)
        front.contexts.come()
    assert len(front.warned) == 1
    assert front.buried == []


def test_one_that_is_lost_may_have_been_bad_luck_and_two_are_the_end(front: Front) -> None:
    front.contexts.leave()
    front.contexts.step()
    front.rest("prefill-0")
    front.answer(POISONED)
    assert (front.buried, front.contexts.why) == (["prefill-0"], None)
    front.hire("prefill-2")
    front.rest("decode-1")
    front.answer()
    assert front.places() == "asked away"
    front.rest("prefill-2")
    front.answer(POISONED)
    assert front.buried == ["prefill-0", "prefill-2"]
    assert front.contexts.why == str(POISONED)
    front.hire("prefill-3")
    front.contexts.step()
    assert front.places() == "here away"
    front.contexts.come()
    front.answer()
    front.contexts.leave()
    front.contexts.step()
    assert (front.places(), front.contexts.leaving) == ("here here", False)


def test_what_fails_each_time_is_told_once(front: Front) -> None:
    for _ in range(3):
        front.contexts.leave()
        front.contexts.step()
        front.rest("prefill-0")
        front.answer(DeviceError("the context cannot leave the GPU"))
        assert front.places() == "here asked"
        front.contexts.come()
    assert len(front.warned) == 1


def test_who_dies_while_it_leaves_is_said_to_be_dead_by_its_socket(front: Front) -> None:
    front.contexts.leave()
    front.contexts.step()
    front.rest("prefill-0")
    front.answer(ReplicaError("the process is gone"))
    assert front.places() == "here asked"
    assert (front.warned, front.buried, front.contexts.why) == ([], [], None)


def test_nobody_is_asked_where_they_are_to_stay() -> None:
    front = Front(why="--checkpoint off")
    front.contexts.leave()
    front.contexts.step()
    assert (front.sent, front.contexts.leaving) == ([], False)


def test_who_does_not_let_go_stays(front: Front) -> None:
    front.contexts.leave()
    front.contexts.step()
    front.passes(front.contexts.wait_s or 0)
    assert front.places() == "here here"
    assert not front.contexts.leaving
    assert "does not let go" in front.warned[0]


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_memory_service_that_does_not_answer_costs_the_worker(front: Front, way: str) -> None:
    if way == "back":
        away(front)
        front.contexts.come()
        front.answer()
    else:
        front.contexts.leave()
        front.contexts.step()
        front.rest("decode-1")
        front.rest("prefill-0")
    front.passes(front.contexts.wait_s or 0)  # 60 s, or 30 for who has not answered
    front.passes(60)
    assert front.buried == ["decode-1"]
    assert "did not answer" in str(front.contexts.why)
    front.answer()  # late
    assert front.buried == ["decode-1"]
    assert front.places() == "here"


def test_those_on_trial_are_left_alone(front: Front) -> None:
    front.hire("prefill-9", group="trial")
    away(front)
    assert "prefill-9" not in front.contexts.places


def test_who_comes_while_the_others_are_away_follows_them(front: Front) -> None:
    away(front)
    del front.workers["prefill-0"]
    front.hire("prefill-2")
    assert front.contexts.leaving
    front.contexts.step()
    assert not front.contexts.left
    front.rest("prefill-2")
    front.answer()
    assert front.contexts.left


def test_nobody_is_left_behind_whatever_the_order() -> None:
    """Orders, answers, deaths and errors as they fall; once it is quiet, all is as was wanted."""
    for seed in range(300):
        chance = random.Random(seed)
        front = Front("prefill-0", "decode-1", "decode-2")
        names = 3
        wanted = "here"
        errors = [None, None, None, FULL, POISONED, DeviceError("no"), ReplicaError("gone")]
        for _ in range(40):
            match chance.choice(["leave", "come", "answer", "rested", "die", "time"]):
                case "leave" if wanted == "here":
                    wanted = "away"
                    front.contexts.leave()
                case "come":
                    wanted = "here"
                    front.contexts.come()
                case "answer" if front.orders:
                    front.answer(chance.choice(errors))
                case "rested" if front.sent:
                    name, message = chance.choice(front.sent)
                    front.contexts.rested(name, message["number"], OWN)
                case "die" if chance.random() < 0.2:
                    del front.workers[chance.choice(list(front.workers))]
                case "time":
                    front.time += 0.3
            while len(front.workers) < 3:
                front.hire(f"{chance.choice(['prefill', 'decode'])}-{names}")
                names += 1
            front.contexts.step()
        for _ in range(20):  # quiet: each answers
            for name, message in list(front.sent):
                front.contexts.rested(name, message["number"], OWN)
            front.passes(0.3)
            while front.orders:
                front.answer()
        places = set(front.contexts.places.values())
        if wanted == "here":
            assert places == {"here"}, seed
        elif front.contexts.why is None:
            assert places <= {"away", "here"}, seed
            assert not front.contexts.leaving, seed
        else:
            assert not front.contexts.leaving, seed
        assert front.contexts.wait_s is None, seed
