"""What the gateway adds to a warm request: the same one over HTTP and without, turn by turn.

Two replicas of one tiny model, so that compute does not drown what is looked for: one behind
`coldframe serve`, one in this process, whose front takes the request directly. Both have the same
options, so the workers have the same threads, and one of the two is always idle. A request is
timed from before it is sent until its last token is there; over HTTP at the client, with a
connection that stays open. Each pair of turns gives a difference, which is all that lies between:
the client's and the gateway's sockets, HTTP, JSON both ways, checks, and the socket to the front.

For one token the difference is what a request costs. For many it has what their way through the
gateway costs in it, where that is not hidden behind the making of the next: the difference of the
differences, over the tokens between, is what a token costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.servers import coldframe_server
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["Overhead", "measure_overhead"]

_WAIT_S = 120.0
_WARM_UP = 10


@dataclass(frozen=True, slots=True)
class Overhead:
    """Medians over the pairs of one run, in milliseconds.

    Args:
        request: What HTTP adds to a request for one token.
        streamed: The same where that one is streamed.
        token: What it adds to each further token of a stream.
        direct_request: A request for one token without it.
        direct_token: A further token without it.
    """

    request: float
    streamed: float
    token: float
    direct_request: float
    direct_token: float


@dataclass(slots=True)
class _Pairs:
    """One kind of request, both ways, in seconds."""

    http: list[float] = field(default_factory=list)
    direct: list[float] = field(default_factory=list)

    @property
    def difference_ms(self) -> float:
        return 1e3 * statistics.median(a - b for a, b in zip(self.http, self.direct, strict=True))

    @property
    def direct_ms(self) -> float:
        return 1e3 * statistics.median(self.direct)


class _Client:
    """Remembers when the answer was over."""

    def __init__(self) -> None:
        self.ended_ns: int | None = None
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        if event.finish is not None:
            self.ended_ns = time.monotonic_ns()

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.ended_ns = error, time.monotonic_ns()


def measure_overhead(model: Path, prompt: list[int], pairs: int, tokens: int) -> Overhead:
    """Measures it in two replicas that are started for that.

    Args:
        model: A tiny checkpoint's directory.
        prompt: Token ids.
        pairs: How many turns each kind of request gets.
        tokens: How many the long kind asks for.

    Raises:
        ColdframeError: A replica failed.
    """
    kinds = {kind: _Pairs() for kind in ((1, False), (1, True), (tokens, True))}
    with (
        Replica(ReplicaOptions(model=str(model))) as replica,
        coldframe_server(model) as server,
    ):
        replica.run_until(lambda: replica.known)
        sock = knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9))
        with Connection(sock, _WAIT_S) as connection:
            for number in range(-_WARM_UP, pairs):
                for (count, stream), times in kinds.items():
                    body = completion("m", prompt, count, stream=stream)
                    turns: list[tuple[list[float], Callable[[], float]]] = [
                        (times.http, partial(_over_http, connection, body)),
                        (times.direct, partial(_direct, replica, prompt, count)),
                    ]
                    # Each goes first as often as the other.
                    for found, ask in turns if number % 2 else reversed(turns):
                        seconds = ask()
                        if number >= 0:
                            found.append(seconds)
    one, streamed, many = kinds.values()
    more = tokens - 1
    return Overhead(
        one.difference_ms,
        streamed.difference_ms,
        (many.difference_ms - streamed.difference_ms) / more,
        one.direct_ms,
        (many.direct_ms - streamed.direct_ms) / more,
    )


def _over_http(connection: Connection, body: bytes) -> float:
    return connection.post("/v1/completions", body).seconds


def _direct(replica: Replica, prompt: list[int], count: int) -> float:
    client = _Client()
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    sent_ns = time.monotonic_ns()
    replica.submit(params, client, prompt_ids=tuple(prompt))
    replica.run_until(lambda: client.ended_ns is not None)
    if client.error is not None:
        raise client.error
    assert client.ended_ns is not None
    return (client.ended_ns - sent_ns) / 1e9
