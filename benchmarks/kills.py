"""`coldframe bench kills MODEL --trace FILE`: an hour's arrivals while processes are killed.

The arrivals of a trace, its hour pressed into a minute or two, go to one server that rests between
them; each asks for one of a few prompts, whose answers are known from before. Every few seconds
one of the server's processes, whichever, is killed. Clients do what openai-python does: where a
connection breaks, or they are told to come again, they come again. Counted are answers that are
wrong or never came, and what the server has more at the end than at the start: KV blocks, file
descriptors, processes, memory.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.leaks import Holdings, holdings
from coldframe.benchmarks.servers import Server, coldframe_server
from coldframe.benchmarks.traffic.traces import Arrival, read_trace
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]

_PROMPTS = 48
_SCALE = 32
"""A trace's tokens to one of ours: the model is a tiny one."""
_MOST_TOKENS = 48
_CLIENTS = 128
_WAIT_S = 60.0
_KNOCK_S = 5.0
_TRIES = 20
_REST_S = 2.0
_PAUSE_S = 0.2


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a tiny float32 checkpoint")
    parser.flag("--trace", metavar="FILE", type=Path, help="a CSV with the arrivals")
    parser.flag("--seconds", type=float, default=90.0, help="what its time is pressed into (90)")
    parser.flag("--take", metavar="N", type=int, default=3, help="every Nth arrival (3)")
    parser.flag("--kill-every", metavar="SECONDS", type=float, default=4.0, help="(4)")
    parser.flag("--seed", type=int, default=0, help="of what is killed when (0)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


@dataclass(slots=True)
class _Tally:
    """What became of the requests."""

    right: int = 0
    wrong: int = 0
    lost: int = 0
    again: int = 0
    """How often somebody had to come again."""
    kills: Counter[str] = field(default_factory=Counter)
    """By what kind of process it was."""


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether nothing went wrong.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A server failed.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.trace is None:
        raise RequestError(
            "no trace is named", where="--trace", hint="See benchmarks/traffic/traces.py."
        )
    for name in ("seconds", "take", "kill_every"):
        if not getattr(args, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise RequestError("there must be some", where=flag, got=getattr(args, name))
    arrivals = read_trace(args.trace)[:: args.take]
    tally, first_tokens = _Tally(), list[float]()
    flags = ("--idle", str(_REST_S), "--max-waiting", "4096")
    with coldframe_server(args.model, *flags) as server:
        answers = [_answer(server, prompt)[0] for prompt in _prompts()]
        before = holdings(server)
        _replay(server, arrivals, answers, args, tally, first_tokens)
        after = _settled(server, before)
    rows = _rows(tally, first_tokens, before, after)
    more = {
        "model": str(args.model),
        "trace": args.trace.name,
        "arrivals": len(arrivals),
        "seconds": args.seconds,
        "seed": args.seed,
    }
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _prompts() -> list[tuple[list[int], int]]:
    """Token ids and how many are asked for; of many lengths, some with a beginning in common."""
    chance = random.Random(1)
    shared = [chance.randrange(5, 500) for _ in range(200)]
    found = []
    for number in range(_PROMPTS):
        own = [chance.randrange(5, 500) for _ in range(1 + 5 * number)]
        found.append((shared[: 20 * (number % 8)] + own, 1 + number % _MOST_TOKENS))
    return found


def _replay(
    server: Server,
    arrivals: list[Arrival],
    answers: list[bytes],
    args: argparse.Namespace,
    tally: _Tally,
    first_tokens: list[float],
) -> None:
    over, lock = threading.Event(), threading.Lock()
    chance = random.Random(args.seed)
    pace = args.seconds / max(arrivals[-1].at_s, 1e-9)
    prompts = _prompts()

    def kill() -> None:
        while not over.wait(chance.uniform(0.5, 1.5) * args.kill_every):
            # Before the list is made and after, they come and go.
            with suppress(psutil.Error, IndexError):
                victim = chance.choice(psutil.Process(server.pid).children(recursive=True))
                kind = _kind(victim)
                victim.kill()
                tally.kills[kind] += 1

    def ask(arrival: Arrival) -> None:
        which = (arrival.context // _SCALE + arrival.generated) % len(prompts)
        started = time.monotonic()
        try:
            text, again = _answer(server, prompts[which])
        except PlatformError as error:
            print(error, file=sys.stderr)
            text, again = None, _TRIES
        with lock:
            tally.again += again
            if text is None:
                tally.lost += 1
            elif text != answers[which]:
                tally.wrong += 1
            else:
                tally.right += 1
                first_tokens.append(time.monotonic() - started)

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(_CLIENTS) as clients:
            for arrival in arrivals:
                time.sleep(max(0.0, began + arrival.at_s * pace - time.monotonic()))
                clients.submit(ask, arrival)
    finally:
        over.set()
        killer.join()


def _answer(server: Server, prompt: tuple[list[int], int]) -> tuple[bytes, int]:
    """The body of the answer's choices, and how often it had to be asked for again.

    Raises:
        PlatformError: It never came.
    """
    body = completion("m", *prompt, stream=False)
    for tries in range(_TRIES):
        if not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == "zombie":
            raise PlatformError("the server has ended", where=f"process {server.pid}")
        try:
            sock = knock(server.port, time.monotonic_ns() + int(_KNOCK_S * 1e9))
            with Connection(sock, _WAIT_S) as connection:
                told = connection.post("/v1/completions", body).body
        except PlatformError as error:
            last = error
            time.sleep(_PAUSE_S * (tries + 1))
        else:
            start = told.index(b'"choices"')
            return told[start : told.index(b"}]", start)], tries
    raise last


def _kind(process: psutil.Process) -> str:
    """What a process is, by the module that it runs; a clone says nothing of the kind."""
    found = re.search(r"coldframe\.([a-z_.]+)", " ".join(process.cmdline()))
    return found[1] if found else "a worker's clone"


def _settled(server: Server, before: Holdings) -> Holdings:
    """What the server holds once nobody asks any more and what was killed is there again."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        for prompt in _prompts()[:2]:
            _answer(server, prompt)
        found = holdings(server)
        if found.no_more_than(before) or time.monotonic() > deadline:
            return found
        time.sleep(1.0)


def _rows(tally: _Tally, seconds: list[float], before: Holdings, after: Holdings) -> list[Row]:
    def figure(name: str, value: float, unit: str, target: float | None = None) -> Row:
        return Row(name, [value], unit, target)

    rows = [
        figure("answered as without any kill", tally.right, "requests"),
        figure("answered otherwise", tally.wrong, "requests", 0),
        figure("never answered", tally.lost, "requests", 0),
        figure("had to come again", tally.again, "times"),
        figure("processes killed", tally.kills.total(), "times"),
        *(figure(f"  {kind}", count, "times") for kind, count in sorted(tally.kills.items())),
    ]
    if seconds:
        rows += [
            figure("an answer took: median", statistics.median(seconds), "s"),
            figure("  the slowest", max(seconds), "s"),
        ]
    for name, unit, most, was, now in before.compared(after):
        rows.append(figure(f"{name}: more than before", now - was, unit, most))
    return rows
