"""Who decodes where there is a vLLM engine beside native workers: rules over a real router."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.bridge import AGAIN_S, Bridge
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.router import SILENCE_S, VLLM_ACK_S, Router
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.staffing import Staffing
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.runtime.worker.handoff import Handoff, Job

PROMPT = (1, 2, 3)


class Client:
    def __init__(self) -> None:
        self.indices: list[int] = []
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.indices.append(event.index)

    def on_error(self, error: ColdframeError) -> None:
        self.error = error


class House:
    """A replica without processes: the router's transport, and who has the workers."""

    def __init__(self, *, move: bool = False, alone: bool = False, natives: int = 1) -> None:
        self.now = 1000.0
        self.router = Router(self, lambda: self.now)
        self.workers: dict[str, WorkerProcess] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.warnings: list[str] = []
        self.killed: list[str] = []
        self.recorder = Recorder("front")
        self.room = True
        self._names = self._asked = 0
        options = ReplicaOptions(
            "m",
            decode=Scale(0, 0) if alone else Scale(natives, natives + 1),
            vllm=VllmOptions(alone=alone, move=move),
        )
        clock = lambda: self.now  # noqa: E731
        self.bridge = Bridge(self, self.router, self.recorder, options, self.warnings.append, clock)
        self.staffing = Staffing(
            self, self.router, self.recorder, options, clock, self.bridge.stands_in_for
        )
        self.staffing.begin()
        self.come_up(self.start("prefill"))
        for _ in range(0 if alone else natives):
            self.come_up(self.start("decode"))

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        assert worker in self.workers
        self.sent.append((worker, message))

    def to_memory(self, message: dict[str, Any]) -> None: ...

    def kill(self, worker: str) -> None:
        self.killed.append(worker)

    def start(self, role: str) -> WorkerProcess:
        if not self.room:
            raise PlatformError("no process is left")
        worker = WorkerProcess(f"{role}-{self._names}", role, cast(Any, None), cast(Any, None))
        self._names += 1
        self.workers[worker.name] = worker
        engine = "vllm" if role == "vllm" else "native"
        self.router.worker_added(
            worker.name, "decode" if role == "vllm" else role, "", "cpu", engine
        )
        return worker

    def end(self, worker: WorkerProcess, why: str) -> None:
        assert self.router.is_free(worker.name) or not worker.up
        del self.workers[worker.name]
        self.router.worker_gone(worker.name)

    def come_up(self, worker: WorkerProcess, context: int | None = None) -> None:
        worker.up = True
        known = {} if context is None else {"context": context}
        self.router.on_message(worker.name, {"type": "up", **known})
        self.bridge.is_up(worker)

    def die(self, worker: WorkerProcess) -> None:
        """As the workforce does it."""
        del self.workers[worker.name]
        if not self.bridge.died(worker, "killed") and not self.staffing.replace(worker):
            self.start(worker.role)
        self.router.worker_gone(worker.name)

    def seconds(self, count: float) -> None:
        for _ in range(int(count)):
            self.now += 1
            self.staffing.tick()
            self.bridge.tick(calm=True)

    def of(self, role: str) -> list[WorkerProcess]:
        return [worker for worker in self.workers.values() if worker.role == role]

    def engine(self, context: int | None = None) -> WorkerProcess:
        """One that is up."""
        self.seconds(1)
        (worker,) = self.of("vllm")
        self.come_up(worker, context)
        return worker

    def ask(self, count: int = 100, **params: Any) -> tuple[str, Client]:
        self._asked += 1
        client, request = Client(), f"r{self._asked}"
        self.router.submit(
            request, SamplingParams(max_tokens=count, **params), client, prompt_ids=PROMPT
        )
        return request, client

    def prefilled(self, **params: Any) -> tuple[str, Client]:
        """One that has its first token, and is handed over."""
        request, client = self.ask(**params)
        (worker,) = self.of("prefill")
        self.token(worker.name, request, 0)
        self.hand_over(worker.name, request)
        return request, client

    def job(self, request: str) -> Job:
        return self.router._requests[request].job

    def holder(self, request: str) -> str:
        return str(self.router._requests[request].worker)

    def token(self, worker: str, request: str, index: int) -> None:
        attempt = self.job(request).attempt
        item = [request, attempt, index, 7, "x", None, None, [], len(PROMPT), [], 0]
        self.router.on_message(worker, {"type": "tokens", "items": [item]})

    def hand_over(self, worker: str, request: str) -> None:
        generated = tuple(self.router._requests[request].generated)
        job = replace(self.job(request), prompt_ids=PROMPT, generated_ids=generated)
        kv_tokens = len(PROMPT) + len(generated) - 1
        handoff = Handoff(job, "f", "k", (0,), kv_tokens, "cpu")
        self.router.on_message(worker, {"type": "handoff", "handoff": handoff.to_wire()})

    def acknowledge(self, request: str) -> None:
        body = {"type": "ack", "request": request, "attempt": self.job(request).attempt}
        self.router.on_message(self.holder(request), body)

    def notes(self) -> list[str]:
        return [span.name for span in self.recorder.drain()]


