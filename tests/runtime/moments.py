"""Each moment of a request's life, reached for certain and held while somebody is killed.

Nothing waits for a time to pass: a moment is held by stopping the process whose next step would
end it, and it is reached when a client, or a number at /metrics, says so.

    the first stage is not in    the memory service is stopped before it reads anything
    the load is half done        the memory service is stopped between two stages
    the KV is not let go         the first token is out, and the memory service, which has to hear
                                 of the hand-off before the front does, is stopped
    the hand-off is sent         it lies before a decode worker that is stopped
    the answer is half done      the decode worker is stopped between two tokens
    the KV is full               likewise, and others wait for blocks
    draining                     likewise, and the front has been told to end
    parking                      the memory service is stopped, and told to give its KV back
    parked                       it has done so
    waking                       the request that woke it lies before a prefill worker that is
                                 stopped

Starts from zero are the first two again, behind a server that has been put to sleep.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from openai import APIError

from tests.runtime.serving import Server, greedy, request
from tests.runtime.snapshots import eventually

__all__ = ["MOMENTS", "Ask", "Scene", "Visitor"]

_MODULES = {
    "memory": "coldframe.loader.memory_service.service",
    "worker": "coldframe.runtime.worker.process",
    "gateway": "coldframe.runtime.gateway.process",
    "template": "coldframe.runtime.gateway.template_process",
    "restorer": "coldframe.snapshot.restorer",
}
_PULSE_S = 0.004
_PATIENCE_S = 100.0


class Ask:
    """A request as openai-python sends it, in a thread of its own.

    Args:
        server: Whom it is for.
        prompt: Token ids.
        count: How many tokens are wanted.
        stream: Whether they are wanted as they come.
        retries: How often the client tries again by itself.
    """

    def __init__(
        self, server: Server, prompt: Sequence[int], count: int, *, stream: bool, retries: int
    ) -> None:
        self.prompt = tuple(prompt)
        self.count = count
        self.stream = stream
        self.text = ""
        """What came of the answer."""
        self.error: Exception | None = None
        self._server = server
        self._retries = retries
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._server.openai(max_retries=self._retries) as client:
                answer = client.completions.create(
                    model="demo",
                    prompt=list(self.prompt),
                    max_tokens=self.count,
                    temperature=0,
                    stream=self.stream,
                    extra_body={"ignore_eos": True},
                )
                for chunk in answer if self.stream else [answer]:
                    self.text += chunk.choices[0].text
        except (APIError, httpx.TransportError) as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Ask:
        """Waits for its end."""
        self._thread.join(_PATIENCE_S)
        assert self.over, "there never was an answer"
        return self

    def wanted(self, model: Path) -> str:
        """The answer of Transformers."""
        return greedy(model, self.prompt, self.count)


class Visitor:
    """A client that asks and leaves without its answer."""

    def __init__(self, server: Server, prompt: Sequence[int], count: int, *, stream: bool) -> None:
        body = (
            f'{{"prompt": {list(prompt)}, "max_tokens": {count}, "ignore_eos": true, '
            f'"temperature": 0, "stream": {str(stream).lower()}}}'
        )
        self._sock = server.connect()
        self._sock.sendall(request("/v1/completions", body.encode()))

    def leave(self) -> None:
        self._sock.close()


class Scene:
    """A server whose processes are known by what they do, and what it holds when nobody asks.

    Args:
        server: The server.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._workers: dict[str, psutil.Process] = {}
        self._held: dict[str, int] = {}

    # -- its processes ---------------------------------------------------------------------------

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of a kind that run, the oldest first."""
        found = []
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ends meanwhile
                if _MODULES[kind] in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found)]

    def process(self, name: str) -> psutil.Process:
        """`memory`, `prefill`, `decode`, `gateway`, `template` or `restorer`; waits for it."""
        if name not in ("prefill", "decode"):
            eventually(lambda: self.processes(name))
            return self.processes(name)[0]
        eventually(lambda: len(self._take_roll()) == 2)
        return self._workers[name]

    def _take_roll(self) -> dict[str, psutil.Process]:
        """The workers by role. Of two that are new the one for prefill was started first."""
        running = self.processes("worker")
        self._workers = {role: p for role, p in self._workers.items() if p in running}
        new = [process for process in running if process not in self._workers.values()]
        free = [role for role in ("prefill", "decode") if role not in self._workers]
        if len(new) == len(free):
            self._workers.update(zip(free, new, strict=True))
        return self._workers

    def kill(self, name: str) -> None:
        victim = self.process(name)
        victim.kill()
        victim.wait(20)

    @contextmanager
    def stopped(self, name: str) -> Iterator[psutil.Process]:
        """Stops a process; it goes on afterwards, where it has not been killed."""
        process = self.process(name)
        stop(process)
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    # -- what it says ----------------------------------------------------------------------------

    def metric(self, name: str) -> int:
        return int(self.server.metrics().get(name, 0))

    def tokens(self) -> int:
        """How many this gateway has passed on."""
        return self.metric("coldframe_generation_tokens_total")

    def running(self) -> int:
        """How many requests the front has."""
        return int(self.server.get("/startup").json()["queue"]["running"])

    def progress(self) -> tuple[int, int]:
        """How many bytes of the weights are in, and of how many."""
        told = self.server.get("/startup").json()
        return int(told["bytes_done"]), int(told["bytes_total"])

    def sleep(self, level: int) -> None:
        """Parks it (1), or takes it to zero (2)."""
        assert self.server.post(f"/sleep?level={level}", {}).status_code == 200

    # -- what it holds ---------------------------------------------------------------------------

    def holds(self) -> dict[str, int]:
        """Processes by kind, the front's descriptors, run directories and KV blocks in use."""
        held = {kind: len(self.processes(kind)) for kind in ("memory", "worker", "gateway")}
        held["descriptors"] = psutil.Process(self.server.process.pid).num_fds()
        held["run directories"] = len(list(self.server.runs.iterdir()))
        held["KV blocks"] = self.metric("coldframe_kv_blocks{used}")
        return held

    def settle(self) -> None:
        """Takes note of what it holds when nobody asks."""

        def still() -> bool:
            before, self._held = self._held, self.holds()
            return before == self._held and not self._held["KV blocks"]

        eventually(still)

    def nothing_leaks(self) -> None:
        """It holds what it held, some moments from now at the latest."""
        last: dict[str, int] = {}

        def same() -> bool:
            last.update(self.holds())
            return last == self._held

        try:
            eventually(same, seconds=40)
        except AssertionError as error:
            raise AssertionError(f"it held {self._held}, and now {last}") from error


