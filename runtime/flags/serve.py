"""The flags of `coldframe serve`, and what they say of the gateway and of models that rest."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from coldframe.loader.errors import RequestError
from coldframe.runtime.commands.run import MODEL_HELP, add_replica_arguments
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.gateway.cors import check_origins
from coldframe.runtime.gateway.logs import LEVELS
from coldframe.runtime.gateway.platforms.table import PROFILES
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.units import byte_count

# Policies are imported when the processes are on their way: see `serve.run`.
if TYPE_CHECKING:
    from collections.abc import Callable

    from coldframe.runtime.gateway.platforms.table import Profile
    from coldframe.runtime.scaling.policies import LivePolicy

__all__ = ["add_arguments", "policy_for", "settings_for"]

_MAX_BODY = 8 << 20
_WAIT_S = 300.0
_FIXED = "fixed"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help=f"{MODEL_HELP}; by default where the platform puts it. The first of several is "
        "started at once, the others when they are asked",
    )
    parser.flag("--platform", metavar="NAME", help="whose contract to keep; else it is detected")
    parser.flag("--host", help="the address to listen on (0.0.0.0)")
    parser.flag("--port", metavar="N", help="the port (the platform's, else 8000); 0 takes any")
    parser.flag(
        "--model-name",
        metavar="NAME",
        action="append",
        help="as clients call it (MODEL's last part); of several models each one's, in their order",
    )
    parser.flag(
        "--device-memory",
        metavar="SIZE",
        type=byte_count,
        help="what weights and KV of all models may take together (what is available); those "
        "used longest ago make room",
    )
    parser.flag(
        "--chat-template", metavar="FILE", help="a Jinja template in place of the checkpoint's"
    )
    parser.flag(
        "--user",
        metavar="UID[:GID]",
        help="whom gateway and workers run as, where this is started as root (65532)",
    )
    queue = parser.add_argument_group("requests that wait")
    parser.flag(
        "--max-running",
        metavar="N",
        type=int,
        default=32,
        group=queue,
        help="sequences that the workers get at once (32)",
    )
    parser.flag(
        "--max-waiting",
        metavar="N",
        type=int,
        default=1024,
        group=queue,
        help="sequences that wait for them; more are refused: 503 while cold, then 429 (1024)",
    )
    parser.flag(
        "--max-wait",
        metavar="SECONDS",
        type=float,
        group=queue,
        help="how long a request may wait for its first token (as long as the platform does, "
        "else 300)",
    )
    parser.flag(
        "--max-body",
        metavar="SIZE",
        type=byte_count,
        group=queue,
        help="a request's body at most (the platform's limit, else 8MiB)",
    )
    parser.flag(
        "--drain",
        metavar="SECONDS",
        type=float,
        help="how long open requests may take after SIGTERM (what the platform grants, less a bit)",
    )
    rest = parser.add_argument_group("when nobody asks")
    parser.flag(
        "--policy",
        metavar="POLICY",
        default="fixed",
        group=rest,
        help="when a model rests, and is there again ahead of who asks: fixed (by --idle and "
        "--park), or by its requests so far: histogram[:NAME=VALUE,...], next[:NAME=VALUE,...] "
        "(fixed)",
    )
    parser.flag(
        "--budget",
        metavar="SECONDS",
        type=float,
        group=rest,
        help="for how many device seconds in an hour all models together may be held warm while "
        "nobody asks (no limit)",
    )
    parser.flag(
        "--policy-state",
        metavar="FILE",
        group=rest,
        help="keep there what the policy has learned, for the next process",
    )
    parser.flag(
        "--idle",
        metavar="SECONDS",
        type=float,
        group=rest,
        help="how long without a request until it rests (it stays warm)",
    )
    parser.flag(
        "--park",
        metavar="SECONDS",
        type=float,
        default=0.0,
        group=rest,
        help="how long it is parked then, the weights in memory, before it goes to zero (0)",
    )
    parser.flag(
        "--pool",
        metavar="N",
        type=int,
        default=0,
        group=rest,
        help="so many models are kept parked, whoever was not asked yet among them, where there is "
        "room for them (0)",
    )
    parser.flag(
        "--on-idle",
        choices=["zero", "exit"],
        default="zero",
        group=rest,
        help="at zero: listen on, without a model, until somebody asks; or end with status 0"
        " (zero)",
    )
    access = parser.add_argument_group(
        "access (API keys are in COLDFRAME_API_KEYS, or in the file COLDFRAME_API_KEYS_FILE names)"
    )
    parser.flag(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        group=access,
        help="a page's origin that may ask; may be given again (none may)",
    )
    parser.flag(
        "--open-metrics", action="store_true", group=access, help="/metrics needs no API key"
    )
    parser.flag("--log-format", choices=["json", "text"], default="json")
    parser.flag("--log-level", choices=LEVELS, default="info")
    add_replica_arguments(parser)
    for profile in PROFILES:
        for alias, meaning in profile.aliases:
            dest = {"port": "port", "model": "model_dir", "name": "model_name"}[meaning]
            action = "append" if meaning == "name" else "store"
            parser.add_argument(alias, dest=dest, action=action, help=argparse.SUPPRESS)


def settings_for(
    args: argparse.Namespace, profile: Profile, models: tuple[str, ...]
) -> GatewaySettings:
    """What the gateway is told.

    Args:
        args: The flags.
        profile: The platform's.
        models: As clients call them.

    Raises:
        RequestError: There is something that cannot be.
    """
    for name in ("max_running", "max_waiting", "max_wait", "drain", "idle", "budget"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise RequestError(
                "there must be some",
                where=f"--{name.replace('_', '-')}",
                expected="a number above 0",
                got=value,
            )
    if not 0 <= args.park < math.inf:
        raise RequestError(
            "this is no time", where="--park", expected="0 or more seconds", got=args.park
        )
    if args.pool < 0:
        raise RequestError(
            "there cannot be fewer than none", where="--pool", expected="0 or more", got=args.pool
        )
    if args.pool and args.on_idle == "exit":
        raise RequestError(
            "with a pool there is always a model that is kept, and never an end",
            where="--pool",
            got="--on-idle exit",
            hint="Leave one of the two out.",
        )
    policy_for(args)
    return GatewaySettings(
        models=models,
        platform=profile.name,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        max_wait_s=args.max_wait or profile.request_s or _WAIT_S,
        max_body=args.max_body or profile.max_body or _MAX_BODY,
        drain_s=profile.drain_s if args.drain is None else args.drain,
        cors=check_origins(args.cors_origin or ()),
        open_metrics=args.open_metrics,
        log_format=args.log_format,
        log_level=args.log_level,
    )


def policy_for(args: argparse.Namespace) -> Callable[[], LivePolicy]:
    """What makes each model's policy.

    Raises:
        RequestError: There is none such, or flags contradict one another.
    """
    if args.policy == _FIXED:
        from coldframe.runtime.scaling.policies import FixedKeepAlive

        # Who is in the pool stays parked; the fleet ends those that are too many.
        return lambda: FixedKeepAlive(args.idle, None if args.pool else args.park)
    from coldframe.runtime.scaling.spec import policy_from

    for flag in ("idle", "park", "pool"):
        if getattr(args, flag):
            raise RequestError(
                "this is for --policy fixed alone",
                where=f"--{flag}",
                expected=f"--policy {_FIXED}",
                got=f"--policy {args.policy}",
                hint="Leave one of the two out: other policies have times of their own.",
            )
    return policy_from(args.policy)
