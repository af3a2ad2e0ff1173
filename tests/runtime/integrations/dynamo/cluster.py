"""NVIDIA Dynamo on this machine: its real front end and router, and our workers behind them.

Discovery is a folder, the request plane TCP and the event plane ZeroMQ, all on loopback, as it runs
without etcd and NATS.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import httpx
import psutil

from tests.runtime.serving import Server, served
from tests.runtime.snapshots import eventually
from tests.support import unavailable, without_settings

PYTHON = Path(sys.executable)
"""The front end is in the environment that the tests run in: `make test-dynamo`."""
MODEL = "m"
_END_S = 30.0
_START_S = 90.0


class Cluster:
    """A front end, and where workers register.

    Args:
        base: A folder for all that it keeps.
        port: The front end listens there.
        log: What the front end writes.
        process: The front end's, where there is one.
    """

    def __init__(
        self, base: Path, port: int, log: Path, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.base = base
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=90)
        self._log = log

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.base)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def worker(
        self,
        model: Path,
        *flags: object,
        role: str = "aggregated",
        under: Sequence[str] = (),
        **env: str,
    ) -> AbstractContextManager[Server]:
        """A worker while the context lasts; it ends well, and leaves nothing.

        Args:
            model: What it serves.
            flags: Further ones.
            role: What it does of a request.
            under: A command that runs it, on a host of its own for example.
            env: Further variables of its environment.
        """
        return served(
            model,
            *("--dynamo", "--role", role, "--model-name", MODEL, "--discovery-backend", "file"),
            *("--request-plane", "tcp", "--event-plane", "zmq"),
            *flags,
            under=under,
            verb="worker",
            **(self.environment | env),
        )

    # -- clients ---------------------------------------------------------------------------------

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL, "temperature": 0, **body})

    def complete(self, prompt: object, count: int = 8, **more: Any) -> dict[str, Any]:
        """A completion of exactly so many tokens; greedy by default."""
        answer = self.post("/v1/completions", **asked(prompt, count), **more)
        assert answer.status_code == 200, f"{answer.text}\n{self.log[-3000:]}"
        document: dict[str, Any] = answer.json()
        return document

    def text(self, prompt: object, count: int = 8, **more: Any) -> str:
        return str(self.complete(prompt, count, **more)["choices"][0]["text"])

    def models(self) -> list[str]:
        return [model["id"] for model in self.http.get("/v1/models").json()["data"]]

    def registered(self, namespace: str = "dynamo") -> list[str]:
        """What is in the discovery of a namespace, by component and endpoint."""
        names = [unquote(path.name) for path in (self.base / "kv" / "v1" / "instances").iterdir()]
        mine = [name.split("/")[1:3] for name in names if name.startswith(f"{namespace}/")]
        return sorted("/".join(parts) for parts in mine)

    def answers(self) -> bool:
        """Whether there is a worker that does. It takes a moment until one is known."""
        with suppress(httpx.HTTPError):
            return self.post("/v1/completions", **asked("Once", 1)).status_code == 200
        return False

    def ready(self) -> None:
        """Waits for the first answer."""
        eventually(self.answers, seconds=_START_S)


def asked(prompt: object, count: int) -> dict[str, Any]:
    """A body for exactly so many tokens."""
    return {"prompt": prompt, "max_tokens": count, "ignore_eos": True}


def environment(base: Path, host: str = "127.0.0.1") -> dict[str, str]:
    """What every process of a cluster finds, on the host of that address."""
    return {
        "DYN_FILE_KV": str(base / "kv"),
        "DYN_TCP_RPC_HOST": host,
        "DYN_TCP_RESPONSE_STREAM_HOST": host,
        "DYN_EVENT_PLANE_HOST": host,
        "DYN_LOG": "info",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(base),  # it keeps what models' files it has read
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.5",
    }


def installed() -> None:
    """Makes sure that Dynamo is."""
    if importlib.util.find_spec("dynamo") is None:
        unavailable("there is no NVIDIA Dynamo in this environment: make test-dynamo")


@contextmanager
def cluster(
    *flags: object, migrations: int = 3, beside: Cluster | None = None, **env: str
) -> Iterator[Cluster]:
    """A front end with a KV-aware router while the context lasts.

    Args:
        flags: Further ones.
        migrations: How many workers may die under a request.
        beside: Another front end, whose workers are this one's, too.
        env: Further variables of the front end's.
    """
    installed()
    base = Path(tempfile.mkdtemp(prefix="dyn-"))
    shared = environment(base if beside is None else beside.base)
    port, log = free_port(), base / "frontend.log"
    command = [
        *(PYTHON, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port),
        *("--router-mode", "kv", "--discovery-backend", "file", "--request-plane", "tcp"),
        *("--event-plane", "zmq", "--migration-limit", migrations, *flags),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=without_settings() | shared | env,
            stdout=out,
            stderr=out,
            cwd=base,
        )
    made = Cluster(base, port, log, process)
    try:
        eventually(lambda: _listens(process, port, made), seconds=_START_S)
        yield made
    except BaseException:
        print(made.log[-10_000:], file=sys.stderr)
        raise
    finally:
        made.http.close()
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_S)
        shutil.rmtree(base, ignore_errors=True)


def _listens(process: subprocess.Popen[bytes], port: int, made: Cluster) -> bool:
    assert process.poll() is None, made.log
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """One that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(worker: Server) -> None:
    """The worker dies, as a machine does: its front without a word, and all that it had with it."""
    worker.ends_with = (-9,)
    family = psutil.Process(worker.process.pid).children(recursive=True)
    worker.process.kill()
    psutil.wait_procs(family, timeout=_END_S)
    for left in worker.runs.iterdir():  # the next start there would have done so
        shutil.rmtree(left, ignore_errors=True)


def served_by(workers: Sequence[Server], ask: Callable[[], object]) -> list[int]:
    """How many requests each of the workers got by something."""
    before = [requests_of(worker) for worker in workers]
    ask()
    return [requests_of(worker) - seen for worker, seen in zip(workers, before, strict=True)]


def requests_of(worker: Server) -> int:
    """How many requests a worker has answered so far."""
    name = "coldframe_request_success_total"
    return int(sum(n for key, n in worker.metrics().items() if key.startswith(name)))


class Tickets(NamedTuple):
    """Of requests that came with a ticket for their KV, so far."""

    taken: int
    lost: int
    nbytes: int


def tickets(worker: Server) -> Tickets:
    """What became of the KV that requests were to come with, once that is all told."""
    before = None
    while (found := _tickets(worker)) != before:
        before = found
        time.sleep(1.5)  # the front asks for these numbers once a second
    return found


def _tickets(worker: Server) -> Tickets:
    told = worker.metrics()
    outcomes = [int(told.get(f"coldframe_kv_tickets_total{{{o}}}", 0)) for o in ("taken", "lost")]
    return Tickets(*outcomes, int(told.get("coldframe_kv_taken_bytes_total", 0)))


def stages(worker: Server) -> list[tuple[str, str, str]]:
    """What was done for requests behind the start: name, process and note of each span."""
    told = worker.get("/startup").json()["latest"]["stages"]
    return [(stage["name"], stage["process"], stage.get("note", "")) for stage in told]


def running(worker: Server) -> int:
    """Sequences that are with its workers."""
    return int(worker.get("/startup").json()["queue"]["running"])
