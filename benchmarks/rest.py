"""`coldframe bench rest MODEL`: the first token of a replica that rests, from each kind of rest.

One server with an image for its workers. In each run it is put to zero, then parked, then left
warm, and asked the same each time; the time is that from the request to the first streamed token.
Between two of them it is left alone, as it would be by those whom it rests for: what a start still
does behind its first token is none of the next one's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.servers import coldframe_server
from coldframe.benchmarks.snapshot_cells import Image
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]
_WAIT_S = 120.0
_PARKED = 0.5
_BETWEEN_S = 2.0
_RESTS = {"zero": "/sleep?level=2", "parked": "/sleep?level=1", "warm": None}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=9, help="runs of each rest (9)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether its target is met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A server failed, or there can be no image.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.runs < 1:
        raise RequestError("there must be one", where="--runs", got=args.runs)
    found: dict[str, list[float]] = {rest: [] for rest in _RESTS}
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as scratch:
        store = Image.create(args.model, Path(scratch), "lz4").store
        environment = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_SNAPSHOT_STORE": str(store)}
        warm_page_cache(args.model)
        with coldframe_server(args.model, environment=environment) as server:
            sock = knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                _first_token_s(connection, "warm")
                for number in range(args.runs):
                    print(f"run {number + 1} of {args.runs}", file=sys.stderr)
                    for rest, times in found.items():
                        times.append(_first_token_s(connection, rest))
    ratios = [a / b for a, b in zip(found["parked"], found["zero"], strict=True)]
    rows = [
        *(Row(f"{rest}: TTFT over HTTP", times, "s") for rest, times in found.items()),
        Row("parked / zero", ratios, "ratio", _PARKED),
    ]
    more = {"model": str(args.model), "runs": args.runs}
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _first_token_s(connection: Connection, rest: str) -> float:
    """Puts the server to rest, and asks it.

    Raises:
        PlatformError: It did not do what it was told.
    """
    path = _RESTS[rest]
    if path is not None:
        connection.post(path, b"")
        state = json.loads(connection.get("/startup").body)["state"]
        if state != rest:
            raise PlatformError("the server is in another state", expected=rest, got=state)
    answer = connection.post("/v1/completions", completion("m", _PROMPT, 2, stream=True))
    time.sleep(_BETWEEN_S)
    return (answer.first_ns - answer.sent_ns) / 1e9
