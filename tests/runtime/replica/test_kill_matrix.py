"""Whoever is killed, and whenever: what clients see of it, and that nothing is left.

Each cell is a moment and a victim. A streaming client and one that waits for its whole answer are
in it together. The answers are compared with those of Transformers, what came of one that broke off
as well. docs/architecture.md has the table that these tests prove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, APIError, InternalServerError

from tests.runtime.helpers import prompt_of
from tests.runtime.moments import MOMENTS, Ask, Scene, Visitor
from tests.runtime.serving import greedy, served
from tests.runtime.snapshots import Made

Make = Callable[..., Path]
THROTTLE = "2MB/s"
"""Of a model of 4 MB."""
COLD = ("before the first stage", "in mid-load")
WARM = (
    "before the hand-off",
    "before the acknowledgement",
    "in mid-stream",
    "while the KV is full",
    "while parking",
    "while parked",
    "while waking",
)
FROM_ZERO = ("from zero, before the first stage", "from zero, in mid-load")
WITH_TOKENS = (
    "before the hand-off",
    "before the acknowledgement",
    "in mid-stream",
    "while the KV is full",
    "while draining",
)
"""The moments at which clients have had a token, or one was made for them."""
VICTIMS = ("prefill", "decode", "memory", "gateway")
FLAGS: dict[str, tuple[str, ...]] = {
    "before the hand-off": ("--no-prefix-cache",),  # each prompt takes its time
    "while the KV is full": ("--kv-memory", "1MiB"),  # two requests fill it
    **dict.fromkeys(FROM_ZERO, ("--throttle", THROTTLE)),
}
LENGTHS = {"before the hand-off": (700, 8), "in mid-stream": (24, 300), "while draining": (24, 300)}
"""Tokens of prompts and answers: whoever is to be caught at them has to take long enough."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


@pytest.fixture(scope="module", params=[*WARM, *FROM_ZERO])
def moment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scene(model: Path, moment: str) -> Iterator[Scene]:
    """A warm server, one for all that happens at a moment."""
    with warm(model, *FLAGS.get(moment, ())) as scene:
        yield scene


@contextmanager
def warm(model: Path, *flags: str) -> Iterator[Scene]:
    with served(model, "--model-name", "demo", *flags) as server:
        server.ready()
        scene = Scene(server)
        right(scene, model)
        scene.settle()
        yield scene


def right(scene: Scene, model: Path) -> None:
    """Whoever asks now gets the right answer."""
    prompt = prompt_of(24, seed=1)
    found = scene.server.complete(prompt=prompt, max_tokens=8, ignore_eos=True)
    assert found == greedy(model, tuple(prompt), 8)


class Clients:
    """One that streams, and one that does not; three of each where there is no room for all.

    Args:
        scene: Where they ask.
        moment: When.
        retries: How often they try again by themselves.
        whole_first: Which of them is the first.
    """

    def __init__(
        self, scene: Scene, moment: str, retries: int = 0, *, whole_first: bool = False
    ) -> None:
        self._scene = scene
        self._retries = retries
        self._streams = [not whole_first, whole_first] * (3 if "full" in moment else 1)
        self.length, self.count = LENGTHS.get(moment, (24, 200 if "full" in moment else 64))
        self.asks: list[Ask] = []

    def begin(self) -> int:
        for number, stream in enumerate(self._streams):
            prompt = prompt_of(self.length, seed=2 + number)
            server, retries = self._scene.server, self._retries
            self.asks.append(Ask(server, prompt, self.count, stream=stream, retries=retries))
        return len(self.asks)


def test_some_deaths(model: Path) -> None:
    """One of each role, whenever the tests run; all the others are heavy ones."""
    with warm(model, *FLAGS["before the hand-off"]) as scene:
        a_death(scene, model, "before the hand-off", "prefill")
        a_death(scene, model, "in mid-stream", "decode")


@pytest.mark.heavy
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_death_at_any_moment(scene: Scene, model: Path, moment: str, victim: str) -> None:
    a_death(scene, model, moment, victim)
    if moment == "before the hand-off":
        # Only one of the two clients can be in the middle of it.
        a_death(scene, model, moment, victim, whole_first=True)


def a_death(
    scene: Scene, model: Path, moment: str, victim: str, *, whole_first: bool = False
) -> None:
    seen = what_is_seen(moment, victim)
    clients = Clients(scene, moment, 0 if seen == "nothing" else 5, whole_first=whole_first)
    with MOMENTS[moment](scene, clients.begin):
        scene.kill(victim)
    check(scene, model, clients, seen)
    right(scene, model)
    scene.nothing_leaks()


