from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
from openai import OpenAI

from coldframe.benchmarks.http_client import knock
from coldframe.benchmarks.servers import coldframe_server
from coldframe.benchmarks.traffic.arrivals import Ask
from coldframe.benchmarks.traffic.open_loop import Record, offer
from tests.benchmarks.traffic.test_streams import event

PAUSE_S = 0.03


class Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as the prompt's second id says; its first one says what is wrong."""

    protocol_version = "HTTP/1.1"
    asked: dict[int, float]
    written: dict[int, list[float]]

    def do_POST(self) -> None:
        came = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number, wrong = body["prompt"]
        self.asked[number] = came
        self.close_connection = True
        if wrong in (429, 503):
            self.send_response(wrong)
            self.send_header("content-length", "4")
            self.end_headers()
            self.wfile.write(b"full")
            return
        if wrong == 1:
            return  # closes without a word
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"] - (wrong == 2)
        for place in range(count):
            self.written[number].append(time.monotonic())
            self._chunk(event("x"))
            time.sleep(PAUSE_S)
            if wrong == 3 and place == 1:
                return
            if wrong == 4:
                self.connection.recv(1)  # until the client has gone
                return
        self._chunk(event(finish="length", usage={"completion_tokens": count}))
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    Handler.asked = {}
    Handler.written = {number: [] for number in range(100)}

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that is gone is what some tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_arrivals_do_not_wait_for_answers_and_tokens_have_their_times(port: int) -> None:
    asks = [Ask(0.02 * number, (number, 0), 5) for number in range(12)]
    records = offer(port, "m", asks, 60.0)
    for ask, one in zip(asks, records, strict=True):
        assert one.answered
        assert one.error is None
        assert (one.asked, one.tokens, len(one.token_s), one.status) == (5, 5, 5, 200)
        assert ask.due_s == one.due_s <= one.sent_s
        assert one.token_s == sorted(one.token_s)
        assert one.end_s is not None
        assert one.end_s - one.sent_s >= 5 * PAUSE_S
    # They overlapped, and did so for as long as the last one was held up at most.
    assert any(one.sent_s < (other.end_s or 0) for one, other in pairwise(reversed(records)))
    # The load began at some moment of the server's clock, by which nothing was asked for before
    # it was sent, and nothing was there before it was written.
    latest = min(Handler.asked[number] - one.sent_s for number, one in enumerate(records))
    earliest = max(
        written - came
        for number, one in enumerate(records)
        for written, came in zip(Handler.written[number], one.token_s, strict=True)
    )
    assert earliest <= latest


def test_on_one_stream_openais_client_counts_as_ours_does(port: int) -> None:
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        for ask in (Ask(0.0, (0, 0), 5), Ask(0.0, (1, 0), 1)):
            theirs = _by_openai(client, ask)
            (ours,) = offer(port, "m", [ask], 60.0)
            for seen in (ours, theirs):
                assert (seen.tokens, len(seen.token_s)) == (ask.tokens, ask.tokens)
                assert (seen.end_s or 0) - seen.sent_s >= ask.tokens * PAUSE_S


@pytest.mark.parametrize(
    ("wrong", "status", "error", "parts"),
    [
        (429, 429, "full", 0),
        (503, 503, "full", 0),
        (1, None, "broke off", 0),
        (2, 200, None, 4),
        (3, 200, "broke off", 2),
    ],
)
def test_what_goes_wrong_is_told_apart(
    port: int, wrong: int, status: int | None, error: str | None, parts: int
) -> None:
    (one,) = offer(port, "m", [Ask(0.0, (0, wrong), 5)], 60.0)
    assert not one.answered
    assert (one.status, len(one.token_s)) == (status, parts)
    assert (one.error is None) if error is None else (error in (one.error or ""))
    assert (one.end_s is not None) == (wrong == 2)


def test_what_is_not_over_in_time_has_failed(port: int) -> None:
    (one,) = offer(port, "m", [Ask(0.0, (0, 4), 5)], 0.5)
    assert not one.answered
    assert one.end_s is None
    assert one.error == "not over after 0.5 s"
    assert len(one.token_s) <= 1  # as far as it came by then


def test_where_nobody_listens_a_request_has_failed() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (one,) = offer(taken.getsockname()[1], "m", [Ask(0.0, (0, 0), 5)], 60.0)
    assert (one.status, one.end_s) == (None, None)
    assert one.error


def test_the_client_takes_no_more_priority_than_it_gives_back(port: int) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    offer(port, "m", [Ask(0.0, (0, 0), 1)], 60.0)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_tokens_and_times_are_those_that_openais_client_sees(
    demo_model: Any, no_leaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests, one by one: by ours, and by openai-python on the same server."""
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    asks = [
        Ask(0.0, tuple(5 + (7 * i + 11 * n) % 400 for i in range(8 + n)), 3 + n) for n in range(5)
    ]
    with coldframe_server(demo_model("llama", "float32")) as server:
        knock(server.port, time.monotonic_ns() + 60_000_000_000).close()
        url = f"http://127.0.0.1:{server.port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            client.completions.create(model="m", prompt=[5, 6], max_tokens=2)
            for ask in asks:
                theirs = _by_openai(client, ask)
                before = time.monotonic()
                (ours,) = offer(server.port, "m", [ask], 60.0)
                whole = time.monotonic() - before
                assert ours.answered
                assert ours.tokens == theirs.tokens == ask.tokens
                assert len(ours.token_s) == len(theirs.token_s)
                for seen in (ours, theirs):
                    assert seen.end_s is not None
                    moments = [seen.sent_s, *seen.token_s]
                    assert moments == sorted(moments)
                    assert seen.end_s >= seen.token_s[-1]
                # What it says the request took lies within what the call took.
                assert 0 < (ours.end_s or 0) - ours.sent_s < whole


def _by_openai(client: OpenAI, ask: Ask) -> Record:
    sent = time.monotonic()
    stream = client.completions.create(
        model="m",
        prompt=list(ask.prompt),
        max_tokens=ask.tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    found = Record(0.0, len(ask.prompt), ask.tokens)
    for chunk in stream:
        moment = time.monotonic() - sent
        if chunk.usage is not None:
            found.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.text:
                found.token_s.append(moment)
            if choice.finish_reason is not None:
                found.end_s = moment
    return found
