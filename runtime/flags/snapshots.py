"""The flags about snapshots, of all commands that have them."""

from __future__ import annotations

import argparse

from coldframe.loader.errors import RequestError, SnapshotError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.units import byte_count
from coldframe.snapshot.places import default_store, expanded

__all__ = [
    "add_snapshot_arguments",
    "add_store_arguments",
    "check_forkable",
    "snapshot_options",
    "store_options",
]

_MODES = ("auto", "off", "require")
_DAY_S = 86_400


def add_snapshot_arguments(parser: Parser) -> None:
    """How workers may start."""
    parser.flag(
        "--snapshot",
        metavar="auto|off|require|PLACE",
        default="auto",
        help="start workers as clones of an image: where one fits (auto), never (off), only so "
        "(require), or auto from that store, a directory or s3://bucket/prefix",
    )
    parser.flag(
        "--no-snapshot-create",
        action="store_true",
        help="make no image where there is none, once the replica is idle",
    )
    parser.flag(
        "--no-snapshot-hash",
        action="store_true",
        help="do not hold images against their hashes, as where nobody else can write them",
    )
    parser.flag(
        "--verify-on-restore",
        action="store_true",
        help="have clones answer their image's own prompt before any other",
    )
    add_store_arguments(parser)


def add_store_arguments(parser: Parser) -> None:
    """Where images are kept, and which are taken."""
    parser.flag(
        "--snapshot-store",
        metavar="PLACE",
        help="where images are: a directory or s3://bucket/prefix (~/.cache/coldframe/snapshots)",
    )
    parser.flag(
        "--snapshot-key",
        metavar="FILE",
        help="sign with the key in FILE, and take no image that is not signed with it",
    )
    parser.flag(
        "--snapshot-size",
        metavar="SIZE",
        type=byte_count,
        default=10 << 30,
        help="what all images may take together; the least recently used go first (10GiB)",
    )
    parser.flag(
        "--snapshot-age",
        metavar="DAYS",
        type=float,
        default=30.0,
        help="images that were not used for so long are removed when another is made (30)",
    )


def snapshot_options(args: argparse.Namespace) -> SnapshotOptions:
    """What the flags of `add_snapshot_arguments` stand for.

    Raises:
        RequestError: There is no such way to start workers.
    """
    mode, store = args.snapshot, args.snapshot_store
    if mode not in _MODES:
        if not ("/" in mode or mode.startswith(".")):
            raise RequestError(
                "unknown way to start workers",
                where="--snapshot",
                expected="auto, off, require, or a place with a / in it",
                got=mode,
                hint="A directory is written as ./NAME.",
            )
        mode, store = "auto", mode
    return SnapshotOptions(
        mode,
        expanded(store) if store else default_store(),
        create=mode == "auto" and not args.no_snapshot_create,
        hash=not args.no_snapshot_hash,
        verify=args.verify_on_restore,
        key_file=args.snapshot_key,
        max_bytes=args.snapshot_size,
        max_age_s=args.snapshot_age * _DAY_S,
    )


def store_options(args: argparse.Namespace) -> SnapshotOptions:
    """What the flags of `add_store_arguments` stand for; workers start fresh."""
    return SnapshotOptions(
        "off",
        expanded(args.snapshot_store) if args.snapshot_store else default_store(),
        key_file=args.snapshot_key,
        max_bytes=args.snapshot_size,
        max_age_s=args.snapshot_age * _DAY_S,
    )


def check_forkable(device: str) -> None:
    """Whether a worker on that device can be forked.

    Raises:
        SnapshotError: It cannot: a fork has nothing of what its parent has on a GPU.
    """
    if device != CPU:
        raise SnapshotError(
            "a worker on a GPU cannot be forked",
            where="--device",
            expected=CPU,
            got=device,
            hint="Make an image instead: `coldframe snapshot create`.",
        )
