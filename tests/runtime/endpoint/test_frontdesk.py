"""The front's end of the gateway's socket: whoever is there can ask for answers, and no more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldframe.loader.errors import RequestError
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.endpoint.frontdesk import FrontDesk
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent

GOOD = {
    "type": "submit",
    "model": "one",
    "id": 1,
    "params": SamplingParams(max_tokens=4).to_wire(),
    "prompt": "once",
    "prompt_ids": None,
    "add_special": True,
}


class Requests:
    """What the desk uses of a supervisor: an engine that answers when it is told to."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(spec=SimpleNamespace(vocab_size=100))
        self.open: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.cancelled: list[str] = []

    def submit(self, params: SamplingParams, listener: Any, **asked: Any) -> str:
        name = f"r{len(self.open)}"
        self.open[name] = (listener, asked)
        return name

    def cancel(self, request: str) -> None:
        self.cancelled.append(request)


class Models(dict[str, Requests]):
    """What the desk uses of a fleet."""

    def __init__(self, **models: Requests) -> None:
        super().__init__(models)
        self.loop = self
        self.ready: Callable[[], None] | None = None

    def watch(self, _: int, ready: Callable[[], None]) -> None:
        self.ready = ready

    def unwatch(self, _: int) -> None:
        self.ready = None


