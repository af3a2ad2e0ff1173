"""The router's part: who is given away, who comes with KV, and workers whose KV is their own."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, TransferRefused
from coldframe.loader.transport.base import Ticket, Way, new_token
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.router import Router
from coldframe.runtime.transport.base import Given
from coldframe.runtime.worker.handoff import Handoff, Job

PROMPT = tuple(range(100))
TICKET = Ticket(new_token(), "a", "f", "k", 10, 4, 100, 30.0, (Way("tcp", "h:1"),))


class House:
    def __init__(self) -> None:
        self.router = Router(self, lambda: 0.0)
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.memory: list[dict[str, Any]] = []
        self.offered: list[str] = []
        self.indices: list[int] = []
        self.given: list[Given] = []
        self.errors: list[ColdframeError] = []

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        self.sent.append((worker, message))

    def to_memory(self, message: dict[str, Any]) -> None:
        self.memory.append(message)

    def offer(self, request: str, handoff: Handoff) -> None:
        self.offered.append(request)

    def kill(self, worker: str) -> None: ...

    def on_token(self, event: TokenEvent) -> None:
        self.indices.append(event.index)

    def on_given(self, given: Given) -> None:
        self.given.append(given)

    def on_error(self, error: ColdframeError) -> None:
        self.errors.append(error)

    def come_up(self, name: str, role: str, **more: str) -> None:
        self.router.worker_added(name, role, domain=more.pop("domain", "cpu"), **more)
        self.router.on_message(name, {"type": "up"})

    def submit(self, name: str = "a", **more: Any) -> None:
        params = SamplingParams(max_tokens=9, seed=3)
        self.router.submit(name, params, self, prompt_ids=PROMPT, **more)

    def token(self, worker: str, index: int, attempt: int = 0) -> None:
        item = ["a", attempt, index, 50 + index, "", None, None, [], 100, [], 0]
        self.router.on_message(worker, {"type": "tokens", "items": [item]})

    def hand_over(self, worker: str, generated: tuple[int, ...] = (50,), attempt: int = 0) -> None:
        job = Job("a", attempt, SamplingParams(max_tokens=9, seed=3), None, PROMPT, generated)
        handoff = Handoff(job, "f", "k", (1, 2, 3, 4), 100, "cpu")
        self.router.on_message(worker, {"type": "handoff", "handoff": handoff.to_wire()})

    def last(self) -> tuple[str, Handoff]:
        worker, message = self.sent[-1]
        return worker, Handoff.from_wire(message["handoff"])


def test_what_is_given_goes_to_no_worker_of_ours() -> None:
    house = House()
    house.come_up("p", "prefill")
    house.come_up("d", "decode")
    house.submit(give=True)
    house.token("p", 0)
    house.hand_over("p")
    assert house.offered == ["a"]
    assert [worker for worker, _ in house.sent] == ["p"]
    assert house.router.offered("a", TICKET)
    (given,) = house.given
    assert (given.first, given.kv_tokens, given.seed, given.ticket) == ((50,), 100, 3, TICKET)
    assert house.sent[-1] == ("p", {"type": "ack", "request": "a"})
    assert house.router.open_requests == 0
    assert [message["type"] for message in house.memory] == ["open"]  # its KV is still to be taken


def test_who_cancels_meanwhile_gets_no_ticket() -> None:
    house = House()
    house.come_up("p", "prefill")
    house.submit(give=True)
    house.token("p", 0)
    house.hand_over("p")
    house.router.cancel("a")
    assert not house.router.offered("a", TICKET)
    assert not house.given
    assert house.memory[-1] == {"type": "release", "request": "a"}


def test_the_prefill_workers_death_behind_the_hand_off_is_nothing() -> None:
    house = House()
    house.come_up("p", "prefill")
    house.submit(give=True)
    house.token("p", 0)
    house.hand_over("p")
    house.router.worker_gone("p")
    assert house.router.offered("a", None)
    assert house.given[0].ticket is None


def test_who_comes_with_kv_goes_to_a_decode_worker_with_it() -> None:
    house = House()
    house.come_up("d", "decode")
    given = Given.of(
        Handoff(Job("x", 0, SamplingParams(seed=3), None, PROMPT, (50,)), "f", "k", (), 100, "cpu"),
        TICKET,
    )
    house.submit(kv=given, generated_ids=(50,))
    worker, handoff = house.last()
    assert (worker, handoff.ticket, handoff.kv_tokens) == ("d", TICKET.to_wire(), 100)
    house.token("d", 1)
    assert house.indices == [1]
    house.come_up("e", "decode")
    house.router.worker_gone("d")
    worker, handoff = house.last()  # from here on its KV is here, as far as it is anywhere
    assert (worker, handoff.ticket, handoff.domain, handoff.kv_tokens) == ("e", None, "cpu", 101)
    assert handoff.job.generated_ids == (50, 51)


def test_a_death_before_its_first_token_leaves_the_ticket() -> None:
    house = House()
    house.come_up("d", "decode")
    given = Given.of(
        Handoff(Job("x", 0, SamplingParams(seed=3), None, PROMPT, (50,)), "f", "k", (), 100, "cpu"),
        TICKET,
    )
    house.submit(kv=given, generated_ids=(50,))
    house.router.worker_gone("d")
    house.come_up("e", "decode")
    worker, handoff = house.last()
    assert (worker, handoff.ticket, handoff.domain) == ("e", TICKET.to_wire(), "")


def test_kv_of_another_request_is_refused() -> None:
    house = House()
    given = Given.of(
        Handoff(Job("x", 0, SamplingParams(), None, (7,) * 100, (50,)), "f", "k", (), 100, "cpu"),
        TICKET,
    )
    with pytest.raises(TransferRefused):
        house.submit(kv=given, generated_ids=(50,))
    assert house.router.open_requests == 0


def test_tokens_of_a_remote_worker_are_no_kv_of_ours() -> None:
    house = House()
    house.come_up("p", "prefill")
    house.come_up("r", "decode", domain="tcp://h:1", engine="remote")
    house.submit()
    house.token("p", 0)
    house.hand_over("p")
    assert house.last()[0] == "r"
    house.token("r", 1)
    house.token("r", 2)
    house.router.worker_gone("r")
    house.come_up("d", "decode")
    worker, handoff = house.last()
    assert (worker, handoff.domain, handoff.kv_tokens) == ("d", "cpu", 100)
    assert handoff.job.generated_ids == (50, 51, 52)
