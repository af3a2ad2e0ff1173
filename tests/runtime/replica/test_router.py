"""The router against workers that obey the protocol and die, hang and repeat themselves at will."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.placement import MOST_ATTEMPTS
from coldframe.runtime.replica.router import ACK_S, SILENCE_S, Router
from coldframe.runtime.worker.handoff import Handoff, Job

Wire = dict[str, Any]
REFUSED = 13
"""A token id that no worker takes."""
KNOWN = 11
"""A token id by which a prompt's first half is in the KV, and its rest left to a decode worker."""


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def token(prompt: tuple[int, ...], index: int) -> int:
    """What the model says: it depends on prompt and place alone, as greedy decoding does."""
    return (31 * sum(prompt) + 7 * index) % 1000


def over_the_wire(message: Wire) -> Wire:
    copy: Wire = json.loads(json.dumps(message))
    return copy


class Listener:
    """A client; it knows what it should be told."""

    def __init__(self, prompt: tuple[int, ...], count: int) -> None:
        self.prompt = prompt
        self.count = count
        self.events: list[TokenEvent] = []
        self.error: ColdframeError | None = None
        self.cancelled = False

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.events and self.events[-1].finish)

    def on_token(self, event: TokenEvent) -> None:
        assert not self.ended
        assert not self.cancelled
        assert event.index == len(self.events)
        assert event.token == token(self.prompt, event.index)
        assert event.text == chr(event.token)
        assert (event.finish is not None) == (event.index + 1 == self.count)
        self.events.append(event)

    def on_error(self, error: ColdframeError) -> None:
        assert not self.ended
        assert not self.cancelled
        self.error = error


def said(job: Job, prompt: tuple[int, ...], index: int) -> list[Any]:
    finish = "length" if index + 1 == job.params.max_tokens else None
    number = token(prompt, index)
    return [
        job.request,
        job.attempt,
        index,
        number,
        chr(number),
        finish,
        None,
        [],
        len(prompt),
        [],
        0,
    ]


