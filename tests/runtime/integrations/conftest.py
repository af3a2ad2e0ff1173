"""What the job handler stands between: a server that speaks OpenAI's API, and RunPod's queue."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

KEY = "the-key"
PATIENCE_S = 30.0


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with JSON both ways."""

    protocol_version = "HTTP/1.1"

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")

    def answer(self, status: int, document: object = None) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server:
    """A server on a free port of the loopback, for as long as the context lasts."""

    def __init__(self, handler: type[Handler]) -> None:
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (handler,), {"owner": self})
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class OpenAIServer(Server):
    """Says each word of a prompt; what else it does, the prompt's first word tells it.

    `slow` waits for `go` before each word, `half` breaks off, `broken` ends with an error.
    """

    def __init__(self) -> None:
        super().__init__(_OpenAIHandler)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.go = threading.Semaphore(0)
        self.gone = threading.Event()
        self.together = threading.Barrier(2)


class _OpenAIHandler(Handler):
    owner: OpenAIServer

    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": "demo"}]})

    def do_POST(self) -> None:
        body = self.body()
        self.owner.seen.append((self.path, body))
        if self.headers.get("authorization") != f"Bearer {KEY}":
            self.answer(401, {"error": {"message": "There is no such key."}})
            return
        chat = self.path == "/v1/chat/completions"
        words = (body["messages"][-1]["content"] if chat else body["prompt"]).split()
        if words[0] == "refuse":
            self.answer(400, {"error": {"message": "temperature must be at most 2."}})
        elif words[0] == "teapot":
            self.answer(503, "no JSON object")
        elif words[0] == "meet":
            self.owner.together.wait(PATIENCE_S)
            self.answer(200, _document(chat, words))
        elif body.get("stream"):
            self._stream(chat, words)
        else:
            self.answer(200, _document(chat, words))

    def _stream(self, chat: bool, words: list[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for word in words:
                if words[0] == "slow" and not self.owner.go.acquire(timeout=PATIENCE_S):
                    return
                text = {"delta": {"content": word}} if chat else {"text": word}
                self._event({"choices": [{"index": 0, **text}], "usage": None})
            if words[0] == "half":
                return
            if words[0] == "broken":
                self._event({"error": {"message": "the worker is gone"}})
                return
            self._event({"choices": [], "usage": _usage(words)})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.owner.gone.set()

    def _event(self, data: object) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def _document(chat: bool, words: list[str]) -> dict[str, Any]:
    text = " ".join(words)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": "stop", **said}], "usage": _usage(words)}


def _usage(words: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}


class RunPod(Server):
    """The side of RunPod's queue that workers see, as its SDK asks for it."""

    def __init__(self) -> None:
        super().__init__(_RunPodHandler)
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stops: queue.Queue[str] = queue.Queue()
        self.streamed: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.done: queue.Queue[tuple[str, Any]] = queue.Queue()

    @property
    def environment(self) -> dict[str, str]:
        """What a worker finds in its environment."""
        return {
            "RUNPOD_POD_ID": "pod",
            "RUNPOD_AI_API_KEY": "worker-key",
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/v2/e/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/v2/e/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/v2/e/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        }

    def run(self, name: str, given: object) -> tuple[list[Any], Any]:
        """What a job streamed, and its result."""
        self.jobs.put({"id": name, "input": given})
        return self.result(name)

    def result(self, name: str) -> tuple[list[Any], Any]:
        """The same for a job that was put before."""
        who, result = self.done.get(timeout=PATIENCE_S)
        assert who == name
        parts = []
        while not self.streamed.empty():
            parts.append(self.streamed.get()[1])
        return parts, result


class _RunPodHandler(Handler):
    owner: RunPod

    def do_GET(self) -> None:
        kind = urlsplit(self.path).path.split("/")[3]
        if kind == "job-stop":
            self._next(self.owner.stops, lambda name: {"jobsToStop": [name]})
        else:
            batch = kind == "job-take-batch"
            self._next(self.owner.jobs, lambda job: [job] if batch else job)

    def do_POST(self) -> None:
        _, _, _, kind, pod, name = urlsplit(self.path).path.split("/")
        assert pod == "pod"
        to = {"job-done": self.owner.done, "job-stream": self.owner.streamed}[kind]
        to.put((name, self.body()))
        self.answer(200, {})

    def _next(self, things: queue.Queue[Any], shape: Any) -> None:
        try:
            thing = things.get(timeout=0.05)
        except queue.Empty:
            with suppress(OSError):  # a worker that ends does not wait
                self.answer(204)
        else:
            self.answer(200, shape(thing))


@pytest.fixture
def openai_server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def runpod_queue() -> Iterator[RunPod]:
    with RunPod() as server:
        yield server
