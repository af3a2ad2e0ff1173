"""The flags that say which replicas weights are taken from, and who may take them here."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["DYNAMO", "add_peer_arguments", "peer_options"]

DYNAMO = "dynamo"
"""Where workers of Dynamo's find their peers, in its discovery."""


def add_peer_arguments(parser: Parser) -> None:
    """The flags of replicas that feed one another."""
    title = "replicas that feed one another (the token is in COLDFRAME_PEER_TOKEN)"
    flag = partial(parser.flag, group=parser.add_argument_group(title))
    flag(
        "--serve-peers",
        metavar="HOST:PORT",
        help="give the weights to other replicas, also while they still load",
    )
    flag(
        "--peers",
        metavar="HOST:PORT[,...]",
        help="take the weights from one of these, if it has them or is loading them; MODEL stands "
        "behind them",
    )
    flag(
        "--peers-from",
        metavar="WHERE",
        action="append",
        help="find such replicas there: dns://NAME:PORT, all addresses of a name, "
        "file:///PATH, a file of HOST:PORT lines, or, of a worker of Dynamo's, dynamo, its "
        "discovery (dynamo:SECONDS, how long a load may wait for that: 2); may be given again",
    )
    flag(
        "--peer-readers",
        metavar="N",
        type=int,
        default=1,
        help="how many may take the weights from here at once; the next are sent on to those (1)",
    )


def peer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ReplicaOptions` that the flags stand for.

    Raises:
        RequestError: A value says nothing that can be.
    """
    peers = tuple(part.strip() for part in (args.peers or "").split(",") if part.strip())
    places = tuple(place for place in args.peers_from or () if place)
    if args.peer_readers < 1:
        raise RequestError(
            "there must be one",
            where="--peer-readers",
            expected="at least 1",
            got=args.peer_readers,
        )
    if any(place.partition(":")[0] == DYNAMO for place in places):
        raise RequestError(
            "only a worker of Dynamo's is in its discovery",
            where="--peers-from",
            got=DYNAMO,
            hint="Start it with `coldframe worker --dynamo`.",
        )
    if peers or places:
        # A wrong one is told before anything is started.
        from coldframe.loader.peers.directory import check_peers

        check_peers(peers, places)
    return {
        "serve_peers": args.serve_peers,
        "peers": peers,
        "peers_from": places,
        "peer_readers": args.peer_readers,
    }