def stop(process: psutil.Process) -> None:
    """Stops a process, and returns when all its threads stand still."""
    process.suspend()
    eventually(lambda: process.status() == psutil.STATUS_STOPPED)


def pulse(process: psutil.Process, seconds: float = _PULSE_S) -> None:
    """Lets a process that is stopped go on for a moment."""
    process.resume()
    time.sleep(seconds)
    stop(process)


# -- the moments ----------------------------------------------------------------------------------

Begin = Callable[[], int]
"""Has the clients ask: how many they are."""
Moment = Callable[[Scene, Begin], AbstractContextManager[None]]


@contextmanager
def before_the_first_stage(scene: Scene, begin: Begin) -> Iterator[None]:
    asks: list[int] = []
    if not scene.processes("memory"):
        asks.append(begin())  # which starts it
    with scene.stopped("memory"):
        count = asks[0] if asks else begin()
        scene.process("decode")
        eventually(lambda: scene.running() == count)
        # It had some milliseconds, in which no stage can have come in.
        done, total = scene.progress()
        assert done == 0 or done < total / 4
        yield


@contextmanager
def in_mid_load(scene: Scene, begin: Begin) -> Iterator[None]:
    begin()
    with scene.stopped("memory") as memory:
        done = total = 0
        while not done or done < total / 4:
            pulse(memory, 0.05)
            done, total = scene.progress()
        assert done < total
        yield


@contextmanager
def before_the_handoff(scene: Scene, begin: Begin) -> Iterator[None]:
    with scene.stopped("memory") as memory:
        before, count = scene.tokens(), begin()
        eventually(lambda: scene.running() == count)
        while scene.tokens() == before:
            # It gives the prefill worker its blocks, and is stopped again before that has used
            # them: the prompt takes many times as long as this.
            pulse(memory)
            late = time.monotonic() + 1.0
            while scene.tokens() == before and time.monotonic() < late:
                time.sleep(0.01)
        yield


@contextmanager
def before_the_acknowledgement(scene: Scene, begin: Begin) -> Iterator[None]:
    with scene.stopped("decode"):
        before, count = scene.tokens(), begin()
        eventually(lambda: scene.tokens() == before + count)
        # What the prefill worker said before it answered this, the hand-offs, has been heard.
        scene.server.complete(max_tokens=1)
        yield


@contextmanager
def in_mid_stream(scene: Scene, begin: Begin) -> Iterator[None]:
    with scene.stopped("decode") as decode:
        before, count = scene.tokens(), begin()
        while scene.tokens() < before + 5 * count:
            pulse(decode)
        assert scene.running() == count
        yield


@contextmanager
def while_the_kv_is_full(scene: Scene, begin: Begin) -> Iterator[None]:
    with scene.stopped("decode"):
        before, count = scene.tokens(), begin()
        eventually(lambda: scene.running() == count)
        eventually(lambda: 0 < scene.tokens() - before < count)
        eventually(lambda: scene.metric("coldframe_kv_blocks{free}") < 7)
        yield


@contextmanager
def while_draining(scene: Scene, begin: Begin) -> Iterator[None]:
    with in_mid_stream(scene, begin):
        scene.server.process.terminate()
        eventually(lambda: not scene.server.listens())
        yield


@contextmanager
def while_parking(scene: Scene, begin: Begin) -> Iterator[None]:
    with scene.stopped("memory"):
        scene.sleep(1)
        yield
    begin()


@contextmanager
def while_parked(scene: Scene, begin: Begin) -> Iterator[None]:
    scene.sleep(1)
    yield
    begin()


@contextmanager
def while_waking(scene: Scene, begin: Begin) -> Iterator[None]:
    scene.sleep(1)
    with scene.stopped("prefill"):
        count = begin()
        eventually(lambda: scene.running() == count)
        yield


@contextmanager
def from_zero_before_the_first_stage(scene: Scene, begin: Begin) -> Iterator[None]:
    scene.sleep(2)
    with before_the_first_stage(scene, begin):
        yield


@contextmanager
def from_zero_in_mid_load(scene: Scene, begin: Begin) -> Iterator[None]:
    scene.sleep(2)
    with in_mid_load(scene, begin):
        yield


MOMENTS: dict[str, Moment] = {
    "before the first stage": before_the_first_stage,
    "in mid-load": in_mid_load,
    "before the hand-off": before_the_handoff,
    "before the acknowledgement": before_the_acknowledgement,
    "in mid-stream": in_mid_stream,
    "while the KV is full": while_the_kv_is_full,
    "while draining": while_draining,
    "while parking": while_parking,
    "while parked": while_parked,
    "while waking": while_waking,
    "from zero, before the first stage": from_zero_before_the_first_stage,
    "from zero, in mid-load": from_zero_in_mid_load,
}
