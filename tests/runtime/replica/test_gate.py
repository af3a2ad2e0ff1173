"""The gate: what is held, what lets it go, and who is believed."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import Child
from coldframe.loader.wire import Channel
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import Listener, TokenEvent
from coldframe.runtime.replica.gate import Gate
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.snapshot.cloner import Cloner

ORACLE = {"prompt_ids": [1, 2], "token_ids": [5, 9], "logprobs": [-0.5, -1.0]}


class Client:
    def __init__(self) -> None:
        self.errors: list[ColdframeError] = []

    def on_token(self, event: TokenEvent) -> None:
        raise AssertionError("a gate has no tokens")

    def on_error(self, error: ColdframeError) -> None:
        self.errors.append(error)


class Front:
    """A gate, and what it asks for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], Listener]] = []
        self.distrusted: list[ColdframeError] = []
        self.went: list[str] = []
        self.gate = Gate(self._submit, self.distrusted.append)

    def _submit(self, _: SamplingParams, listener: Listener, ids: tuple[int, ...]) -> str:
        self.asked.append((ids, listener))
        return "oracle"

    def hold(self, *names: str) -> list[Client]:
        clients = [Client() for _ in names]
        for name, client in zip(names, clients, strict=True):
            self.gate.hold(name, lambda name=name: self.went.append(name), client)  # type: ignore[misc]
        return clients

    def answer(self, tokens: tuple[int, ...] = (5, 9)) -> None:
        ((_, listener),) = self.asked
        for place, token in enumerate(tokens):
            logprob = ORACLE["logprobs"][place]
            finish = "length" if place == 1 else None
            listener.on_token(TokenEvent(place, token, "", finish, logprob, ((token, logprob),)))


@pytest.fixture
def front() -> Front:
    return Front()


def worker(tier: str | None, oracle: Any = ORACLE) -> WorkerProcess:
    """A worker that is up; None stands for a fresh one."""
    ours, theirs = Channel.pair()
    theirs.close()
    cloner = None
    if tier is not None:
        cloner = Cloner(tier, ours)
        cloner.image, cloner.manifest = "f" * 32, {"oracle": oracle}
        cloner.close()
    else:
        ours.close()
    return WorkerProcess("prefill-0", "prefill", Child(1, 0), ours, cloner)


def test_requests_wait_for_a_clones_own_answer(front: Front) -> None:
    front.hold("a", "b", "c")
    front.gate.cancel("b")
    front.gate.cancel("unknown")
    assert not front.gate.open
    front.gate.is_up(worker("image"), 500)
    front.gate.is_up(worker("image"), 500)  # one answer will do
    assert front.asked[0][0] == (1, 2)
    assert len(front.asked) == 1
    assert not front.gate.open
    front.answer()
    assert front.gate.open
    assert front.went == ["a", "c"]
    assert front.distrusted == []
    front.gate.is_up(worker("image"), 500)
    assert len(front.asked) == 1


def test_a_wrong_answer_is_told_before_anything_goes(front: Front) -> None:
    front.hold("a")
    front.gate.is_up(worker("image"), 500)
    gone_by_then: list[list[str]] = []
    front.gate._distrust = lambda error: (  # what the front does about it comes first
        gone_by_then.append(list(front.went)),
        front.distrusted.append(error),
    )
    front.answer((5, 8))
    (error,) = front.distrusted
    assert isinstance(error, SnapshotError)
    assert error.where == "token 1"
    assert gone_by_then == [[]]
    assert (front.gate.open, front.went) == (True, ["a"])


def test_a_request_that_fails_is_a_wrong_answer(front: Front) -> None:
    front.hold("a")
    front.gate.is_up(worker("image"), 500)
    front.asked[0][1].on_error(ReplicaError("it died and died"))
    assert front.distrusted[0].what == "it died and died"
    assert front.went == ["a"]


@pytest.mark.parametrize("tier", [None, "template"])
def test_who_was_not_restored_is_believed(front: Front, tier: str | None) -> None:
    front.hold("a")
    front.gate.is_up(worker(tier), 500)
    assert (front.gate.open, front.went, front.asked) == (True, ["a"], [])


def test_an_image_without_an_answer_is_not_trusted(front: Front) -> None:
    front.hold("a")
    front.gate.is_up(worker("image", oracle=None), 500)
    (error,) = front.distrusted
    assert error.where == "f" * 32
    assert (front.gate.open, front.went) == (False, [])
    front.gate.is_up(worker(None), 500)  # whoever took its place
    assert (front.gate.open, front.went) == (True, ["a"])


def test_what_is_held_fails_with_the_replica(front: Front) -> None:
    clients = front.hold("a", "b")
    error = ReplicaError("the memory service died")
    front.gate.fail(error)
    assert [client.errors for client in clients] == [[error], [error]]
    front.gate.fail(error)
    assert [len(client.errors) for client in clients] == [1, 1]
    assert front.went == []