def test_it_is_started_behind_the_first_token_and_natives_decode_until_it_is_up() -> None:
    house = House()
    house.bridge.tick(calm=False)
    assert house.of("vllm") == []
    house.seconds(1)
    (engine,) = house.of("vllm")
    house.seconds(30)
    assert house.of("vllm") == [engine]
    early, _ = house.prefilled()
    assert house.holder(early).startswith("decode")
    house.acknowledge(early)
    house.come_up(engine)
    late, _ = house.prefilled()
    assert house.holder(late) == engine.name
    assert house.holder(early).startswith("decode")  # it stays
    house.seconds(100)
    assert len(house.of("decode")) == 1
    house.router.cancel(early)
    house.seconds(2)
    assert house.of("decode") == []  # nor are others started, whatever there is to decode
    assert "takeover" in house.notes()


def test_a_native_worker_that_starts_comes_before_an_engine_that_does() -> None:
    house = House()
    (native,) = house.of("decode")
    house.seconds(1)
    request, _ = house.prefilled()
    assert house.holder(request) == native.name
    house.die(native)
    assert house.holder(request).startswith("decode")
    (successor,) = house.of("decode")
    assert not successor.up


def test_what_is_under_way_is_told_to_move_and_goes_on_elsewhere() -> None:
    house = House(move=True)
    (native,) = house.of("decode")
    moves, client = house.prefilled()
    house.acknowledge(moves)
    not_taken_yet, _ = house.prefilled()
    engine = house.engine()
    told = [m for w, m in house.sent if w == native.name and m["type"] == "move"]
    assert [message["request"] for message in told] == [moves]
    assert house.holder(not_taken_yet) == native.name
    house.token(native.name, moves, 1)
    house.hand_over(native.name, moves)
    assert house.holder(moves) == engine.name
    house.token(native.name, moves, 2)  # late words of the old one
    house.token(engine.name, moves, 2)
    assert client.indices == [0, 1, 2]
    house.acknowledge(moves)
    assert (native.name, {"type": "ack", "request": moves}) in house.sent


def test_when_it_dies_native_workers_are_back_and_it_is_tried_ever_later() -> None:
    house = House(natives=2)
    engine = house.engine()
    house.seconds(3)
    assert house.of("decode") == []
    request, client = house.prefilled()
    house.acknowledge(request)
    for index in (1, 2, 3):
        house.token(engine.name, request, index)
    house.die(engine)
    assert len(house.of("decode")) == 2
    assert house.holder(request).startswith("decode")
    # What the engine has made since is in no block that others reach.
    handoff = house.router._requests[request].handoff
    assert handoff is not None
    assert (handoff.kv_tokens, len(handoff.job.generated_ids)) == (len(PROMPT), 4)
    assert client.error is None
    assert "killed" in house.warnings[0]
    waits = []
    for _ in range(4):
        waited = 0
        while not house.of("vllm"):
            house.seconds(1)
            waited += 1
        waits.append(waited)
        house.die(house.of("vllm")[0])
    assert waits == [AGAIN_S * 2**n for n in range(4)]
    assert house.bridge.counts == {"takeover": 1, "died": 1, "failed_start": 4}


