"""`coldframe bench prefix MODEL`: the first token of a prompt whose beginning is in KV already.

One warm replica, whose front takes the requests directly, each after the one before it is over. In
every run three prompts go in turn: one that nobody has asked before, the same beginning with
another end, and such an end alone, which is what is left to compute and so the limit.

Then a server with a KV store, from zero and from parked: see `prefix_store`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.benchmarks.http_client import FIRST_ID
from coldframe.benchmarks.prefix_store import measure_store
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]

_WARM_UP = 2


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=9, help="runs of each cell (9)")
    parser.flag("--prefix", type=int, default=1000, help="tokens of what prompts share (1000)")
    parser.flag("--rest", type=int, default=16, help="tokens of each prompt behind it (16)")
    parser.flag(
        "--tier",
        choices=["image", "fresh"],
        default="image",
        help="how workers start where the KV store is measured (image)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether the target is met.

    Raises:
        ColdframeError: The replica failed, or did not reuse what it had.
    """
    new: list[float] = []
    known: list[float] = []
    alone: list[float] = []
    numbers = random.Random(0)
    shared = args.prefix // BLOCK_TOKENS * BLOCK_TOKENS
    with Replica(ReplicaOptions(model=str(args.model), device=args.device)) as replica:
        replica.run_until(lambda: replica.known)
        vocabulary = range(FIRST_ID, replica.spec.vocab_size)
        for number in range(-_WARM_UP, args.runs):
            print(f"run {number + 1} of {args.runs}", file=sys.stderr)
            prefix = numbers.choices(vocabulary, k=args.prefix)
            ends = [numbers.choices(vocabulary, k=args.rest) for _ in range(3)]
            cells = [
                (new, [*prefix, *ends[0]], 0),
                (known, [*prefix, *ends[1]], shared),
                (alone, ends[2], 0),
            ]
            for found, prompt, reused in cells:
                seconds = _first_token_s(replica, prompt, reused)
                if number >= 0:
                    found.append(seconds)
    rows = _rows(new, known, alone) + measure_store(
        args.model, args.tier, vocabulary, args.runs, args.prefix, args.rest, shared
    )
    print_rows(
        rows,
        {
            "model": str(args.model),
            "runs": args.runs,
            "prefix_tokens": args.prefix,
            "rest_tokens": args.rest,
            "tier": args.tier,
        },
    )
    return 0 if all(row.met is not False for row in rows) else 1


def _rows(new: list[float], known: list[float], alone: list[float]) -> list[Row]:
    return [
        Row("TTFT, nothing of it in KV", new, "s"),
        Row("TTFT, its prefix in KV", known, "s"),
        Row("TTFT of what is left, alone", alone, "s"),
        Row(
            "prefix in KV / nothing in KV",
            [a / b for a, b in zip(known, new, strict=True)],
            "ratio",
            0.3,
        ),
        Row(
            "  what is left, alone / nothing in KV",
            [a / b for a, b in zip(alone, new, strict=True)],
            "ratio",
        ),
    ]


class _Client:
    def __init__(self) -> None:
        self.first: TokenEvent | None = None
        self.first_ns = 0
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.first, self.first_ns = event, time.monotonic_ns()

    def on_error(self, error: ColdframeError) -> None:
        self.error = error


def _first_token_s(replica: Replica, prompt: list[int], reused: int) -> float:
    """Seconds from a prompt to its one token.

    Args:
        replica: Who is asked.
        prompt: Token ids.
        reused: How many tokens of it are in KV.
    """
    client = _Client()
    sent_ns = time.monotonic_ns()
    replica.submit(SamplingParams(max_tokens=1), client, prompt_ids=tuple(prompt))
    replica.run_until(lambda: client.first is not None or client.error is not None)
    if client.error is not None:
        raise client.error
    assert client.first is not None
    if client.first.cached_tokens != reused:
        raise ReplicaError(
            "a prompt was not computed from where it should be",
            expected=f"{reused} tokens in KV",
            got=client.first.cached_tokens,
        )
    return (client.first_ns - sent_ns) / 1e9
