"""`coldframe bench dynamo MODEL`: what NVIDIA Dynamo's front end adds to a warm request.

One worker, asked in turns: through the front end with its KV-aware router, and at the gateway that
the worker has itself. So both ways end at the same replica, and what lies between their times is
the front end, its router and its request plane. Prompts are token ids, and no two are the same:
neither way finds more in KV than the other. The client acknowledges at once what comes, else half
of the streams wait for its kernel. It runs where both are installed, as in build/dynamo.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.benchmarks.http_client import FIRST_ID, Answer, Connection, completion, knock
from coldframe.benchmarks.servers import coldframe_server, dynamo_front, knock_at
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]

_PROMPT_TOKENS = 64
_MOST_MS = 10.0
_STREAMED = 65
_WAIT_S = 120.0
_WARM_UP = 10
_RETRY_S = 0.2
_NAME = "m"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--pairs", type=int, default=100, help="requests of each kind, each way (100)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether its targets are met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: The front end or the worker failed, or is not installed.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.pairs < 1:
        raise RequestError("there must be one", where="--pairs", got=args.pairs)
    if importlib.util.find_spec("dynamo") is None:
        raise PlatformError(
            "Dynamo's front end and its runtime are not installed beside this",
            where="import dynamo",
            hint="`make build/dynamo/.tests`, then build/dynamo/bin/coldframe bench dynamo MODEL",
        )
    found = _measured(args.model, args.pairs)
    rows = found.rows()
    more = {"model": str(args.model), "pairs": args.pairs}
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


class _Times:
    """One kind of request, both ways, in milliseconds."""

    def __init__(self) -> None:
        self.total: dict[str, list[float]] = {"dynamo": [], "gateway": []}
        self.first: dict[str, list[float]] = {"dynamo": [], "gateway": []}

    def add(self, way: str, answer: Answer) -> None:
        self.total[way].append((answer.last_ns - answer.sent_ns) / 1e6)
        self.first[way].append((answer.first_ns - answer.sent_ns) / 1e6)


class _Found:
    """All that was measured."""

    def __init__(self) -> None:
        self.whole, self.streamed = _Times(), _Times()

    def rows(self) -> list[Row]:
        whole, streamed = self.whole, self.streamed
        further = [
            (last - first) / (_STREAMED - 1)
            for last, first in zip(_added(streamed.total), _added(streamed.first), strict=True)
        ]
        return [
            Row("Dynamo's front end adds to a request", _added(whole.total), "ms", _MOST_MS),
            Row("  to the first token of a stream", _added(streamed.first), "ms", _MOST_MS),
            Row("  to each further token", further, "ms"),
            Row("a request for one token: at the gateway", whole.total["gateway"], "ms"),
            Row("  through the front end", whole.total["dynamo"], "ms"),
            Row("a stream's first token: at the gateway", streamed.first["gateway"], "ms"),
            Row("  likewise through the front end", streamed.first["dynamo"], "ms"),
        ]


def _added(times: dict[str, list[float]]) -> list[float]:
    return [a - b for a, b in zip(times["dynamo"], times["gateway"], strict=True)]


def _measured(model: Path, pairs: int) -> _Found:
    """Measures in a front end and a worker that are started for that.

    Raises:
        PlatformError: One of them failed.
    """
    found = _Found()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="coldframe-bench-"))
        environment = {
            "DYN_FILE_KV": str(Path(folder, "kv")),
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_EVENT_PLANE_HOST": "127.0.0.1",
            "DYN_LOG": "warn",
            "HF_HUB_OFFLINE": "1",
            "HOME": folder,  # it keeps what models' files it has read
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.5",
        }
        front = stack.enter_context(dynamo_front(Path(sys.executable), environment))
        flags = ("--dynamo", "--discovery-backend", "file", "--event-plane", "zmq")
        worker = stack.enter_context(
            coldframe_server(model, *flags, environment=environment, name=_NAME, command="worker")
        )
        deadline = time.monotonic_ns() + int(_WAIT_S * 1e9)
        sockets = {"dynamo": knock_at(front, deadline), "gateway": knock(worker.port, deadline)}
        ways = {
            way: stack.enter_context(Connection(sock, _WAIT_S, quick_ack=True))
            for way, sock in sockets.items()
        }
        _until_known(ways["dynamo"], deadline)
        prompts = _prompts()
        for number in range(-_WARM_UP, pairs):
            for times, tokens in ((found.whole, 1), (found.streamed, _STREAMED)):
                # Each goes first as often as the other.
                for way in ways if number % 2 else reversed(ways):
                    body = completion(_NAME, next(prompts), tokens, stream=tokens > 1)
                    answer = ways[way].post("/v1/completions", body)
                    if number >= 0:
                        times.add(way, answer)
            if number >= 0 and number % 20 == 0:
                print(f"pair {number + 1} of {pairs}", file=sys.stderr)
    return found


def _until_known(front: Connection, deadline_ns: int) -> None:
    """Waits until the front end has found the worker and got an answer from it."""
    while True:
        try:
            front.post("/v1/completions", completion(_NAME, [5] * _PROMPT_TOKENS, 1, stream=False))
        except PlatformError:
            if time.monotonic_ns() > deadline_ns:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _prompts() -> Iterator[list[int]]:
    """Prompts of which no two begin alike."""
    for number in itertools.count(1):
        head = [FIRST_ID + number // base % 97 for base in (1, 97, 97 * 97)]
        yield head + [FIRST_ID + (7 * i + number) % 97 for i in range(_PROMPT_TOKENS - len(head))]
