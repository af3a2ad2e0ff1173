"""Adapters between real bodies: OpenAI's own reader and writer answer what they make."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from coldframe.runtime.gateway.api import ApiError, ModelCard, Piece
from coldframe.runtime.gateway.openai.answers import Chunks, Document
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat, prepare_completion
from coldframe.runtime.gateway.platforms.adapters import Adapter, Requests, adapter

CARD = ModelCard(
    name="demo",
    created=1_700_000_000,
    context_length=256,
    vocab_size=1000,
    chat_template="any",
)


def prepared(kind: str, body: dict[str, Any]) -> Prepared:
    """What OpenAI's reader makes of a body; the wrong model is none of ours."""
    if body.get("model") not in (None, CARD.name):
        raise ApiError(404, "There is no such model.", param="model", code="model_not_found")
    if kind == "completion":
        return prepare_completion(body, CARD)
    return prepare_chat(body, CARD, lambda _, names: names["messages"][-1]["content"])


def pieces(request: Prepared) -> Iterator[Piece]:
    """An engine that says the prompt again, word by word and in capitals."""
    for index, generation in enumerate(request.generations):
        words = str(generation.prompt).upper().split()
        limit = generation.params.max_tokens or 99
        words, end = (words[:limit], "length") if len(words) >= limit else (words, "stop")
        for i, word in enumerate(words):
            last = i == len(words) - 1
            yield Piece(index, i, (" " if i else "") + word, end if last else None, 3)


def documents(requests: Requests) -> list[dict[str, Any]]:
    """OpenAI's answers to what an adapter has read."""
    found = []
    for kind, body in requests.items:
        request = prepared(kind, body)
        document = Document(request, CARD, id="id", created=1)
        for piece in pieces(request):
            document.add(piece)
        found.append(document.finish())
    return found


def frames(of: Adapter, requests: Requests, error: ApiError | None = None) -> Iterator[bytes]:
    """The frames of a streamed answer; one that breaks off after the first piece with an error."""
    kind, body = requests.items[0]
    request = prepared(kind, body)
    events, chunks = of.events(requests), Chunks(request, CARD, id="id", created=1)
    for piece in pieces(request):
        for chunk in chunks.of(piece):
            yield events.chunk(chunk)
        if error is not None:
            yield events.failed(error)
            return
    last = chunks.last()
    if last is not None:
        yield events.chunk(last)
    yield events.done()


@pytest.fixture
def ask() -> Callable[..., Any]:
    """`ask("vertex", body)`: the platform's JSON for a body of it."""

    def answer(name: str, body: object, **path: str) -> Any:
        found = adapter(name)
        requests = found.read(body, path=path)
        assert not requests.stream
        return found.write(requests, documents(requests))

    return answer


@pytest.fixture
def refused() -> Callable[..., ApiError]:
    """`refused("vertex", body)`: the error for a body."""

    def error(name: str, body: object, **path: str) -> ApiError:
        found = adapter(name)
        with pytest.raises(ApiError) as caught:
            documents(found.read(body, path=path))
        status, document = found.error(caught.value)
        assert status >= 400
        json.dumps(document, allow_nan=False)
        return caught.value

    return error


@pytest.fixture
def stream() -> Callable[..., list[tuple[str, Any]]]:
    """`stream("cog", body)`: the events of a streamed answer, each with its name."""

    def events(
        name: str, body: object, error: ApiError | None = None, *, sse: bool = False
    ) -> list[tuple[str, Any]]:
        found = adapter(name)
        requests = found.read(body, sse=sse)
        assert requests.stream
        text = b"".join(frames(found, requests, error)).decode()
        assert text.endswith("\n\n")
        return [_event(event) for event in text.removesuffix("\n\n").split("\n\n")]

    return events


def _event(text: str) -> tuple[str, Any]:
    fields = dict(line.split(": ", 1) for line in text.split("\n"))
    data = fields["data"]
    return fields.get("event", ""), data if data == "[DONE]" else json.loads(data)


@pytest.fixture
def served() -> Iterator[Callable[[str], str]]:
    """`served("huggingface")`: the address of a server that has this adapter at every path."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def serve(name: str) -> str:
        kind = type("Handler", (_Handler,), {"adapter": adapter(name)})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    adapter: Adapter

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            requests = self.adapter.read(body)
            if requests.stream:
                self._send(200, b"".join(frames(self.adapter, requests)), "text/event-stream")
            else:
                self._json(200, self.adapter.write(requests, documents(requests)))
        except ApiError as error:
            self._json(*self.adapter.error(error))

    def _json(self, status: int, document: object) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
