"""`coldframe bench endpoint MODEL`: against `coldframe run`, vLLM's server and itself.

A cold start over HTTP is timed from the exec of the container's entrypoint to the first streamed
token at a thin client that knocks from the exec on. `coldframe run` on the same model in the same
conditions, and vLLM's own server in eager mode, are beside it in each run. How the gateway's share
of a warm request is told apart is in `overhead`; what 200 clients at once do to a cold replica is
in `crowd`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from coldframe.benchmarks.crowd import Crowd, gather_crowd
from coldframe.benchmarks.harness import Row, cold_start, print_rows, warm_page_cache
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.overhead import Overhead, measure_overhead
from coldframe.benchmarks.servers import Server, coldframe_server, vllm_server
from coldframe.benchmarks.snapshot_cells import Image
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]
_RATE = "500MB/s"
_CROWD_RATE = "200MB/s"
_WAIT_S = 180.0
_TOKENS = 2
_LATER = 0.25
_FASTER = 20.0
_IDLE_MB = 80.0
_STREAMED = 129


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=5, help="runs of each cell (5)")
    parser.flag("--clients", type=int, default=200, help="how many ask at once (200)")
    parser.flag("--pairs", type=int, default=100, help="warm requests of each kind in a run (100)")
    parser.flag(
        "--vllm-python",
        metavar="PATH",
        type=Path,
        help="an interpreter that has vLLM, for its server beside ours (make bench-vllm)",
    )
    parser.flag("--json", action="store_true", help="print the JSON document alone")


@dataclass(frozen=True, slots=True)
class _Start:
    """One cold start over HTTP, in seconds from the exec.

    Args:
        connected: Somebody listened.
        ttft: The first streamed token was there.
        accepting: The gateway began to take connections; None where nobody says.
        memory: Of the endpoint's own processes afterwards; see `Server.memory`.
    """

    connected: float
    ttft: float
    accepting: float | None = None
    memory: dict[str, dict[str, float]] | None = None


class _Cells:
    """What was measured so far, by condition."""

    def __init__(self) -> None:
        self.run: defaultdict[str, list[float]] = defaultdict(list)
        self.serve: defaultdict[str, list[_Start]] = defaultdict(list)
        self.vllm: list[_Start] = []
        self.overhead: list[Overhead] = []
        self.crowd: list[Crowd] = []


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether all targets are met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A server or a cold start failed.
    """
    _check(args)
    left_out: dict[str, str] = {}
    if args.vllm_python is None:
        left_out["vllm"] = "no interpreter that has it was given (--vllm-python)"
    if sys.dont_write_bytecode:
        print("no bytecode is kept: each process compiles all that it imports", file=sys.stderr)
    cells = _Cells()
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as scratch:
        tiny = Path(scratch, "tiny")
        write_demo_model(tiny, DemoModel("tiny"))
        conditions = _conditions(args.model, Path(scratch), left_out)
        for number in range(args.runs):
            print(f"run {number + 1} of {args.runs}", file=sys.stderr)
            for name, (arguments, environment) in conditions.items():
                _cold_pair(cells, name, args.model, arguments, environment, number)
            if args.vllm_python is not None:
                warm_page_cache(args.model)
                cells.vllm.append(_first_token(vllm_server(args.vllm_python, args.model)))
            cells.overhead.append(measure_overhead(tiny, _PROMPT, args.pairs, _STREAMED))
            cells.crowd.append(gather_crowd(args.model, _PROMPT, args.clients, _CROWD_RATE))
    rows = [
        *_start_rows(cells, conditions),
        *_vllm_rows(cells),
        *_overhead_rows(cells.overhead),
        *_crowd_rows(cells.crowd),
        *_memory_rows(cells.serve["fresh"]),
    ]
    more = {
        "model": str(args.model),
        "runs": args.runs,
        "left_out": left_out,
        "bytecode": not sys.dont_write_bytecode,
    }
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _check(args: argparse.Namespace) -> None:
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    for name in ("runs", "clients", "pairs"):
        if getattr(args, name) < 1:
            raise RequestError("there must be one", where=f"--{name}", got=getattr(args, name))
    if args.vllm_python is not None and not os.access(args.vllm_python, os.X_OK):
        raise RequestError(
            "there is no such interpreter",
            where="--vllm-python",
            got=args.vllm_python,
            hint="make bench-vllm installs one: build/vllm/bin/python",
        )


# -- cold starts ---------------------------------------------------------------------------------

_Condition = tuple[list[str], dict[str, str]]


def _conditions(model: Path, scratch: Path, left_out: dict[str, str]) -> dict[str, _Condition]:
    """The conditions of cold starts: flags and environment, the same for `run` and `serve`."""
    throttle = [f"--throttle={_RATE}"]
    found: dict[str, _Condition] = {"fresh": ([], {}), f"fresh, {_RATE}": (throttle, {})}
    try:
        store = Image.create(model, scratch, "lz4").store
    except PlatformError as error:
        left_out["restored"] = str(error)
        return found
    restored = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_SNAPSHOT_STORE": str(store)}
    return {**found, "restored": ([], restored), f"restored, {_RATE}": (throttle, restored)}


