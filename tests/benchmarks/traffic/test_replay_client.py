from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from coldframe.benchmarks.servers import Server
from coldframe.benchmarks.traffic import live
from coldframe.benchmarks.traffic.client import ask, prompt_of, send_all
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import PlatformError
from tests.benchmarks.traffic.test_streams import event

WHOLE, ERROR, SHORT, REFUSED, BROKEN = 4, 5, 6, 7, 8
"""What becomes of a request, by how many tokens it asks for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens = body["max_tokens"]
        self.close_connection = True
        if tokens == REFUSED:
            self.send_error(503, "full")
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if tokens == ERROR:
            self._chunk(b'data: {"error": {"message": "no room"}}\n\n')
        else:
            self._chunk(event())  # a token that is no whole character yet
            self._chunk(event("x"))
        if tokens == BROKEN:
            return
        if tokens != ERROR:
            made = tokens - (tokens == SHORT)
            self._chunk(event(finish="length", usage={"completion_tokens": made}))
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Server(found.server_address[1], time.monotonic_ns(), os.getpid(), -1)
        found.shutdown()
        thread.join()


@pytest.fixture
def ended() -> Iterator[Server]:
    """A server that is no more, though nobody has waited for its process yet."""
    with socket.socket() as taken, subprocess.Popen(["true"]) as process:
        taken.bind(("127.0.0.1", 0))
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield Server(taken.getsockname()[1], time.monotonic_ns(), process.pid, -1)


def test_what_became_of_each_request_is_kept(server: Server) -> None:
    kinds = [WHOLE, ERROR, SHORT, REFUSED, BROKEN, WHOLE]
    arrivals = [Arrival(0.01 * number, 3, tokens) for number, tokens in enumerate(kinds)]
    sent: list[int] = []
    start = time.monotonic()
    found = send_all(server, arrivals, ["m"] * len(kinds), 100, start, sent.append)
    assert sorted(sent) == [1, 2, 3, 4, 5, 6]
    outcomes = [live._outcome(one) for one in found]
    assert outcomes == ["answered", "failed", "failed", "refused", "failed", "answered"]
    # An error in the stream is no first token, and a token without text is one.
    assert [one.first_s is None for one in found] == [False, True, False, True, False, False]
    assert all(one.first_s <= one.token_s[0] for one in found if one.first_s is not None)
    assert all(one.sent_s >= one.due_s == a.at_s for one, a in zip(found, arrivals, strict=True))
    assert "no room" in (found[1].error or "")


@pytest.mark.parametrize("tokens", [ERROR, SHORT, REFUSED, BROKEN])
def test_what_measures_a_stage_takes_whole_answers_alone(server: Server, tokens: int) -> None:
    assert ask(server, "m", (5, 6), WHOLE).whole
    with pytest.raises(PlatformError, match="not answered"):
        ask(server, "m", (5, 6), tokens)


@pytest.mark.timeout(60)
def test_a_server_that_has_ended_is_not_waited_for(ended: Server) -> None:
    # The second request would be due in an hour.
    arrivals = [Arrival(0.0, 3, 4), Arrival(3600.0, 3, 4)]
    with pytest.raises(PlatformError, match="has ended"):
        send_all(ended, arrivals, ["m", "m"], 100, time.monotonic(), lambda count: None)
    for order in (
        lambda: live.get(ended, "/metrics"),
        lambda: live.post(ended, "/sleep?level=2"),
        lambda: live.settled(ended, {"zero"}),
        lambda: ask(ended, "m", (5,), 2),
    ):
        with pytest.raises(PlatformError, match="has ended"):
            order()


def test_prompts_begin_as_no_other() -> None:
    assert prompt_of(1, 8, 1000) == prompt_of(1, 8, 1000)
    assert len({prompt_of(number, 8, 1000)[:4] for number in range(50)}) == 50
    assert all(5 <= token < 9 for token in prompt_of(3, 100, 9))
