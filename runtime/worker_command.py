"""`coldframe worker`: a replica whose requests come from other replicas' fronts.

It is `coldframe serve` with another way in beside its port, where probes, metrics and the timeline
of a start are, as there; see `transport.takeover`.
"""

from __future__ import annotations

import argparse

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags import Parser
from coldframe.runtime.serve_flags import add_arguments as add_serve_arguments

__all__ = ["add_arguments", "run"]

ROLES = ("decode",)


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("who sends requests")
    parser.flag(
        "--role",
        choices=ROLES,
        default="decode",
        group=group,
        help="make all tokens of an answer but the first (decode)",
    )
    parser.flag(
        "--listen",
        metavar="HOST:PORT",
        group=group,
        help="where other replicas, started with --decode tcp://HOST:PORT, pass requests on (the "
        "secret is in COLDFRAME_KV_SECRET_FILE)",
    )
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command: until it is told to end, or the replica cannot go on.

    Raises:
        ColdframeError: It cannot go on, or there is nobody that it could be a worker of.
    """
    if args.listen is None:
        raise RequestError(
            "a worker is somebody's",
            where="--listen",
            expected="HOST:PORT",
            hint="Give it, or serve without anybody in front by `coldframe serve`.",
        )
    if len(args.models) > 1:
        raise RequestError(
            "a worker has one model",
            where="MODEL",
            expected="one",
            got=len(args.models),
            hint="Start one worker for each.",
        )
    from coldframe.runtime import serve

    return serve.run(args, args.listen)
