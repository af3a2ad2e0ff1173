"""Requests sent when a trace has them come, whatever became of those before: an open loop.

A client of a closed loop asks less of a server that is slow, and so never sees how slow it is.
Each request has a connection and, while it lasts, a thread of its own; when it was to be sent and
when it was is kept, so that a client that is late itself shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.traffic.traces import Arrival

__all__ = ["Sent", "ask", "prompt_of", "send_all"]

_CLIENTS = 256
_WAIT_S = 300.0
_KNOCK_S = 10.0
_FIRST_ID = 5
"""Below are tokens that mean the beginning or the end of something."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that was answered (CLOCK_MONOTONIC).

    Args:
        due_ns: When it was to be sent.
        sent_ns: When it was.
        first_ns: When its first token was there.
        last_ns: When it was answered.
    """

    due_ns: int
    sent_ns: int
    first_ns: int
    last_ns: int

    @property
    def ttft_s(self) -> float:
        return (self.first_ns - self.sent_ns) / 1e9

    @property
    def late_s(self) -> float:
        return (self.sent_ns - self.due_ns) / 1e9


def prompt_of(number: int, tokens: int, vocabulary: int) -> list[int]:
    """A prompt of so many tokens that begins as no other one's does."""
    chance = random.Random(number)
    return [chance.randrange(_FIRST_ID, vocabulary) for _ in range(tokens)]


def ask(port: int, model: str, prompt: list[int], tokens: int, due_ns: int | None = None) -> Sent:
    """Asks for a completion.

    Args:
        port: The server's, on loopback.
        model: Its name there.
        prompt: Token ids.
        tokens: How many to make of it.
        due_ns: When that was to be done; now by default.

    Raises:
        PlatformError: It was not answered.
    """
    body = completion(model, prompt, tokens, stream=True)
    started_ns = time.monotonic_ns()
    sock = knock(port, started_ns + int(_KNOCK_S * 1e9))
    with Connection(sock, _WAIT_S) as connection:
        answer = connection.post("/v1/completions", body)
    return Sent(
        started_ns if due_ns is None else due_ns, started_ns, answer.first_ns, answer.last_ns
    )


def send_all(
    port: int,
    arrivals: Sequence[Arrival],
    names: Sequence[str],
    vocabulary: int,
    origin_ns: int,
    progress: Callable[[int], None],
) -> list[Sent]:
    """Sends what a trace has, and waits for all answers.

    Args:
        port: The server's.
        arrivals: In their order.
        names: Whom each of them asks.
        vocabulary: Token ids are below that.
        origin_ns: When the trace begins.
        progress: Called with how many have been sent.

    Raises:
        PlatformError: One was not answered.
    """
    with ThreadPoolExecutor(_CLIENTS) as clients:
        waiting = []
        for number, (arrival, name) in enumerate(zip(arrivals, names, strict=True)):
            prompt = prompt_of(number, arrival.context, vocabulary)
            due_ns = origin_ns + int(arrival.at_s * 1e9)
            time.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            waiting.append(clients.submit(ask, port, name, prompt, arrival.generated, due_ns))
            progress(number + 1)
        return [sent.result() for sent in waiting]
