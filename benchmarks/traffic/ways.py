"""Who answers a load: servers as real processes, or one process without a server."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.benchmarks.peers import lacks_vllm
from coldframe.benchmarks.servers import (
    VLLM_DTYPES,
    Server,
    coldframe_server,
    knock_at,
    vllm_server,
)
from coldframe.benchmarks.traffic.arrivals import Ask
from coldframe.benchmarks.traffic.one_process import OneProcess
from coldframe.benchmarks.traffic.open_loop import Record, offer
from coldframe.loader.cgroup import cpu_count
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.replica.sizing import ModelFacts

__all__ = ["WAYS", "Way", "left_out", "start_way"]

WAYS = ("apart", "pinned", "together", "vllm", "vllm-compiled")
_START_S = 300.0
_SETTLE_S = 30.0
_SETTLE_PAUSE_S = 0.25
_MEASURED = re.compile(rb"^\w*prefill_batch_tokens(?:{[^}]*})? (\S+)", re.MULTILINE)
_PROMPT = list(range(5, 21))


class Way(Protocol):
    """Somebody who answers, warm."""

    def offer(self, asks: Sequence[Ask]) -> list[Record]:
        """What became of each request of a load."""
        ...


class _Served:
    """A server that has answered once.

    Args:
        server: On loopback; its model is called `m`.
        limit_s: How long an answer may take.
    """

    def __init__(self, server: Server, limit_s: float) -> None:
        self._port = server.port
        self._limit_s = limit_s
        sock = knock_at(server, server.started_ns + int(_START_S * 1e9))
        with Connection(sock, _START_S) as connection:
            connection.post("/v1/completions", completion("m", _PROMPT, 2, stream=True))

    def settle(self) -> None:
        """Lets a replica find out in peace how large a batch of prompts should be.

        It does so once nobody has asked for two seconds, with all threads, beside whatever else
        is measured then.
        """
        deadline_ns = time.monotonic_ns() + int(_SETTLE_S * 1e9)
        while time.monotonic_ns() < deadline_ns:
            with Connection(knock(self._port, deadline_ns), _START_S) as connection:
                told = _MEASURED.search(connection.get("/metrics").body)
            if told is not None and float(told[1]) > 0:
                return
            time.sleep(_SETTLE_PAUSE_S)

    def offer(self, asks: Sequence[Ask]) -> list[Record]:
        return offer(self._port, "m", asks, self._limit_s)


def left_out(wanted: Sequence[str], args: argparse.Namespace) -> list[dict[str, str]]:
    """Those that cannot be had here, and why."""
    found = []
    for name in wanted:
        why = None
        if name == "pinned" and cpu_count() < 2:
            why = "there is one core"
        elif name == "together" and args.device != CPU:
            why = "the engine in one process is one for the CPU"
        elif name.startswith("vllm"):
            why = lacks_vllm(args.vllm_python)
        if why is not None:
            found.append({"what": name, "why": why})
    return found


def start_way(
    stack: ExitStack, name: str, args: argparse.Namespace, facts: ModelFacts, longest: int
) -> Way:
    """Starts somebody who answers, until the stack is closed.

    Args:
        stack: Ends it.
        name: Of `WAYS`.
        args: The command line.
        facts: The model.
        longest: Tokens of the longest request.

    Raises:
        PlatformError: It does not start.
    """
    if name == "together":
        return stack.enter_context(OneProcess(args.model, longest))
    if name.startswith("vllm"):
        serving = vllm_server(
            args.vllm_python,
            args.model,
            compiled=name == "vllm-compiled",
            dtype=VLLM_DTYPES[facts.spec.dtype],
            context=facts.spec.context_length,
            device=args.device,
        )
        return _Served(stack.enter_context(serving), args.limit)
    replica = coldframe_server(args.model, *(("--pin",) if name == "pinned" else ()))
    served = _Served(stack.enter_context(replica), args.limit)
    served.settle()
    return served
