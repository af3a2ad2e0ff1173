"""Flags that choose a trace, a piece of it, its pace, and over how many models it is split."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coldframe.benchmarks.traffic.traces import Arrival, compressed, cut, read_trace, split
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_trace_arguments", "chosen_trace"]


def add_trace_arguments(parser: Parser) -> None:
    """The flags of `chosen_trace`, without twins in the environment."""
    trace = parser.add_argument_group("the trace")
    trace.add_argument("--trace", metavar="FILE", type=Path, help="a CSV with the arrivals")
    trace.add_argument(
        "--models",
        dest="number",
        metavar="N",
        type=int,
        help="split it by hash over so many models (as many as there are)",
    )
    trace.add_argument(
        "--skew",
        type=float,
        default=0.0,
        help="of the split: model k is asked in proportion to 1 / k ** SKEW (0: all alike)",
    )
    trace.add_argument(
        "--from", dest="from_s", metavar="SECONDS", type=float, default=0.0, help="(0)"
    )
    trace.add_argument("--for", dest="for_s", metavar="SECONDS", type=float, help="of it (all)")
    trace.add_argument("--seconds", type=float, help="press it into so many seconds")
    trace.add_argument("--speed", type=float, help="or make it so many times as fast (1)")


def chosen_trace(
    args: argparse.Namespace, models: int
) -> tuple[list[Arrival], list[int], dict[str, Any]]:
    """The arrivals that flags choose, whom each asks, and what a document says of that.

    Args:
        args: With the flags of `add_trace_arguments`.
        models: Over how many they are split.

    Raises:
        RequestError: There is no such trace, or the flags make no sense.
    """
    if args.trace is None:
        raise RequestError(
            "no trace is named",
            where="--trace",
            hint="Give a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens.",
        )
    if args.seconds is not None and args.speed is not None:
        raise RequestError("these two say the same", where="--seconds, --speed", hint="Give one.")
    whole = read_trace(args.trace)
    arrivals = cut(whole, args.from_s, args.for_s)
    speed = 1.0 if args.speed is None else args.speed
    if args.seconds is not None:
        if not args.seconds > 0:
            raise RequestError("there must be some", where="--seconds", got=args.seconds)
        speed = max(arrivals[-1].at_s, 1e-9) / args.seconds
    # Split before it is scaled: whom a request asks depends on neither speed nor context.
    asks = split(arrivals, models, args.skew)
    arrivals = compressed(arrivals, speed)
    told = {
        "file": args.trace.name,
        "arrivals": len(arrivals),
        "seconds": arrivals[-1].at_s,
        "models": models,
        "skew": args.skew,
        "from_s": args.from_s,
        "speed": speed,
    }
    return arrivals, asks, told
