"""The flags that say how much KV there is, and where it is kept."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import DeviceError, RequestError
from coldframe.loader.kv.options import DEFAULT_BYTES, KvStoreOptions
from coldframe.loader.transport.base import DEFAULT_WAYS, TRANSPORTS
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import TransferOptions
from coldframe.runtime.units import byte_count, byte_count_or_none

__all__ = ["add_kv_arguments", "kv_options"]


def add_kv_arguments(parser: Parser) -> None:
    """The flags of KV: its memory, and what outlives a request."""
    flag = partial(parser.flag, group=parser.add_argument_group("KV"))
    flag("--kv-memory", metavar="SIZE", type=byte_count, help="memory for KV, as 2GiB")
    flag(
        "--no-prefix-cache",
        action="store_true",
        help="compute each prompt from its first token, also where an earlier one began alike",
    )
    flag(
        "--kv-store",
        metavar="DIR",
        help="keep KV of prompts and answers there, for those that begin alike, also behind a "
        "return to zero; prompts can be told from it",
    )
    flag(
        "--kv-store-bytes",
        metavar="SIZE",
        type=byte_count,
        default=DEFAULT_BYTES,
        help="how much of it, before what was used longest ago goes (20GiB)",
    )
    flag(
        "--kv-store-memory",
        metavar="SIZE",
        type=byte_count_or_none,
        default=0,
        help="host memory for KV that has left its own; parked, too (none: on a CPU both are the "
        "same memory)",
    )
    flag(
        "--kv-listen",
        metavar="HOST:PORT",
        help="give KV to other hosts there, by ticket (to this machine alone; where there are "
        "decode workers on others, at any port; the secret is in COLDFRAME_KV_SECRET_FILE)",
    )
    flag("--kv-advertise", metavar="HOST", help="what other hosts call that one (found out)")
    flag(
        "--kv-ways",
        metavar="NAME,...",
        default=",".join(DEFAULT_WAYS),
        help=f"how KV may go to other replicas, and come: {', '.join(TRANSPORTS)} "
        f"({','.join(DEFAULT_WAYS)})",
    )
    flag(
        "--kv-check",
        action="store_true",
        help="hold KV that comes from another host against a keyed hash, which takes a core a "
        "gigabyte or so per second on both sides",
    )
    flag(
        "--kv-ttl",
        metavar="SECONDS",
        type=float,
        default=TransferOptions().ttl_s,
        help="how long KV is kept for who has a ticket (30)",
    )


def transfer_options(args: argparse.Namespace, *, remotes: bool) -> TransferOptions:
    """How KV goes to other replicas, and comes from them.

    Args:
        args: The flags.
        remotes: Whether some of those who decode are on other hosts.

    Raises:
        RequestError: A value says nothing that can be.
    """
    from coldframe.loader.transport.registry import check_names

    names = [name.strip() for name in args.kv_ways.split(",")]
    if not 0 < args.kv_ttl <= 3600:
        raise RequestError(
            "this is no time", where="--kv-ttl", expected="0 to 3600 seconds", got=args.kv_ttl
        )
    listen, advertise = args.kv_listen or None, args.kv_advertise or None
    if remotes and listen is None:
        listen, advertise = "0.0.0.0:0", ""
    ways = check_names(names, "--kv-ways")
    return TransferOptions(listen, advertise, ways, args.kv_check, args.kv_ttl)


def kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ReplicaOptions` that the flags stand for; the directory is there then.

    Raises:
        RequestError: KV is to be kept that is not to be used.
        DeviceError: There is not so much memory.
        PlatformError: The directory cannot be used.
    """
    # An empty name is none, as where a platform sets all variables that it knows.
    wanted = bool(args.kv_store) or args.kv_store_memory > 0
    if wanted and args.no_prefix_cache:
        raise RequestError(
            "KV that is kept is of no use where each prompt is computed from its first token",
            where="--kv-store",
            got="--no-prefix-cache",
            hint="Leave one of the two out.",
        )
    available = memory_available()
    if args.kv_store_memory > available:
        raise DeviceError(
            "the KV store's memory is larger than what is available",
            where="--kv-store-memory",
            expected=f"at most {available:,} bytes",
            got=f"{args.kv_store_memory:,}",
            hint="Ask for less.",
        )
    directory = None
    if args.kv_store:
        from coldframe.loader.kv.disk import prepare_directory

        directory = os.path.abspath(os.path.expanduser(args.kv_store))
        prepare_directory(directory)
    return {
        "kv_bytes": args.kv_memory,
        "prefix_cache": not args.no_prefix_cache,
        "kv_store": (
            KvStoreOptions(directory, args.kv_store_bytes, args.kv_store_memory) if wanted else None
        ),
    }