def test_a_native_worker_that_was_to_go_stays_when_it_dies() -> None:
    house = House()
    (native,) = house.of("decode")
    request, _ = house.prefilled()
    house.acknowledge(request)
    engine = house.engine()
    assert house.router.is_leaving(native.name)
    house.die(engine)
    assert house.of("decode") == [native]
    assert not house.router.is_leaving(native.name)


def test_a_native_worker_that_dies_while_it_leaves_is_not_replaced() -> None:
    house = House()
    (native,) = house.of("decode")
    request, _ = house.prefilled()
    house.acknowledge(request)
    engine = house.engine()
    house.die(native)
    assert house.of("decode") == []
    assert house.holder(request) == engine.name


def test_one_that_cannot_be_started_is_none() -> None:
    house = House()
    house.room = False
    house.seconds(1)
    assert "no process is left" in house.warnings[0]
    assert house.bridge.why is not None
    assert house.bridge.counts == {"failed_start": 1}
    house.room = True
    house.seconds(AGAIN_S)
    assert len(house.of("vllm")) == 1


def test_alone_it_is_a_worker_like_any_other() -> None:
    house = House(alone=True)
    house.seconds(5)
    assert house.of("vllm") == []  # whoever starts the replica has started it
    engine = house.start("vllm")
    request, _ = house.prefilled()
    assert house.holder(request) == engine.name  # it waits there
    house.come_up(engine)
    house.die(engine)
    (successor,) = house.of("vllm")
    assert house.holder(request) == successor.name


def test_what_only_vllm_serves_goes_there_with_its_prefill_and_waits_for_it() -> None:
    house = House()
    request, _ = house.ask(structured=Structure("json_object"))
    assert house.holder(request) == "None"
    engine = house.engine()
    assert house.holder(request) == engine.name
    assert house.sent[-1][1]["type"] == "job"
    house.acknowledge(request)
    house.token(engine.name, request, 0)
    house.die(engine)
    assert house.holder(request) == "None"
    house.seconds(AGAIN_S)
    (successor,) = house.of("vllm")
    assert house.holder(request) == successor.name
    assert house.job(request).generated_ids == (7,)


@pytest.mark.parametrize("acked", [True, False])
def test_it_may_be_silent_for_as_long_as_a_prompt_takes(acked: bool) -> None:
    house = House()
    engine = house.engine()
    request, _ = house.prefilled()
    if acked:
        house.acknowledge(request)
    house.now += (SILENCE_S["vllm"] if acked else VLLM_ACK_S) - 1
    house.router.tick()
    assert house.killed == []
    house.now += 2
    house.router.tick()
    assert house.killed == [engine.name]


def test_what_vllm_has_no_room_for_stays_with_native_workers() -> None:
    house = House(move=True)
    (native,) = house.of("decode")
    long, _ = house.prefilled(count=100)
    short, _ = house.prefilled(count=50)
    for request in (long, short):
        house.acknowledge(request)
    engine = house.engine(context=len(PROMPT) + 99)
    told = [m["request"] for _, m in house.sent if m["type"] == "move"]
    assert told == [short]
    assert house.router.is_leaving(native.name)
    late, _ = house.prefilled(count=100)
    fits, _ = house.prefilled(count=99)
    assert house.holder(late) == native.name  # it is to go, and stays for that
    assert house.holder(fits) == engine.name
    for request in (long, short, late):
        house.router.cancel(request)
    house.seconds(2)
    assert house.of("decode") == []
    another, client = house.prefilled(count=100)
    beside, _ = house.prefilled(count=99)
    assert house.holder(another) == "None"
    assert house.holder(beside) == engine.name  # it does not stand behind the long one
    house.seconds(2)
    (native,) = house.of("decode")
    assert house.holder(another) == native.name
    house.come_up(native)
    house.seconds(2)
    assert house.router.is_leaving(native.name)
    assert house.of("decode") == [native]
    house.acknowledge(another)
    house.token(native.name, another, 1)
    assert client.indices == [0, 1]
    house.router.cancel(another)
    house.seconds(2)
    assert house.of("decode") == []


