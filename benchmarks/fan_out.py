"""`coldframe bench peers MODEL`: replicas that start at once, fed by one that is warm.

Each is on a host of its own, behind a link that is the bottleneck (`hosts`). In each run one starts
alone, then several at once, each with the addresses of all; then several that all read from the
warm one, as they would without a row. A replica is ready when its first token is out, which was
asked for as soon as it listened. What the warm one has sent says who has read from whom.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.hosts import Host, Network, hosts
from coldframe.benchmarks.http_client import Connection, completion, token_ids
from coldframe.benchmarks.servers import Server, coldframe_at
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["Started", "add_arguments", "run", "start_at_once"]

_PORT, _PEERS = 8000, 9400
_PROMPT = [5 + (7 * i) % 997 for i in range(32)]
_TOKENS = 4
_WAIT_S = 300.0
_KNOCK_S = 0.02
_WITHIN = 1.25
_LIMITS = ("--threads", "1", "--kv-memory", "64MiB", "--copy")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--nodes", type=int, default=3, help="replicas that start at once (3)")
    parser.flag("--runs", type=int, default=3, help="runs of each (3)")
    parser.flag(
        "--load-seconds",
        metavar="SECONDS",
        type=float,
        default=15.0,
        help="how long a link takes for all weights, which says its rate (15)",
    )
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether its target is met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A replica failed, or there can be no hosts here.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    for name, least in (("nodes", 2), ("runs", 1)):
        if getattr(args, name) < least:
            where, got = f"--{name}", getattr(args, name)
            raise RequestError("there must be more", where=where, expected=least, got=got)
    if not args.load_seconds > 0:
        raise RequestError("it takes some time", where="--load-seconds", got=args.load_seconds)
    checkpoint = Checkpoint.open(str(args.model))
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    rate = weights / args.load_seconds
    found: dict[str, list[float]] = {}
    warm_page_cache(args.model)
    with hosts(args.nodes + 1, rate) as network:
        first, *rest = network.hosts
        for number in range(args.runs):
            print(f"run {number + 1} of {args.runs}", file=sys.stderr)
            with warm_node(network, first, args.model):
                alone = start_at_once(network, args.model, first, rest[:1])
                row = start_at_once(network, args.model, first, rest)
            with warm_node(network, first, args.model, readers=args.nodes):
                apart = start_at_once(network, args.model, first, rest)
            tokens = {started.tokens for started in (*alone, *row, *apart)}
            if len(tokens) != 1:
                raise PlatformError("replicas of one model answer differently", got=tokens)
            count = args.nodes
            one, last, crowd = (max(s.ready_s for s in some) for some in (alone, row, apart))
            for name, value in {
                "one": one,
                f"the last of {count} in a row": last,
                f"the last of {count} from one": crowd,
                "in a row, to one": last / one,
                "from one, to one": crowd / one,
                "sent by the first, in a row": row[0].sent / weights,
                "sent by the first, to each": apart[0].sent / weights,
            }.items():
                found.setdefault(name, []).append(value)
    rows = [_row(name, runs) for name, runs in found.items()]
    more = {
        "model": str(args.model),
        "nodes": args.nodes,
        "runs": args.runs,
        "weights_bytes": weights,
        "link_bytes_per_s": rate,
    }
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _row(name: str, runs: list[float]) -> Row:
    seconds = name == "one" or name.startswith("the last")
    target = _WITHIN if name == "in a row, to one" else None
    return Row(name, runs, "s" if seconds else "ratio", target)


@dataclass(frozen=True, slots=True)
class Started:
    """A replica that was started.

    Args:
        ready_s: From its exec to its first token.
        tokens: Its answer.
        sent: What the warm replica has sent to all that started with it, in bytes.
    """

    ready_s: float
    tokens: tuple[int, ...]
    sent: int


@contextmanager
def warm_node(network: Network, host: Host, model: Path, *, readers: int = 1) -> Iterator[Server]:
    """A replica that has the weights, and gives them to so many at once.

    Raises:
        PlatformError: It does not start.
    """
    flags = ("--serve-peers", f"{host.address}:{_PEERS}", "--peer-readers", str(readers))
    with coldframe_at(host, model, _PORT, *_LIMITS, *flags, environment=_token()) as server:
        _first_token(network, host, server)
        yield server


def start_at_once(
    network: Network, model: Path, first: Host, rest: Sequence[Host]
) -> list[Started]:
    """Starts a replica on each of some hosts at once, with the addresses of all.

    Args:
        network: The network.
        model: What each would load from, if there were no peer.
        first: Where a replica is warm.
        rest: The hosts.

    Raises:
        PlatformError: One does not start, or has not taken its weights from a peer.
    """
    checkpoint = Checkpoint.open(str(model))
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    peers = ",".join(f"{host.address}:{_PEERS}" for host in (first, *rest))
    sent, received = first.traffic().sent, [host.traffic().received for host in rest]
    answers: dict[int, tuple[float, tuple[int, ...]]] = {}
    errors: list[Exception] = []

    def ask(number: int, host: Host, server: Server) -> None:
        try:
            answers[number] = _first_token(network, host, server)
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for it
            errors.append(error)

    with ExitStack() as stack:
        asking = []
        for number, host in enumerate(rest):
            flags = ("--serve-peers", f"{host.address}:{_PEERS}", "--peers", peers)
            starting = coldframe_at(host, model, _PORT, *_LIMITS, *flags, environment=_token())
            server = stack.enter_context(starting)
            thread = threading.Thread(target=ask, args=(number, host, server), name="ask")
            thread.start()
            asking.append(thread)
        for thread in asking:
            thread.join()
        if errors:
            raise errors[0]
        sent = first.traffic().sent - sent
    for before, host in zip(received, rest, strict=True):
        got = host.traffic().received - before
        if got < weights:
            raise PlatformError(
                "a replica has not taken its weights from a peer",
                where=host.address,
                expected=f"{weights:,} bytes over its link",
                got=f"{got:,}",
            )
    return [Started(*answers[number], sent) for number in range(len(rest))]


def _first_token(network: Network, host: Host, server: Server) -> tuple[float, tuple[int, ...]]:
    """Asks as soon as somebody listens; seconds from the exec to the first token, and all."""
    deadline = time.monotonic() + _WAIT_S
    with Connection(_knock(network, host, server, deadline), _WAIT_S) as connection:
        body = completion("m", _PROMPT, _TOKENS, stream=True, ids=True)
        answer = connection.post("/v1/completions", body)
    return server.since_exec(answer.first_ns), tuple(token_ids(answer))


def _knock(network: Network, host: Host, server: Server, deadline: float) -> socket.socket:
    while True:
        try:
            return network.connect(host.address, server.port, _WAIT_S)
        except OSError as error:
            if time.monotonic() > deadline or _has_ended(server.pid):
                raise PlatformError(
                    "a replica does not listen", where=host.address, got=error.strerror
                ) from error
        time.sleep(_KNOCK_S)


def _has_ended(pid: int) -> bool:
    # A child that has ended stays until it is waited for.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@cache
def _token() -> Mapping[str, str]:
    """The peers' token, which is this process's own."""
    return {"COLDFRAME_PEER_TOKEN": secrets.token_hex(16)}