def what_is_seen(moment: str, victim: str) -> str:
    """What a client may notice of a death: `nothing`, or that it has to ask `again`."""
    if victim == "gateway":
        return "again"
    return "again" if victim == "memory" and moment in WITH_TOKENS else "nothing"


def check(scene: Scene, model: Path, clients: Clients, seen: str) -> None:
    for ask in clients.asks:
        want = ask.wait().wanted(model)
        if ask.error is None:
            assert ask.text == want
            continue
        assert seen == "again"
        # A client's own retries get past it, but for a stream that has begun.
        assert ask.stream
        assert isinstance(ask.error, (APIError, httpx.TransportError))
        assert ask.text
        assert want.startswith(ask.text)
        again = Ask(scene.server, ask.prompt, ask.count, stream=True, retries=5).wait()
        assert (again.error, again.text) == (None, want)


@pytest.mark.heavy
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", COLD)
def test_a_death_in_the_first_start(model: Path, moment: str, victim: str) -> None:
    with served(model, "--model-name", "demo", "--throttle", THROTTLE) as server:
        scene = Scene(server)
        seen = what_is_seen(moment, victim)
        clients = Clients(scene, moment, 0 if seen == "nothing" else 5)
        with MOMENTS[moment](scene, clients.begin):
            scene.kill(victim)
        check(scene, model, clients, seen)
        right(scene, model)
        scene.settle()
        held = scene.holds()
        assert (held["memory"], held["worker"], held["gateway"]) == (1, 2, 1)
        assert held["run directories"] == 1


@pytest.mark.heavy
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_death_while_it_drains(model: Path, victim: str) -> None:
    """Nobody can come again: who is broken off here asks another replica."""
    with served(model, "--model-name", "demo") as server:
        server.ready()
        scene = Scene(server)
        clients = Clients(scene, "while draining")
        with MOMENTS["while draining"](scene, clients.begin):
            scene.kill(victim)
        for ask in clients.asks:
            want = ask.wait().wanted(model)
            if victim in ("prefill", "decode"):
                assert (ask.error, ask.text) == (None, want)
                continue
            assert isinstance(ask.error, (APIError, httpx.TransportError))
            assert isinstance(ask.error, (InternalServerError, APIConnectionError)) or ask.stream
            assert bool(ask.text) == ask.stream
            assert want.startswith(ask.text)
        assert server.process.wait(30) == 0


# -- clients that leave ---------------------------------------------------------------------------


@pytest.mark.heavy
def test_clients_that_leave_at_any_moment(scene: Scene, model: Path, moment: str) -> None:
    """What they had is free at once, and whoever stays gets an answer."""
    visitors: list[Visitor] = []
    stays: list[Ask] = []

    def begin() -> int:
        clients = Clients(scene, moment)
        visitors.extend(
            Visitor(scene.server, prompt_of(clients.length, seed=9), clients.count, stream=stream)
            for stream in (True, False)
        )
        prompt = prompt_of(24, seed=2)
        stays.append(Ask(scene.server, prompt, clients.count, stream=True, retries=0))
        return 3

    with MOMENTS[moment](scene, begin):
        for visitor in visitors:
            visitor.leave()
    for visitor in visitors:
        visitor.leave()
    for ask in stays:
        assert (ask.wait().error, ask.text) == (None, ask.wanted(model))
    right(scene, model)
    scene.nothing_leaks()


# -- the process of the chat templates ------------------------------------------------------------


@pytest.mark.heavy
def test_the_process_of_the_templates_dies(model: Path) -> None:
    with served(model, "--model-name", "demo") as server:
        scene = Scene(server)

        def chat() -> str:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
            answer = server.post("/v1/chat/completions", {**body, "temperature": 0})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        want = chat()
        # The one that fills them in, then the one that is forked for that: as the gateway may not
        # start an interpreter where this runs as root, the front does.
        for which in (-1, 0):
            scene.processes("template")[which].kill()
            assert chat() == want


# -- the process that restores images -------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("moment", ["in mid-load", "from zero, in mid-load"])
def test_the_process_that_restores_dies(made: Made, moment: str) -> None:
    """The workers are its children, and go with it; fresh ones take their places."""
    flags = ("--throttle", THROTTLE, "--snapshot", made.store, "--no-snapshot-create")
    with served(made.model, "--model-name", "demo", *flags) as server:
        scene = Scene(server)
        if moment != "in mid-load":
            right(scene, made.model)
        clients = Clients(scene, moment)
        with MOMENTS[moment](scene, clients.begin):
            scene.kill("restorer")
        check(scene, made.model, clients, "nothing")
        right(scene, made.model)