class Bench:
    """A desk, and the gateway's end of its socket."""

    def __init__(self) -> None:
        ours, self.gateway = Channel.pair()
        self.replica, self.second = Requests(), Requests()
        self.models = Models(one=self.replica, two=self.second)
        self.others: list[Message] = []
        self.wrong: list[str] = []
        self.ends = 0
        answers: dict[str, Callable[[str], dict[str, Any]]] = {
            "startup": lambda name: {"id": self.models[name] is self.second}
        }
        self.desk = FrontDesk(
            ours,
            self.models,  # type: ignore[arg-type]
            answers,
            2,
            self.others.append,
            self.wrong.append,
            self._ended,
        )

    def _ended(self) -> None:
        self.ends += 1

    def says(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.gateway.send(body, fds)
        assert self.models.ready is not None
        self.models.ready()

    def hears(self) -> dict[str, Any]:
        self.desk.flush()
        message = self.gateway.recv(5)
        assert message is not None
        return message.body

    def close(self) -> None:
        self.desk.close()
        self.gateway.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_request_and_its_tokens(bench: Bench) -> None:
    bench.says(GOOD)
    ((listener, asked),) = bench.replica.open.values()
    assert asked == {
        "prompt": "once",
        "prompt_ids": None,
        "add_special": True,
        "generated_ids": (),
        "give": False,
        "kv": None,
    }
    listener.on_token(TokenEvent(0, 7, " a", None, -0.5, ((8, -1.0),), 3, (b"\xff", b"b"), 2))
    listener.on_token(TokenEvent(1, 9, "", "stop", None, (), 3))
    assert bench.hears() == {
        "type": "tokens",
        "items": [
            [1, 7, " a", None, 3, [7, -0.5, "\xff"], [[8, -1.0, "b"]], 2],
            [1, 9, "", "stop", 3, None, [], 0],
        ],
    }
    bench.says({"type": "cancel", "id": 1})  # it is over
    assert bench.replica.cancelled == []


def test_an_error_comes_behind_the_tokens(bench: Bench) -> None:
    bench.says(GOOD)
    ((listener, _),) = bench.replica.open.values()
    listener.on_token(TokenEvent(0, 7, " a", None, None, (), 3))
    listener.on_error(RequestError("no", where="prompt"))
    assert bench.hears()["type"] == "tokens"
    assert bench.hears()["error"]["where"] == "prompt"


def test_wrong_parameters_are_the_requests_fault(bench: Bench) -> None:
    bench.says({**GOOD, "params": {"temperature": -1}})
    assert bench.hears()["error"]["error"] == "RequestError"
    assert bench.ends == 0
    assert not bench.replica.open


def test_the_end_cancels(bench: Bench) -> None:
    bench.says(GOOD)
    bench.says({**GOOD, "id": 2, "prompt": None, "prompt_ids": [1, 2]})
    bench.gateway.close()
    assert bench.models.ready is not None
    bench.models.ready()
    assert bench.replica.cancelled == ["r0", "r1"]
    assert bench.ends == 1


def test_questions(bench: Bench) -> None:
    for number, model in enumerate(("one", "two")):
        bench.says({"type": "ask", "id": number, "model": model, "what": "startup"})
        assert bench.hears() == {"type": "answer", "id": number, "body": {"id": number == 1}}


def test_each_model_gets_its_own(bench: Bench) -> None:
    bench.says({**GOOD, "model": "two"})
    bench.says({**GOOD, "id": 2})
    assert (len(bench.replica.open), len(bench.second.open)) == (1, 1)
    bench.says({"type": "cancel", "id": 1})
    assert (bench.replica.cancelled, bench.second.cancelled) == ([], ["r0"])
    bench.desk.close()
    assert bench.replica.cancelled == ["r0"]


@pytest.mark.parametrize(
    "body",
    [
        {"type": "submit"},
        {**GOOD, "model": "three"},
        {**GOOD, "model": ["one"]},
        {**GOOD, "id": "1"},
        {**GOOD, "id": [1]},
        {**GOOD, "id": True},
        {**GOOD, "prompt": None},
        {**GOOD, "prompt_ids": [1]},
        {**GOOD, "prompt": 5},
        {**GOOD, "prompt": None, "prompt_ids": [1.5]},
        {**GOOD, "prompt": None, "prompt_ids": 7},
        {**GOOD, "params": None},
        {"type": "cancel"},
        {"type": "cancel", "id": {}},
        {"type": "ask", "id": 1, "model": "one", "what": "passwd"},
        {"type": "ask", "id": 1, "model": "three", "what": "startup"},
        {"type": "ask", "id": 1, "what": "startup"},
        {"type": "ask", "id": {}, "model": "one", "what": "startup"},
    ],
)
def test_who_says_what_no_gateway_says_is_ended(bench: Bench, body: dict[str, Any]) -> None:
    bench.says(body)
    assert bench.ends == 1
    assert len(bench.wrong) == 1
    assert not bench.replica.open


def test_more_than_it_may(bench: Bench) -> None:
    bench.says(GOOD)
    bench.says({**GOOD, "id": 2})
    bench.says({**GOOD, "id": 3})
    assert bench.ends == 1
    assert len(bench.replica.open) == 2


def test_the_same_twice(bench: Bench) -> None:
    bench.says(GOOD)
    bench.says(GOOD)
    assert bench.ends == 1


def test_who_leaves_pings_unanswered_is_ended(bench: Bench) -> None:
    moment = bench.desk._clock()
    bench.desk._clock = lambda: moment  # type: ignore[method-assign,assignment]

    def later(seconds: float) -> None:
        nonlocal moment
        moment += seconds
        bench.desk.watch()

    later(60)  # it imports
    bench.says({"type": "pong"})
    for _ in range(10):
        later(6)
        assert bench.hears() == {"type": "ping"}
        bench.says({"type": "pong"})
    bench.says(GOOD)
    for _ in range(5):
        later(5.9)
    assert bench.ends == 0
    later(1)
    assert (bench.ends, bench.replica.cancelled, len(bench.wrong)) == (1, ["r0"], 1)
    later(100)
    assert bench.ends == 1


def test_who_never_says_a_word_is_ended_later(bench: Bench) -> None:
    bench.desk._clock = lambda: 299.0  # type: ignore[method-assign,assignment]
    bench.desk.watch()
    assert bench.ends == 0
    bench.desk._clock = lambda: 301.0  # type: ignore[method-assign,assignment]
    bench.desk.watch()
    assert bench.ends == 1


def test_descriptors_are_not_kept(bench: Bench) -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        bench.says({"type": "ask", "id": number, "model": "one", "what": "startup"}, (fd,))
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["submit", "cancel", "ask"]),
    st.dictionaries(st.sampled_from([*GOOD, "what"]), JSON),
)
def test_nothing_that_it_says_ends_the_front(kind: str, fields: dict[str, Any]) -> None:
    bench = Bench()
    try:
        bench.says({**GOOD, **fields, "type": kind})
    finally:
        bench.close()