def _cold_pair(
    cells: _Cells,
    name: str,
    model: Path,
    arguments: Sequence[str],
    environment: dict[str, str],
    number: int,
) -> None:
    """One start of each kind; which comes first changes from run to run."""

    def by_run() -> None:
        warm_page_cache(model)
        document = cold_start(
            model, *arguments, prompt_ids=_PROMPT, tokens=_TOKENS, environment=environment
        )
        cells.run[name].append(document["ttft_s"])

    def by_serve() -> None:
        warm_page_cache(model)
        server = coldframe_server(model, *arguments, environment=environment)
        cells.serve[name].append(_first_token(server, explained=True))

    for start in (by_run, by_serve) if number % 2 else (by_serve, by_run):
        start()


def _first_token(serving: AbstractContextManager[Server], *, explained: bool = False) -> _Start:
    """Starts a server and asks it for a token from the first moment on.

    Args:
        serving: The server, not started yet.
        explained: Whether it is ours, and can be asked and looked at afterwards.

    Raises:
        PlatformError: There is no answer.
    """
    body = completion("m", _PROMPT, _TOKENS, stream=True)
    with serving as server:
        sock = knock(server.port, server.started_ns + int(_WAIT_S * 1e9))
        connected = server.since_exec(time.monotonic_ns())
        with Connection(sock, _WAIT_S) as connection:
            ttft = server.since_exec(connection.post("/v1/completions", body).first_ns)
            if not explained:
                return _Start(connected, ttft)
            stages = json.loads(connection.get("/startup").body)["timeline"]["stages"]
        accepting = [
            s["end_s"] for s in stages if s["name"] == "listen" and s["process"] == "gateway"
        ]
        return _Start(connected, ttft, accepting[0] if accepting else None, server.memory())


def _start_rows(cells: _Cells, conditions: Iterable[str]) -> list[Row]:
    starts = [start for name in conditions for start in cells.serve[name]]
    rows = [
        Row("somebody listens, from the exec", [s.connected for s in starts], "s", 0.05),
        Row(
            "the gateway accepts, from the exec",
            [s.accepting for s in starts if s.accepting is not None],
            "s",
        ),
    ]
    for name in conditions:
        ours, theirs = [s.ttft for s in cells.serve[name]], cells.run[name]
        rows += [
            Row(
                f"{name}: TTFT over HTTP - that of `coldframe run`",
                [a - b for a, b in zip(ours, theirs, strict=True)],
                "s",
                _LATER,
            ),
            Row("  over HTTP", ours, "s"),
            Row("  coldframe run", theirs, "s"),
        ]
    return rows


def _vllm_rows(cells: _Cells) -> list[Row]:
    """vLLM's server against a start from an image, where there is one; a fresh one beside it."""
    if not cells.vllm:
        return []
    theirs = [start.ttft for start in cells.vllm]
    rows = [Row("vLLM's server, eager: TTFT over HTTP", theirs, "s")]
    names = [name for name in ("restored", "fresh") if cells.serve[name]]
    for name in names:
        ratios = [a / b.ttft for a, b in zip(theirs, cells.serve[name], strict=True)]
        target = _FASTER if name == names[0] else None
        rows.append(Row(f"  / ours, {name}", ratios, "ratio", target, at_least=True))
    return rows


# -- warm requests, crowds, memory ---------------------------------------------------------------


def _overhead_rows(found: list[Overhead]) -> list[Row]:
    return [
        Row("warm, tiny model: HTTP's share of a request", [o.request for o in found], "ms", 3.0),
        Row("  of one that is streamed", [o.streamed for o in found], "ms", 3.0),
        Row("  of each further token", [o.token for o in found], "ms", 0.3),
        Row("  a request without HTTP", [o.direct_request for o in found], "ms"),
        Row("  a further token without HTTP", [o.direct_token for o in found], "ms"),
    ]


def _crowd_rows(found: list[Crowd]) -> list[Row]:
    clients = found[0].clients
    rows = [
        Row(
            f"{clients} at once, cold: answered",
            [float(crowd.answered) for crowd in found],
            "clients",
            float(clients),
            at_least=True,
        ),
        Row("  overtaken", [float(crowd.overtaken) for crowd in found], "clients", 0.0),
        Row("  the last one has asked", [crowd.all_sent_s for crowd in found], "s"),
        Row("  the first token", [crowd.first_s for crowd in found], "s"),
        Row("  the last token", [crowd.last_s for crowd in found], "s"),
    ]
    for process in ("gateway", "front"):
        peaks = [crowd.memory[process]["peak_rss"] for crowd in found]
        rows.append(Row(f"  {process}'s peak RSS", peaks, "MB"))
    return rows


def _memory_rows(starts: list[_Start]) -> list[Row]:
    """What stays when workers and weights go."""
    found = [start.memory for start in starts if start.memory is not None]
    together = [sum(values["pss"] for values in memory.values()) for memory in found]
    return [
        Row("idle: PSS of the endpoint's own processes", together, "MB", _IDLE_MB),
        *(Row(f"  {name}", [m[name]["pss"] for m in found], "MB") for name in found[0]),
    ]
