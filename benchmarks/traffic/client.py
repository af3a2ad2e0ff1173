"""What a replay sends: completions of a trace's lengths, and what became of each.

Requests go out when the trace has them come, whatever became of those before: an open loop
(`open_loop`). A client of a closed loop asks less of a server that is slow, and so never sees how
slow it is. When a request was to be sent and when it was is kept, so that a client that is late
itself shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from coldframe.benchmarks.servers import Server, knock_at
from coldframe.benchmarks.traffic.arrivals import Ask
from coldframe.benchmarks.traffic.open_loop import Record, play, request_bytes
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import PlatformError

__all__ = ["ask", "prompt_of", "send_all"]

_LIMIT_S = 600.0
"""How long an answer may take."""
_GONE_NS = 2_000_000_000
"""So long a server that takes no connection is looked at: it has ended, or was too busy."""
_FIRST_ID = 5
"""Below are tokens that mean the beginning or the end of something."""


def prompt_of(number: int, tokens: int, vocabulary: int) -> tuple[int, ...]:
    """A prompt of so many tokens that begins as no other one's does."""
    return tuple(random.Random(number).choices(range(_FIRST_ID, vocabulary), k=tokens))


def ask(server: Server, model: str, prompt: tuple[int, ...], tokens: int) -> Record:
    """Asks for a completion, now.

    Args:
        server: On loopback.
        model: Its name there.
        prompt: Token ids.
        tokens: How many to make of it.

    Raises:
        PlatformError: It was not answered, or not with as many.
    """
    wanted = [Ask(0.0, prompt, tokens)]
    body = request_bytes(model, wanted[0])
    start = time.monotonic()
    (found,) = play(
        server.port, wanted, lambda _: body, _LIMIT_S, start, lost=lambda: _look(server)
    )
    if not found.whole or found.first_s is None:
        raise PlatformError(
            "a request was not answered",
            where=model,
            expected=f"{tokens} tokens",
            got=found.error or f"{found.tokens}",
        )
    return found


def send_all(
    server: Server,
    arrivals: Sequence[Arrival],
    names: Sequence[str],
    vocabulary: int,
    start: float,
    progress: Callable[[int], None],
) -> list[Record]:
    """Sends what a trace has, and waits until all of it is over.

    Args:
        server: On loopback.
        arrivals: In their order.
        names: Whom each of them asks.
        vocabulary: Token ids are below that.
        start: When the trace begins, by CLOCK_MONOTONIC.
        progress: Called with how many have been sent.

    Raises:
        PlatformError: The server has ended.
    """

    def request(number: int) -> bytes:
        arrival = arrivals[number]
        prompt = prompt_of(number, arrival.context, vocabulary)
        return request_bytes(names[number], Ask(arrival.at_s, prompt, arrival.generated))

    # Prompts are made one by one: those of a day's trace would be more than memory has.
    asks = [Ask(arrival.at_s, (), arrival.generated) for arrival in arrivals]
    return play(
        server.port,
        asks,
        request,
        _LIMIT_S,
        start,
        lambda number: progress(number + 1),
        lambda: _look(server),
    )


def _look(server: Server) -> None:
    """Raises PlatformError: Nobody is there any more."""
    with suppress(OSError):  # it is the client that can take no more of them
        knock_at(server, time.monotonic_ns() + _GONE_NS).close()