@dataclass
class Worker:
    """A simulated process: `inbox` and `outbox` are its socket."""

    name: str
    role: str
    alive: bool = True
    hung: bool = False
    inbox: deque[Wire] = field(default_factory=deque)
    outbox: deque[Wire] = field(default_factory=deque)
    past: list[Wire] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    handed: set[str] = field(default_factory=set)
    """Requests whose lease it renews."""
    behind: set[str] = field(default_factory=set)
    """Requests of whose prompt more is to be computed before there is a token."""
    kv: dict[str, int] = field(default_factory=dict)
    """How many tokens of each request are in the KV, which is the same for all workers."""

    @property
    def works(self) -> bool:
        return self.alive and not self.hung

    def holds(self, request: str) -> bool:
        """Whether it computes the request, or will."""
        coming = (
            (message.get("job") or message.get("handoff", {}).get("job"))["request"]
            for message in self.inbox
            if message["type"] in ("job", "handoff")
        )
        return self.alive and (request in self.jobs or request in coming)

    def take(self) -> None:
        """Reads one message."""
        message = self.inbox.popleft()
        match message["type"]:
            case "job":
                self._prompt(Job.from_wire(message["job"]))
            case "handoff":
                self._handoff(Handoff.from_wire(message["handoff"]))
            case "ack":
                self.handed.discard(message["request"])
            case "cancel":
                self.jobs.pop(message["request"], None)
                self.behind.discard(message["request"])
                self.attempts.pop(message["request"], None)
                self.handed.discard(message["request"])

    def _prompt(self, job: Job) -> None:
        assert self.role == "prefill"
        if job.prompt_ids is not None and REFUSED in job.prompt_ids:
            error = RequestError("no such token").to_wire()
            body = {"type": "failed", "request": job.request, "attempt": job.attempt}
            self.outbox.append({**body, "error": error})
        else:
            self.jobs[job.request] = job

    def _handoff(self, handoff: Handoff) -> None:
        assert self.role == "decode"
        job = handoff.job
        assert job.prompt_ids is not None
        # What the hand-off says of the KV is there, and all that is known to be there is said.
        assert handoff.kv_tokens <= self.kv[job.request]
        if handoff.whole:
            self.behind.discard(job.request)
        else:
            assert handoff.kv_tokens == len(job.prompt_ids) // 2
            self.behind.add(job.request)
        if self.attempts.get(job.request, -1) < job.attempt:
            self.attempts[job.request] = job.attempt
            self.jobs[job.request] = job
        self.outbox.append({"type": "ack", "request": job.request, "attempt": job.attempt})

    def step(self) -> None:
        """Computes the next token of all that it has."""
        for request, job in list(self.jobs.items()):
            prompt = job.prompt_ids if job.prompt_ids is not None else ids_of(job.prompt or "")
            index = len(job.generated_ids)
            assert list(job.generated_ids) == [token(prompt, i) for i in range(index)]
            if request in self.behind:
                self.behind.remove(request)
                continue
            if self.role == "prefill" and KNOWN in prompt and len(prompt) > 1:
                del self.jobs[request]
                self._pass_on(replace(job, prompt=None, prompt_ids=prompt), len(prompt) // 2)
                continue
            self.kv[request] = len(prompt) + index
            item = said(job, prompt, index)
            self.outbox.append({"type": "tokens", "items": [item]})
            generated = (*job.generated_ids, item[3])
            job = Job(request, job.attempt, job.params, None, prompt, generated)
            if item[5] is not None or self.role == "prefill":
                del self.jobs[request]
                self.attempts.pop(request, None)
            else:
                self.jobs[request] = job
            if item[5] is None and self.role == "prefill":
                self._pass_on(job, len(prompt) + index)

    def _pass_on(self, job: Job, kv_tokens: int) -> None:
        self.handed.add(job.request)
        self.kv[job.request] = kv_tokens
        handoff = Handoff(job, "plan", "kv", (1, 2), kv_tokens, "")
        self.outbox.append({"type": "handoff", "handoff": handoff.to_wire()})


class Machine(RuleBasedStateMachine):
    """The replica's part: processes, sockets and the clock, and the checks."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.router = Router(self, lambda: self.now)
        self.workers: dict[str, Worker] = {}
        self.kv: dict[str, int] = {}
        self.buried: list[Worker] = []
        self.listeners: dict[str, Listener] = {}
        self.memory: Counter[tuple[str, str]] = Counter()
        self.names = 0
        self.deaths = 0

    # -- Transport -------------------------------------------------------------------------------

    def to_worker(self, worker: str, message: Wire) -> None:
        assert worker in self.workers, "a message to a worker that is known to be dead"
        if message["type"] in ("job", "handoff"):
            body = message.get("job") or message["handoff"]["job"]
            holders = [w.name for w in self.workers.values() if w.holds(body["request"])]
            assert holders == [], "a request that another worker still has"
            assert not self.router.is_leaving(worker), "a new request for one that is to go"
        if message["type"] == "job" and self.router.placement.share is not None:
            queued = [r for r in self.router._requests.values() if r.worker == worker]
            assert len(queued) == 1 or self.router.work_of(worker) <= self.router.placement.share
        if self.workers[worker].alive:  # else it is lost, as what is sent to a dead socket
            self.workers[worker].inbox.append(over_the_wire(message))

    def to_memory(self, message: Wire) -> None:
        self.memory[message["type"], message["request"]] += 1

    def kill(self, worker: str) -> None:
        self.workers[worker].alive = False
        self._bury(self.workers[worker])

    def _bury(self, worker: Worker) -> None:
        del self.workers[worker.name]
        self.buried.append(worker)
        self._add(worker.role)
        self.deaths += 1
        self.router.worker_gone(worker.name)

    def _add(self, role: str) -> None:
        self.names += 1
        worker = Worker(f"{role}-{self.names}", role, kv=self.kv)
        worker.outbox.append({"type": "up"})
        self.workers[worker.name] = worker
        self.router.worker_added(worker.name, role)

    def _pick(self, data: st.DataObject, fits: Callable[[Worker], bool]) -> Worker | None:
        found = [worker for worker in self.workers.values() if fits(worker)]
        return data.draw(st.sampled_from(found)) if found else None

    # -- what can happen -------------------------------------------------------------------------

    @initialize(
        prefill=st.integers(0, 2), decode=st.integers(0, 2), share=st.sampled_from([None, 1, 4])
    )
    def begin(self, prefill: int, decode: int, share: int | None = None) -> None:
        self.router.placement.share = share
        for _ in range(prefill):
            self._add("prefill")
        for _ in range(decode):
            self._add("decode")

    @rule(
        prompt=st.one_of(st.text("abc", max_size=3), st.lists(st.integers(10, 14), max_size=3)),
        count=st.integers(1, 8),
    )
    def submit(self, prompt: str | list[int], count: int) -> None:
        request = f"r{len(self.listeners)}"
        params = SamplingParams(max_tokens=count)
        if isinstance(prompt, str):
            self.listeners[request] = listener = Listener(ids_of(prompt), count)
            self.router.submit(request, params, listener, prompt=prompt)
        else:
            self.listeners[request] = listener = Listener(tuple(prompt), count)
            self.router.submit(request, params, listener, prompt_ids=tuple(prompt))

    @precondition(lambda self: len(self.listeners) > 1)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.listeners)))
        self.router.cancel(request)
        self.listeners[request].cancelled |= not self.listeners[request].ended

    @rule(data=st.data())
    def one_thing_happens(self, data: st.DataObject) -> None:
        possible: list[Callable[[], None]] = []
        for worker in self.workers.values():
            if worker.inbox and worker.works:
                possible.append(worker.take)
            if worker.jobs and worker.works:
                possible.append(worker.step)
            if worker.outbox:  # what a process has sent arrives even if it is dead by then
                possible.append(partial(self._deliver, worker))
        if possible:
            possible[data.draw(st.integers(0, len(possible) - 1))]()

    @rule(data=st.data())
    def one_worker_goes_on(self, data: st.DataObject) -> None:
        worker = self._pick(data, lambda w: w.works and bool(w.inbox or w.jobs or w.outbox))
        if worker is not None:
            self._go_on(worker)

    @rule(rounds=st.integers(1, 3))
    def all_workers_go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            for worker in list(self.workers.values()):
                if worker.works:
                    self._go_on(worker)

    def _go_on(self, worker: Worker) -> None:
        while worker.inbox:
            worker.take()
        worker.step()
        while worker.outbox:
            self._deliver(worker)

    def _deliver(self, worker: Worker) -> None:
        message = over_the_wire(worker.outbox.popleft())
        worker.past.append(message)
        self.router.on_message(worker.name, message)

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = self._pick(data, lambda w: w.alive)
        if worker is not None:
            worker.alive = False
            worker.jobs.clear()
            worker.behind.clear()
            kept = data.draw(st.integers(0, len(worker.outbox)), label="messages that got out")
            while len(worker.outbox) > kept:
                worker.outbox.pop()

    @rule(data=st.data())
    def find_the_dead(self, data: st.DataObject) -> None:
        # The end of a socket is read after what was sent over it.
        worker = self._pick(data, lambda w: not w.alive and not w.outbox)
        if worker is not None:
            self._bury(worker)

    @rule(data=st.data())
    def say_it_again(self, data: st.DataObject) -> None:
        worker = self._pick(data, lambda w: bool(w.past))
        if worker is not None:
            message = data.draw(st.sampled_from(worker.past))
            # A second copy of a hand-off is answered at once, so its lease is not renewed again.
            self.router.on_message(worker.name, message)

    @precondition(lambda self: any(worker.past for worker in self.buried))
    @rule(data=st.data())
    def the_dead_speak(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([w for w in self.buried if w.past]))
        self.router.on_message(worker.name, data.draw(st.sampled_from(worker.past)))

    @rule(data=st.data())
    def hang(self, data: st.DataObject) -> None:
        worker = self._pick(data, lambda w: w.alive)
        if worker is not None:
            worker.hung = True

    @rule(data=st.data())
    def one_is_to_go(self, data: st.DataObject) -> None:
        staying = [w for w in self.workers.values() if not self.router.is_leaving(w.name)]
        roles = Counter(worker.role for worker in staying)
        worker = self._pick(data, lambda w: w in staying and roles[w.role] > 1)
        if worker is not None:
            self.router.retire(worker.name)

    @rule(data=st.data())
    def one_stays_after_all(self, data: st.DataObject) -> None:
        worker = self._pick(data, lambda w: self.router.is_leaving(w.name))
        if worker is not None:
            self.router.retain(worker.name)

    @rule(data=st.data())
    def one_that_was_to_go_is_ended(self, data: st.DataObject) -> None:
        worker = self._pick(
            data, lambda w: self.router.is_leaving(w.name) and self.router.is_free(w.name)
        )
        if worker is None:
            return
        attempts = {name: r.job.attempt for name, r in self.router._requests.items()}
        del self.workers[worker.name]
        self.buried.append(worker)
        self.router.worker_gone(worker.name)
        # Nobody had to begin again for it.
        assert attempts == {name: r.job.attempt for name, r in self.router._requests.items()}

    @rule(seconds=st.sampled_from([1.0, ACK_S / 2, ACK_S + 1]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.router.tick()

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def accounts_are_open_while_requests_are(self) -> None:
        for request, listener in self.listeners.items():
            assert self.memory["open", request] == 1
            over = listener.ended or listener.cancelled
            assert self.memory["release", request] == over
        open_ones = [x for x in self.listeners.values() if not x.ended and not x.cancelled]
        assert self.router.open_requests == len(open_ones)

    def teardown(self) -> None:
        """All is calm in the end: who hangs is found, and every request has come to its end."""
        for role in ("prefill", "decode"):
            if all(w.role != role or self.router.is_leaving(w.name) for w in self.workers.values()):
                self._add(role)
        for _ in range(200):
            for worker in list(self.workers.values()):
                if worker.works:
                    self._go_on(worker)
                while worker.outbox:
                    self._deliver(worker)
                if not worker.alive and worker.name in self.workers:
                    self._bury(worker)
            if self.router.open_requests == 0:
                break
            if not any(w.inbox or w.jobs for w in self.workers.values() if not w.hung):
                self.now += max(SILENCE_S.values()) + 1
                self.router.tick()
        assert self.router.open_requests == 0
        self.accounts_are_open_while_requests_are()
        for listener in self.listeners.values():
            assert listener.ended or listener.cancelled
            if isinstance(listener.error, ReplicaError):
                assert self.deaths >= MOST_ATTEMPTS
            elif listener.error is not None:
                assert isinstance(listener.error, RequestError)
                assert REFUSED in listener.prompt
                assert listener.events == []
        for worker in self.workers.values():
            assert self.router.is_free(worker.name)
            assert self.router.work_of(worker.name) == 0
            if worker.works:
                while worker.inbox:
                    worker.take()
                assert worker.handed == set(), "a lease that is renewed for ever"
                assert worker.jobs == {}


def test_no_token_is_lost_or_repeated_whatever_dies() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=300, stateful_step_count=50, deadline=None, derandomize=True
        ),
    )


# -- single cases -----------------------------------------------------------------------------


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.begin(1, 1)
    for worker in machine.workers.values():
        machine._deliver(worker)
    return machine


def one(machine: Machine, role: str) -> Worker:
    (worker,) = [worker for worker in machine.workers.values() if worker.role == role]
    return worker


def test_a_seed_is_drawn_where_a_request_enters(machine: Machine) -> None:
    machine.submit("a", 3)
    first = one(machine, "prefill")
    seed = Job.from_wire(first.inbox[0]["job"]).params.seed
    assert seed is not None
    first.alive = False
    machine._bury(first)
    again = Job.from_wire(one(machine, "prefill").inbox[0]["job"])
    assert again.params.seed == seed
    assert again.attempt == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_hangs_is_replaced(machine: Machine, role: str) -> None:
    machine.submit("a", 3)
    if role == "decode":
        prefill = one(machine, "prefill")
        prefill.take()
        prefill.step()
        while prefill.outbox:
            machine._deliver(prefill)
    hung = one(machine, role)
    hung.hung = True
    limit = ACK_S if role == "decode" else SILENCE_S[role]
    machine.time_goes_by(limit - 1)
    assert one(machine, role) is hung
    machine.time_goes_by(2)
    assert one(machine, role) is not hung
    machine.teardown()


def test_a_worker_that_speaks_is_left_alone(machine: Machine) -> None:
    machine.submit("a", 3)
    worker = one(machine, "prefill")
    for _ in range(3):
        machine.time_goes_by(SILENCE_S["prefill"] - 1)
        worker.outbox.append({"type": "alive"})
        machine._deliver(worker)
    assert one(machine, "prefill") is worker


def test_requests_go_to_the_worker_with_the_fewest(machine: Machine) -> None:
    machine._add("prefill")
    for _ in range(4):
        machine.submit("a", 2)
    first, second = [w for w in machine.workers.values() if w.role == "prefill"]
    # The one that is up comes first whatever its load: the other may take a while.
    assert (len(first.inbox), len(second.inbox)) == (4, 0)
    machine._deliver(second)
    for _ in range(4):
        machine.submit("a", 2)
    assert (len(first.inbox), len(second.inbox)) == (4, 4)


def tokens_in(worker: Worker) -> list[int]:
    """The lengths of the prompts that a worker has got, in the order in which they came."""
    jobs = [message["job"] for message in worker.inbox if message["type"] == "job"]
    return [len(job["prompt_ids"] or ids_of(job["prompt"])) for job in jobs]


def two(machine: Machine, role: str) -> tuple[Worker, Worker]:
    """Two workers that are up."""
    machine._add(role)
    first, second = [worker for worker in machine.workers.values() if worker.role == role]
    machine._deliver(second)
    return first, second


def test_prompts_go_where_the_fewest_tokens_are_queued(machine: Machine) -> None:
    first, second = two(machine, "prefill")
    for length in (100, 30, 30, 30, 30, 5):
        machine.submit([14] * length, 2)
    assert (tokens_in(first), tokens_in(second)) == ([100, 5], [30, 30, 30, 30])


def test_texts_are_weighed_by_what_their_tokens_turned_out_to_be(machine: Machine) -> None:
    # Here each character is a token, of which the front has four to the token in mind.
    machine.submit("abc" * 10_000, 1)
    machine._go_on(one(machine, "prefill"))
    first, second = two(machine, "prefill")
    machine.submit("a" * 1000, 2)
    for _ in range(4):
        machine.submit([14] * 200, 2)
    assert (tokens_in(first), tokens_in(second)) == ([1000], [200] * 4)


def test_hand_offs_go_where_the_least_kv_is(machine: Machine) -> None:
    prefill = one(machine, "prefill")
    first, second = two(machine, "decode")
    for length in (1000, 200, 200, 200):
        machine.submit([14] * length, 20)
        machine._go_on(prefill)
    assert (len(first.inbox), len(second.inbox)) == (1, 3)
    # Blocks of 32 tokens: of 1000 prompt tokens and the first of the answer, and 200 likewise.
    assert machine.router.load("decode") == 32 + 3 * 7


def test_prompts_wait_in_their_order_for_who_has_done_its_share(machine: Machine) -> None:
    machine.router.placement.share = 100
    first = one(machine, "prefill")
    for length in (90, 300, 5, 4):
        machine.submit([14] * length, 1)
    # 5 would have had room, but does not pass 300.
    assert tokens_in(first) == [90]
    assert machine.router.load("prefill") == 399
    machine._go_on(first)
    assert tokens_in(first) == [300]
    machine.router.cancel("r1")
    assert tokens_in(first) == [300, 5, 4]


def test_prompts_wait_for_a_worker_that_is_up_and_go_to_the_one_that_comes_up(
    machine: Machine,
) -> None:
    machine.router.placement.share = 100
    first = one(machine, "prefill")
    for _ in range(3):
        machine.submit([14] * 80, 1)
    machine._add(first.role)
    second = next(w for w in machine.workers.values() if w.role == "prefill" and w is not first)
    assert (tokens_in(first), tokens_in(second)) == ([80], [])
    machine._deliver(second)
    assert (tokens_in(first), tokens_in(second)) == ([80], [80])


def test_who_is_to_go_gets_nothing_and_is_free_when_it_has_nothing(machine: Machine) -> None:
    first, second = two(machine, "prefill")
    machine.submit("a", 8)
    machine.router.retire(first.name)
    for _ in range(3):
        machine.submit("b", 8)
    assert (tokens_in(first), len(second.inbox)) == ([1], 3)
    assert not machine.router.is_free(first.name)
    machine._go_on(first)
    # It still renews the lease of what it has handed over.
    assert not machine.router.is_free(first.name)
    machine._go_on(one(machine, "decode"))
    assert machine.router.is_free(first.name)
    machine.router.retain(first.name)
    machine.submit("c", 8)
    assert [message["type"] for message in first.inbox] == ["ack", "job"]


def test_who_passed_a_request_on_hears_of_the_acknowledgement(machine: Machine) -> None:
    machine.submit("a", 8)
    prefill, decode = one(machine, "prefill"), one(machine, "decode")
    machine._go_on(prefill)
    assert prefill.handed == {"r0"}
    assert not prefill.inbox
    decode.take()
    machine._deliver(decode)
    assert [message["type"] for message in prefill.inbox] == ["ack"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_who_has_a_request_hears_that_it_is_cancelled(machine: Machine, role: str) -> None:
    machine.submit("a", 8)
    if role == "decode":
        machine._go_on(one(machine, "prefill"))
    holder = one(machine, role)
    holder.take()
    machine.router.cancel("r0")
    assert holder.inbox[-1] == {"type": "cancel", "request": "r0"}
    holder.take()
    assert holder.jobs == {}


def test_a_replica_that_ends_tells_every_listener(machine: Machine) -> None:
    class Cancels(Listener):
        def on_error(self, error: ColdframeError) -> None:
            super().on_error(error)
            machine.router.cancel("last")

    listeners = {name: Cancels((1,), 2) for name in ("first", "second", "last")}
    for name, listener in listeners.items():
        machine.router.submit(name, SamplingParams(max_tokens=2), listener, prompt_ids=(1,))
    error = ReplicaError("over")
    machine.router.fail_all(error)
    assert [listener.error for listener in listeners.values()] == [error, error, None]
    assert machine.router.open_requests == 0
    assert all(machine.memory["release", name] == 1 for name in listeners)


def test_another_memory_service_is_told_which_requests_there_are(machine: Machine) -> None:
    for name in ("over", "open"):
        listener = Listener((1,), 3)
        machine.router.submit(name, SamplingParams(max_tokens=3), listener, prompt_ids=(1,))
    machine.router.cancel("over")
    machine.router.reopen()
    assert (machine.memory["open", "over"], machine.memory["open", "open"]) == (1, 2)


# -- prompts whose rest is left to a decode worker ------------------------------------------------


def test_what_is_in_the_kv_is_said_until_a_token_proves_more(machine: Machine) -> None:
    machine.submit([KNOWN] * 6, 4)
    machine._go_on(one(machine, "prefill"))
    assert machine.router.prefilled_by_decode == 1
    told = []
    for steps in (1, 2, 0):  # the first step gives no token yet
        decode = one(machine, "decode")
        handoff = Handoff.from_wire(decode.inbox[0]["handoff"])
        told.append((len(handoff.job.generated_ids), handoff.kv_tokens))
        for _ in range(steps):
            machine._go_on(decode)
        if steps:
            decode.alive = False
            machine._bury(decode)
    assert told == [(0, 3), (0, 3), (1, 6)]
    machine.teardown()
    assert machine.router.prefilled_by_decode == 1


def test_a_prompt_that_had_a_token_may_be_left_to_a_decode_worker_too(machine: Machine) -> None:
    machine.submit([14] * 6, 4)
    prefill = one(machine, "prefill")
    prefill.take()
    prefill.step()
    machine._deliver(prefill)  # its token, but not its hand-off
    prefill.outbox.clear()
    machine._bury(prefill)
    # Its successor finds half of the KV, and has others to compute.
    successor = one(machine, "prefill")
    job = Job.from_wire(successor.inbox.popleft()["job"])
    assert len(job.generated_ids) == 1
    successor._pass_on(job, 3)
    while successor.outbox:
        machine._deliver(successor)
    first = one(machine, "decode")
    assert Handoff.from_wire(first.inbox[0]["handoff"]).kv_tokens == 3
    first.alive = False
    machine._bury(first)
    # No token has come since, so that nothing more is known of the KV.
    assert Handoff.from_wire(one(machine, "decode").inbox[0]["handoff"]).kv_tokens == 3
    machine.teardown()


# -- workers that reach other KV ------------------------------------------------------------------


class Domains:
    """A router with decode workers of two KV domains, and hand-offs of prefill workers in each."""

    def __init__(self, *decode: str) -> None:
        self.sent: dict[str, str] = {}
        """Which decode worker has which request."""
        self.told: dict[str, str] = {}
        """In which domain it was told to find its KV."""
        self.asked = ""
        """Which prefill worker got the last one."""
        self.router = Router(self, lambda: 0.0)
        for domain in ("a", "b"):
            self.router.worker_added(f"prefill-{domain}", "prefill", "", domain)
        for number, domain in enumerate(decode):
            name = f"{domain}{number}"
            self.router.worker_added(name, "decode", "", domain)
            self.router.on_message(name, {"type": "up"})

    def to_worker(self, worker: str, message: Wire) -> None:
        if message["type"] == "handoff":
            handoff = Handoff.from_wire(message["handoff"])
            self.sent[handoff.job.request] = worker
            self.told[handoff.job.request] = handoff.domain
        if message["type"] == "job":
            self.asked = worker

    def to_memory(self, message: Wire) -> None: ...

    def kill(self, worker: str) -> None: ...

    def hand_over(self, request: str, tokens: int, domain: str) -> str | None:
        """A request that was prefilled in a domain: who decodes it."""
        prompt = (1,) * tokens
        for other in {"a", "b"} - {domain}:
            self.router.retire(f"prefill-{other}")
        params = SamplingParams(max_tokens=5)
        self.router.submit(request, params, Listener(prompt, 5), prompt_ids=prompt)
        for other in {"a", "b"} - {domain}:
            self.router.retain(f"prefill-{other}")
        prefill = f"prefill-{domain}"
        assert self.asked == prefill
        job = Job(request, 0, params, prompt_ids=prompt)
        self.say(prefill, said(job, prompt, 0))
        job = replace(job, generated_ids=(token(prompt, 0),))
        handoff = Handoff(job, "plan", "kv", (1,), tokens, domain)
        self.router.on_message(prefill, {"type": "handoff", "handoff": handoff.to_wire()})
        return self.sent.get(request)

    def say(self, worker: str, item: list[Any]) -> None:
        self.router.on_message(worker, {"type": "tokens", "items": [item]})


def test_a_request_stays_where_its_kv_is_unless_there_is_more_to_do() -> None:
    domains = Domains("a", "b")
    assert domains.hand_over("r0", 320, "b") == "b1"
    # 11 blocks to read there, 10 to be moved here.
    assert domains.hand_over("r1", 320, "b") == "a0"
    # 11 and 11 by now: another would only be moved for nothing.
    assert domains.hand_over("r2", 32, "b") == "b1"
    assert domains.hand_over("r3", 32, "a") == "a0"
    # A short one is moved for little.
    assert domains.hand_over("r4", 64, "b") == "b1"
    assert domains.hand_over("r5", 31, "b") == "a0"


def test_in_one_domain_the_load_alone_decides() -> None:
    domains = Domains("a", "a")
    placed = [domains.hand_over(f"r{n}", tokens, "a") for n, tokens in enumerate((500, 64, 64, 64))]
    assert placed == ["a0", "a1", "a1", "a1"]


def test_kv_is_where_the_latest_token_was_made() -> None:
    domains = Domains("a", "b")
    assert domains.hand_over("r0", 640, "b") == "b1"
    assert domains.hand_over("r1", 320, "b") == "a0"  # moved
    assert domains.told["r1"] == "b"
    prompt = (1,) * 320
    job = Job("r1", 0, SamplingParams(max_tokens=5), prompt_ids=prompt)
    domains.say("a0", said(job, prompt, 1))
    domains.router.worker_added("a2", "decode", "", "a")
    domains.router.on_message("a2", {"type": "up"})
    domains.router.cancel("r0")
    domains.router.worker_gone("a0")
    # Both have nothing to do; but there it would have to be moved back.
    assert domains.sent["r1"] == "a2"
    assert domains.told["r1"] == "a"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    workers=st.lists(st.sampled_from("ab"), min_size=1, max_size=5),
    requests=st.lists(
        st.tuples(st.integers(1, 600), st.sampled_from("ab"), st.booleans()), max_size=25
    ),
)
def test_nobody_waits_and_no_choice_is_worse_than_by_load_by_more_than_the_prefix(
    workers: list[str], requests: list[tuple[int, str, bool]]
) -> None:
    domains = Domains(*workers)
    names = [f"{domain}{number}" for number, domain in enumerate(workers)]
    for number, (tokens, domain, one_ends) in enumerate(requests):
        loads = {name: domains.router.work_of(name) for name in names}
        chosen = domains.hand_over(f"r{number}", tokens, domain)
        assert chosen is not None
        blocks = -(-tokens // 32)
        costs = {name: load + blocks * (name[0] != domain) for name, load in loads.items()}
        assert costs[chosen] == min(costs.values())
        assert loads[chosen] <= min(loads.values()) + blocks
        if one_ends:
            domains.router.cancel(f"r{number // 2}")