def test_alone_it_says_to_prefill_how_long_a_request_may_be() -> None:
    house = House(alone=True)
    engine = house.start("vllm")
    house.come_up(engine, context=64)
    request, _ = house.ask()
    assert house.sent[-1][1]["context"] == 64
    house.token("prefill-0", request, 0)
    house.hand_over("prefill-0", request)
    assert house.holder(request) == engine.name  # there is nobody else, and it ends it earlier


def test_who_waits_for_what_does_not_start_is_told_and_has_it_tried_at_once_before() -> None:
    house = House()
    house.seconds(1)
    request, client = house.ask(structured=Structure("json_object"))
    (first,) = house.of("vllm")
    assert house.holder(request) == first.name
    house.die(first)
    assert client.error is None
    house.bridge.tick(calm=True)  # not in so many seconds, since somebody waits
    (second,) = house.of("vllm")
    _, told = house.ask(structured=Structure("json_object"))
    house.die(second)
    assert (client.error, told.error) == (None, None)  # what never was up has not died of them
    house.bridge.tick(calm=False)
    assert house.of("vllm") == []
    for refused in (client.error, told.error):
        assert isinstance(refused, ReplicaError)
        assert "killed" in str(refused)
        assert refused.retry_after_s == 2 * AGAIN_S  # when it is tried again
    _, later = house.ask(structured=Structure("json_object"))
    house.bridge.tick(calm=True)
    assert later.error is not None
    native, served = house.prefilled()
    assert house.holder(native).startswith("decode")
    assert served.error is None
    house.seconds(2 * AGAIN_S)
    (third,) = house.of("vllm")
    house.come_up(third)
    again, _ = house.ask(structured=Structure("json_object"))
    assert house.holder(again) == third.name


def test_what_an_engine_dies_of_twice_is_given_up() -> None:
    house = House()
    request, client = house.ask(structured=Structure("json_object"))
    for _ in range(2):
        assert client.error is None
        engine = house.engine()
        assert house.holder(request) == engine.name
        house.die(engine)
    assert "die under this request" in str(client.error)


def test_what_only_vllm_serves_calls_for_no_native_workers() -> None:
    house = House()
    for _ in range(5):
        house.ask(structured=Structure("json_object"))
    assert house.router.load("decode") == 0
    assert house.router.load("prefill") == 0


def test_one_that_is_not_up_does_not_outlive_the_rest() -> None:
    house = House()
    house.seconds(1)
    assert len(house.of("vllm")) == 1
    house.bridge.rest()
    assert house.of("vllm") == []
    house.bridge.tick(calm=False)
    assert house.of("vllm") == []
    engine = house.engine()
    house.bridge.rest()
    assert house.of("vllm") == [engine]  # that one serves


def test_a_native_worker_that_comes_up_behind_the_engine_goes() -> None:
    house = House()
    late = WorkerProcess("decode-late", "decode", cast(Any, None), cast(Any, None))
    house.workers[late.name] = late  # it has not been told yet what it is to be
    house.engine()
    house.router.worker_added(late.name, "decode", "", "cpu", "native")
    house.come_up(late)
    house.seconds(2)
    assert house.of("decode") == []


def test_a_dead_engine_gets_nothing_from_those_who_come_back() -> None:
    house = House()
    stays, _ = house.prefilled()
    house.acknowledge(stays)
    engine = house.engine()
    waiting = house.prefilled()[0]
    del house.workers[engine.name]  # nothing can be sent to it any more
    house.bridge.died(engine, "killed")
    house.router.worker_gone(engine.name)
    (native,) = house.of("decode")
    assert house.holder(waiting) == native.name
