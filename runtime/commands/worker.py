"""`coldframe worker`: a replica whose requests come from NVIDIA Dynamo, or others' fronts.

It is `coldframe serve` with another way in beside its port, where probes, metrics and the timeline
of a start are, as there; see `integrations.dynamo` and `transport.takeover`.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.serve import add_arguments as add_serve_arguments
from coldframe.runtime.integrations.dynamo.settings import (
    ROLES,
    DynamoSettings,
    Role,
    check_installed,
)

if TYPE_CHECKING:
    from coldframe.runtime.integrations.dynamo.peer_finder import PeerFinder

__all__ = ["add_arguments", "run"]

_GRACE_VARIABLE = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
_GRACE_S = 1.0


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("who sends requests (by default Dynamo's own variables say)")
    parser.flag(
        "--dynamo",
        action="store_true",
        group=group,
        help="register with NVIDIA Dynamo; needs `pip install 'coldframe[dynamo]'`",
    )
    parser.flag(
        "--role",
        choices=ROLES,
        group=group,
        help="answer requests as a whole, make the first token of each, or the others (aggregated; "
        "decode with --listen alone)",
    )
    parser.flag(
        "--listen",
        metavar="HOST:PORT",
        group=group,
        help="where other replicas, started with --decode tcp://HOST:PORT, pass requests on (the "
        "secret is in COLDFRAME_KV_SECRET_FILE)",
    )
    for name, meaning in (
        ("namespace", "Dynamo's namespace ($DYN_NAMESPACE, else dynamo)"),
        ("component", "its component ($DYN_COMPONENT, else prefill of that role, else backend)"),
        ("endpoint", "its endpoint ($DYN_ENDPOINT_NAME, else generate)"),
    ):
        parser.flag(f"--{name}", metavar="NAME", group=group, help=meaning)
    parser.flag(
        "--discovery-backend",
        metavar="NAME",
        group=group,
        help="where it registers: kubernetes, etcd, file, mem ($DYN_DISCOVERY_BACKEND, else etcd)",
    )
    parser.flag(
        "--request-plane",
        metavar="NAME",
        group=group,
        help="how requests come: tcp or nats ($DYN_REQUEST_PLANE, else tcp)",
    )
    parser.flag(
        "--event-plane",
        metavar="NAME",
        group=group,
        help="how KV events go: zmq or nats ($DYN_EVENT_PLANE, else zmq)",
    )
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command: until it is told to end, or the replica cannot go on.

    Raises:
        ColdframeError: It cannot go on, or there is nothing that it could be a worker of.
    """
    if not args.dynamo and args.listen is None:
        raise RequestError(
            "a worker is somebody's",
            where="--dynamo",
            expected="that, or --listen HOST:PORT",
            hint="Give one, or serve without anybody in front by `coldframe serve`.",
        )
    role: Role = args.role or ("aggregated" if args.dynamo else "decode")
    if args.listen is not None and role != "decode":
        raise RequestError(
            "whoever takes requests over from other fronts decodes them",
            where="--role",
            expected="decode",
            got=role,
        )
    if len(args.models) > 1:
        raise RequestError(
            "a worker has one model",
            where="MODEL",
            expected="one",
            got=len(args.models),
            hint="Start one worker for each.",
        )
    if args.dynamo:
        args.dynamo_settings = _dynamo_settings(args, role)
        check_installed()
    from coldframe.runtime.commands import serve

    args.peer_finder = finder = _peer_finder(args) if args.dynamo else None
    try:
        return serve.run(args, args.listen)
    finally:
        if finder is not None:
            finder.close()


def _peer_finder(args: argparse.Namespace) -> PeerFinder | None:
    """What finds peers in Dynamo's discovery, where they are looked for there.

    `args.peers_from` has its list afterwards.
    """
    if not args.peers_from:
        return None
    from coldframe.runtime.endpoint.served import named_models
    from coldframe.runtime.integrations.dynamo.peer_finder import PeerFinder, wait_of

    waits = [wait_of(place) for place in args.peers_from]
    if all(wait is None for wait in waits):
        return None
    (model,) = named_models(args, args.profile).values()
    finder = PeerFinder(args.dynamo_settings, model, args.serve_peers, args.peers_process)
    args.peers_from = [
        place if wait is None else finder.place(wait)
        for place, wait in zip(args.peers_from, waits, strict=True)
    ]
    return finder


def _dynamo_settings(args: argparse.Namespace, role: Role) -> DynamoSettings:
    """How it is registered."""
    template = args.chat_template
    return DynamoSettings.of(
        role,
        namespace=args.namespace,
        component=args.component,
        endpoint=args.endpoint,
        discovery=args.discovery_backend,
        request_plane=args.request_plane,
        event_plane=args.event_plane,
        chat_template=None if template is None else os.path.abspath(template),
        most_running=args.max_running,
        grace_s=_grace_s(),
    )


def _grace_s() -> float:
    """How long requests are taken after it has left the discovery, in seconds."""
    text = os.environ.get(_GRACE_VARIABLE, "")
    try:
        seconds = float(text) if text else _GRACE_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise RequestError(
            "this is no time", where=_GRACE_VARIABLE, expected="0 or more seconds", got=text
        )
    return seconds
