"""`coldframe serve` as a container has it: the real command, real clients, and nothing left."""

from __future__ import annotations

import functools
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from tests.runtime.helpers import expected
from tests.runtime.snapshots import eventually, left_behind
from tests.support import without_settings

COLDFRAME = str(Path(sys.executable).parent / "coldframe")
_PATCHED = """
import importlib, json, sys
for name, value in json.loads(sys.argv.pop(1)).items():
    module, _, constant = name.rpartition(".")
    assert hasattr(importlib.import_module(module), constant), name
    setattr(sys.modules[module], constant, value)
from coldframe.runtime.cli import main
sys.exit(main())
"""
_END_S = 30.0
_REFUSED = re.compile(r"Traceback[^\n]*\n(  [^\n]*\n)+dynamo\._core\.\w+: ")
"""How Dynamo's runtime logs what a worker has refused."""


@functools.cache
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def ids_of(model: Path, text: str) -> tuple[int, ...]:
    """A text's tokens, the model's own special ones included."""
    return tuple(tokenizer(model).encode(text).ids)


def greedy(model: Path, prompt: tuple[int, ...], count: int) -> str:
    """What Transformers says to a prompt."""
    return str(tokenizer(model).decode(expected(model, prompt, count)))


class Server:
    """A server that runs.

    Args:
        process: The front.
        runs: Where it makes its run directory.
        log: What it writes to its standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], runs: Path, log: Path) -> None:
        self.process = process
        self.runs = runs
        self.ends_with: tuple[int, ...] = (0,)
        """The exit statuses that are expected."""
        self._log = log
        self._port = 0

    @property
    def port(self) -> int:
        """The port that it listens on; waits for it."""
        if not self._port:
            front = psutil.Process(self.process.pid)

            def listening() -> int:
                assert self.process.poll() is None, self.log
                found = [c for c in front.net_connections("tcp") if c.status == "LISTEN"]
                self._port = found[0].laddr.port if found else 0
                return self._port

            eventually(listening)
        return self._port

    @property
    def bound(self) -> bool:
        """Whether the port is known."""
        return self._port != 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def openai(self, **more: Any) -> OpenAI:
        """The client that users have; the test closes it."""
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "timeout": 60, **more})

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def metrics(self) -> dict[str, float]:
        """The numbers at /metrics, summed over models: the other labels in braces."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "model"]
                name = f"{sample.name}{{{','.join(labels)}}}" if labels else sample.name
                found[name] = found.get(name, 0) + sample.value
        return found

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def complete(self, **body: Any) -> str:
        """A completion's text; greedy by default."""
        answer = self.post("/v1/completions", {"prompt": "Once", "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def ready(self) -> None:
        """Waits until it has made a token."""
        eventually(lambda: self.get("/readyz").status_code == 200, seconds=60)

    def listens(self) -> bool:
        """Whether anybody can connect."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def gateway(self) -> psutil.Process:
        """The process that clients talk to."""
        (found,) = self._children("coldframe.runtime.gateway.process")
        return found

    def memory_services(self) -> list[psutil.Process]:
        """The processes that hold weights, in the order of their starts."""
        found = self._children("coldframe.loader.memory_service.service")
        return sorted(found, key=lambda process: process.create_time())

    def peer_finders(self) -> list[psutil.Process]:
        """The process that finds peers in Dynamo's discovery, where there is one."""
        return self._children("coldframe.runtime.integrations.dynamo.peers")

    def worker(self, role: str) -> psutil.Process:
        """The process of the one worker that is `prefill` or `decode`; the first starts first."""
        found = self._children("coldframe.runtime.worker.process")
        # Both may have been started within one tick of the clock.
        prefill, decode = sorted(found, key=lambda process: (process.create_time(), process.pid))
        return prefill if role == "prefill" else decode

    def _children(self, what: str) -> list[psutil.Process]:
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in mine if _runs(process, what)]


def _runs(process: psutil.Process, what: str) -> bool:
    with suppress(psutil.Error):
        return what in " ".join(process.cmdline())
    return False


@contextmanager
def served(
    model: Path,
    *flags: object,
    front: Mapping[str, object] | None = None,
    under: Sequence[str] = (),
    verb: str = "serve",
    **env: str,
) -> Iterator[Server]:
    """Runs the command on a port of its own; afterwards it has ended well and left nothing.

    Args:
        model: What it serves.
        flags: Further ones.
        front: Constants of modules that are others in the front, such as how long it waits.
        under: A command that runs it.
        verb: The subcommand.
        env: Further variables of its environment.
    """
    # A socket's path is short, and pytest's own folders are not.
    base = Path(tempfile.mkdtemp(prefix="cf-"))
    runs, log = base / "r", base / "log"
    runs.mkdir()
    clean = without_settings()
    mine = {"COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_SNAPSHOT": "off", **env}
    program = [COLDFRAME]
    if front is not None:
        program = [sys.executable, "-P", "-c", _PATCHED, json.dumps(front)]
    command = [*under, *program, verb, model, "--host", "127.0.0.1", "--port", 0, *flags]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [str(word) for word in command], env=clean | mine, stderr=stderr, stdout=stderr
        )
    server = Server(process, runs, log)
    try:
        yield server
        process.terminate()
        assert process.wait(_END_S) in server.ends_with, server.log
        eventually(lambda: not left_behind(runs))
        assert list(runs.iterdir()) == [], server.log
        if -9 not in server.ends_with:  # else it was cut off wherever it was
            assert "Traceback" not in _REFUSED.sub("", server.log), server.log
        assert not (server.bound and server.listens())
    except BaseException:
        print(server.log, file=sys.stderr)  # pytest shows it with the failure
        raise
    finally:
        process.kill()
        process.wait(_END_S)
        shutil.rmtree(base, ignore_errors=True)


def request(path: str, body: bytes, *, method: str = "POST", more: str = "") -> bytes:
    """A whole request, as it stands on the wire."""
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode() + body


def everything(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = bytearray()
    while part := sock.recv(1 << 16):
        found += part
    return bytes(found)


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found, answer[:200]
    return int(found[1])


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Calls them at once, each in a thread of its own; raises what one of them has raised."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def call(place: int) -> None:
        try:
            results[place] = jobs[place]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
