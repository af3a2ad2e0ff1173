"""A real gateway, and the front that it is told by, played by the test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import Span
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.endpoint.frontstats import FrontStats
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.listen import bind
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.timeline.timeline import Timeline

_MAIN = "import time; from coldframe.runtime.gateway.process import main; t = time.monotonic_ns(); "
_END_S = 30.0

OPEN = {"ready", "zero", "parked"}
"""The phases in which requests are welcome."""


class Front:
    """Speaks for the front: each model answers with its name and what it was asked.

    Args:
        channel: The socket to the gateway.
        names: The models' names.
        url: Where the gateway listens.
        log: What the gateway writes to its standard error.

    Attributes:
        asked: Model and question, in their order.
        submitted: The sequences that the gateway has given to workers.
        cancelled: The numbers of those that it has taken back.
        silent: Models that answer nothing that they are asked.
        asleep: Models that stay where they are when they are told to wake up.
        drained: Set when the gateway has said that it is done.
    """

    def __init__(self, channel: Channel, names: tuple[str, ...], url: str, log: Path) -> None:
        self.url = url
        self.asked: list[tuple[str, str]] = []
        self.submitted: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self.silent: set[str] = set()
        self.asleep: set[str] = set()
        self.drained = threading.Event()
        self.began_ns = time.monotonic_ns()
        self._names = names
        self._channel = channel
        self._log = log
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="front")
        self._thread.start()

    # -- what a test says ------------------------------------------------------------------------

    def send(self, body: Mapping[str, Any]) -> None:
        with self._lock:
            self._channel.send(body)

    def state(
        self, model: str, phase: str, error: ColdframeError | None = None, **more: Any
    ) -> None:
        """Says how far a model is."""
        told = None if error is None else error.to_wire()
        given = {"stage": None, "open": phase in OPEN, "error": told, **more}
        state = LoadState(phase, **given)
        self.send({"type": "state", "model": model, **state.to_wire()})

    def card(self, model: str, **more: Any) -> None:
        """Says what a model is; its chat template says whose it is."""
        template = f"[{model}]{{{{ messages[0].content }}}}"
        given: dict[str, Any] = {"context_length": 4096, "vocab_size": 1000, **more}
        card = ModelCard(model, 1_700_000_000, chat_template=template, **given)
        self.send({"type": "model", "model": model, "card": card.to_wire()})

    def ready(self, *models: str) -> None:
        """These are warm; without any, all are."""
        for model in models or self._names:
            self.card(model)
            self.state(model, "ready")

    def answer(self, submitted: Mapping[str, Any]) -> None:
        """A sequence is answered: with its model's name, and its prompt."""
        number, model = submitted["id"], submitted["model"]
        prompt = submitted["prompt"] if submitted["prompt"] is not None else "ids"
        wanted = submitted["params"]["logprobs"]
        likely = [None, []] if wanted is None else [[7, -0.5, "x"], [[7, -0.5, "x"]] * wanted]
        items = [
            [number, 7, f"{model}: ", None, 3, *likely, 0],
            [number, 7, prompt, "stop", 3, *likely, 0],
        ]
        self.send({"type": "tokens", "items": items})

    # -- what a client says ----------------------------------------------------------------------

    def openai(self, **more: Any) -> OpenAI:
        """The client that users have; the test closes it."""
        given = {"base_url": f"{self.url}/v1", "api_key": "none", "timeout": 30, "max_retries": 0}
        return OpenAI(**{**given, **more})

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **more)

    def complete(self, model: str | None = None, prompt: str = "hi") -> httpx.Response:
        """A completion, of whatever status."""
        named = {} if model is None else {"model": model}
        return self.post("/v1/completions", {"prompt": prompt, **named})

    def count(self, model: str, what: str) -> int:
        """How often something was asked of a model."""
        return Counter(self.asked)[model, what]

    @property
    def log(self) -> list[dict[str, Any]]:
        """The gateway's log so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                message = self._channel.recv()
                if message is None:
                    return
                self._take(message)
            except ReplicaError:
                return

    def _take(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "submit":
                self.submitted.append(body)
                if body["model"] not in self.silent:
                    self.answer(body)
            case "cancel":
                self.cancelled.append(body["id"])
            case "ask":
                self.asked.append((body["model"], body["what"]))
                answer = {"type": "answer", "id": body["id"]}
                self.send({**answer, "body": self._told(body["model"], body["what"])})
            case "drained":
                self.drained.set()

    def _told(self, model: str, what: str) -> dict[str, Any]:
        match what:
            case "startup":
                return {"timeline": self._timeline(model), "began_ns": self.began_ns}
            case "stats":
                return self._stats(model)
            case "sleep1":
                self.state(model, "parked")
            case "sleep2":
                self.state(model, "zero")
            case "wake_up" if model not in self.asleep:
                self.state(model, "starting", open=True)
                self.ready(model)
        return {}

    def _timeline(self, model: str) -> dict[str, Any]:
        """A start that is over now, with a stage that has the model's name for a note."""
        now = time.monotonic_ns()
        spans = [Span("prefill[head]", "prefill-0", self.began_ns, now, model)]
        return Timeline(spans, self.began_ns, now).to_json()

    def _stats(self, model: str) -> dict[str, Any]:
        """Numbers that tell the models apart; the first one's has the shared processes."""
        number = self._names.index(model) + 1
        memory = {"memory": {"anon": 100 * number}}
        if number == 1:
            memory |= {"front": {"anon": 1}, "gateway": {"anon": 2}}
        return FrontStats(weights_bytes=number, kv_blocks_total=number, memory=memory).to_wire()

    def close(self) -> None:
        self._channel.hang_up()
        self._thread.join()
        self._channel.close()


@contextmanager
def fronted(
    folder: Path, *names: str, environ: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[Front]:
    """A gateway that serves; afterwards it has ended.

    Args:
        folder: Gets its log.
        names: The models' names.
        environ: Further variables of its environment.
        settings: What it is told beside the names.
    """
    listener = bind("127.0.0.1", 0)
    ours, theirs = socket.socketpair()
    log = folder / "gateway.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{_MAIN}main({theirs.fileno()}, t, t)"],
            pass_fds=[theirs.fileno()],
            stderr=stderr,
            env={**os.environ, **(environ or {})},
        )
    theirs.close()
    channel = Channel(ours)
    told = GatewaySettings(names, **{"platform": "generic", **settings})
    body = {"type": "settings", "settings": told.to_wire(), "parent": os.getpid()}
    channel.send(body, (listener.fileno(),))
    port = listener.getsockname()[1]
    listener.close()
    front = Front(channel, names, f"http://127.0.0.1:{port}", log)
    try:
        yield front
        assert "Traceback" not in log.read_text()
    except BaseException:
        print(log.read_text(), file=sys.stderr)  # pytest shows it with the failure
        raise
    finally:
        front.close()
        try:
            process.wait(_END_S)  # by itself: its front is gone
        finally:
            process.kill()
            process.wait()
