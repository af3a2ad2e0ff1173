"""Processes that hang instead of dying, and a whole replica that is stopped and goes on.

The limits behind which a process counts as hung are minutes; here they are seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from coldframe.loader.errors import ReplicaError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import memories as memories_module
from coldframe.runtime.replica import router
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.scaling.policies import FixedKeepAlive
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.moments import MOMENTS, Ask, Scene, stop
from tests.runtime.serving import served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
pytestmark = pytest.mark.heavy

LIMIT_S = 3.0
PROMPT = prompt_of(24)


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


@contextmanager
def short(patch: pytest.MonkeyPatch, module: ModuleType, **limits: object) -> Iterator[None]:
    """Limits of a module that hold until those who hang have been found out."""
    with patch.context() as patched:
        for name, value in limits.items():
            patched.setattr(module, name, value)
        yield


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), **more)  # type: ignore[arg-type]


def hang(replica: Replica, name: str) -> int:
    """Stops the one process of that name: its id."""
    (pid,) = (pid for other, pid in replica.pids.items() if other.startswith(name))
    stop(psutil.Process(pid))
    return pid


# -- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before the prefill", "before the ack", "in mid-stream"])
def test_a_worker_that_hangs_is_replaced_and_its_requests_go_on(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    silence = {"prefill": LIMIT_S, "decode": LIMIT_S}
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        if moment == "in mid-stream":
            client = ask(replica, PROMPT, 900)
            wait_for(replica, lambda: len(client.events) > 3)
            stuck = hang(replica, "decode")
        else:
            stuck = hang(replica, "prefill" if moment == "before the prefill" else "decode")
            client = ask(replica, PROMPT, 900)
        with short(monkeypatch, router, ACK_S=LIMIT_S, SILENCE_S=silence):
            wait_for(replica, lambda: stuck not in replica.pids.values())
        assert not psutil.pid_exists(stuck)
        assert not client.done
        finish(replica, client)
        assert client.error is None
        assert len(client.tokens) == 900
        assert client.tokens[:300] == expected(model, tuple(PROMPT), 300)
        assert replica.error is None


# -- the memory service ---------------------------------------------------------------------------


@contextmanager
def supervised(model: Path, runs: Path, **more: object) -> Iterator[Supervisor]:
    loop, log = Loop(), Log(process="front")
    supervisor = Supervisor(
        options(model, runs, **more), FixedKeepAlive(), Recorder("front"), log, loop, None, now()
    )
    try:
        yield supervisor
    finally:
        supervisor.close()
        loop.close()


def until(supervisor: Supervisor, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "it never came"
        supervisor.loop.poll(min(0.05, supervisor.wait_s))
        supervisor.tick()
        supervisor.step()


@pytest.mark.parametrize("moment", ["while it loads", "when it is warm", "when many ask"])
def test_a_memory_service_that_hangs_is_one_that_has_died(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    slow = {"throttle": 4e6} if moment == "while it loads" else {}
    monkeypatch.setattr(memories_module, "_SEND_TIMEOUT_S", 2)
    with supervised(model, no_leaks, **slow) as supervisor:
        replica = supervisor.replica
        assert replica is not None
        if moment == "while it loads":
            until(supervisor, lambda: replica.board is not None)
        else:
            until(supervisor, lambda: supervisor.state == "warm")
        stuck = hang(replica, "memory")
        if moment == "when many ask":
            # More than its socket takes: it is whoever sends that has to notice.
            clients = [asks(supervisor, 8) for _ in range(2000)]
            until(supervisor, lambda: supervisor.starts == 2)
        else:
            clients = [asks(supervisor, 8)]
            with short(monkeypatch, memories_module, _SILENCE_S=LIMIT_S):
                until(supervisor, lambda: supervisor.starts == 2)
        assert not psutil.pid_exists(stuck)
        until(supervisor, lambda: clients[0].done)
        assert clients[0].tokens == expected(model, tuple(PROMPT), 8)
        assert supervisor.starts == 2
        for client in clients[1:]:
            supervisor.cancel(client.request)


def asks(supervisor: Supervisor, count: int) -> Client:
    client = Client()
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    client.request = supervisor.submit(params, client, prompt_ids=tuple(PROMPT))
    return client


def test_who_has_tokens_is_told_that_the_memory_service_hangs(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervised(model, no_leaks) as supervisor:
        until(supervisor, lambda: supervisor.state == "warm")
        client = asks(supervisor, 900)
        until(supervisor, lambda: len(client.events) > 3)
        assert supervisor.replica is not None
        # Decode needs nothing of it until an answer is over.
        hang(supervisor.replica, "decode")
        hang(supervisor.replica, "memory")
        with short(monkeypatch, memories_module, _SILENCE_S=LIMIT_S):
            until(supervisor, lambda: supervisor.starts == 2)
        assert isinstance(client.error, ReplicaError)
        assert "did not answer" in str(client.error)
        assert client.tokens == expected(model, tuple(PROMPT), len(client.events))
        until(supervisor, lambda: supervisor.state == "warm")


# -- the gateway ----------------------------------------------------------------------------------

IMPATIENT_WITH_THE_GATEWAY = {
    "coldframe.runtime.endpoint.frontdesk._SILENCE_S": 7.0,
    "coldframe.runtime.endpoint.frontdesk._PING_S": 0.5,
}
IMPATIENT_S = 15.0
"""Of which a stop counts two, and up to two more go by between a question and the look at its
answer: the rest is what a loaded machine may take to have everybody go on."""
IMPATIENT = {
    "coldframe.runtime.replica.router.ACK_S": IMPATIENT_S,
    "coldframe.runtime.replica.router.SILENCE_S": {"prefill": IMPATIENT_S, "decode": IMPATIENT_S},
    "coldframe.runtime.replica.memories._SILENCE_S": IMPATIENT_S,
    "coldframe.runtime.endpoint.frontdesk._SILENCE_S": IMPATIENT_S,
    "coldframe.runtime.endpoint.frontdesk._PING_S": 0.5,
}
STOPPED_S = 10.0


def test_a_gateway_that_hangs_is_replaced_behind_the_same_port(model: Path) -> None:
    with served(model, "--model-name", "demo", front=IMPATIENT_WITH_THE_GATEWAY) as server:
        server.ready()
        scene = Scene(server)
        scene.settle()
        stuck = scene.process("gateway")
        stop(stuck)
        # The kernel takes the connection, and the next gateway answers it.
        client = Ask(server, PROMPT, 50, stream=True, retries=0).wait()
        assert (client.error, client.text) == (None, client.wanted(model))
        assert scene.process("gateway").pid != stuck.pid
        scene.nothing_leaks()


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["in mid-load", "in mid-stream"])
def test_nobody_is_taken_for_dead_when_all_were_stopped(model: Path, moment: str) -> None:
    """As when a machine is suspended, or a platform takes the processor away between requests."""
    slow = ("--throttle", "2MB/s") if moment == "in mid-load" else ()
    with served(model, "--model-name", "demo", *slow, front=IMPATIENT) as server:
        scene = Scene(server)
        if moment != "in mid-load":
            server.ready()
        asked: list[Ask] = []

        def begin() -> int:
            asked.append(Ask(server, PROMPT, 300, stream=True, retries=0))
            return 1

        front = psutil.Process(server.process.pid)
        with MOMENTS[moment](scene, begin):
            everybody = [front, *front.children(recursive=True)]
            for process in everybody:
                stop(process)
        for process in everybody:
            stop(process)  # also the one that held the moment
        goes_on = time.monotonic() + IMPATIENT_S + 2
        eventually(lambda: time.monotonic() > goes_on, seconds=60)
        for process in everybody:
            process.resume()
        assert (asked[0].wait().error, asked[0].text) == (None, asked[0].wanted(model))
        for kind, count in (("memory", 1), ("worker", 2), ("gateway", 1)):
            assert len([p for p in scene.processes(kind) if p in everybody]) == count


def test_who_is_stopped_between_two_requests_has_not_been_idle(model: Path) -> None:
    with served(model, "--model-name", "demo", "--idle", 8) as server:
        Ask(server, PROMPT, 8, stream=True, retries=0).wait()
        scene = Scene(server)
        front = psutil.Process(server.process.pid)
        everybody = [front, *front.children(recursive=True)]
        for process in everybody:
            stop(process)
        goes_on = time.monotonic() + STOPPED_S
        eventually(lambda: time.monotonic() > goes_on)
        for process in everybody:
            process.resume()
        client = Ask(server, PROMPT, 8, stream=True, retries=0).wait()
        assert (client.error, client.text) == (None, client.wanted(model))
        for kind in ("memory", "worker"):
            assert set(scene.processes(kind)) <= set(everybody)
