"""Free memory that a virtual machine gives back to its host, and has to ask for again.

Where a balloon device reports free pages (Linux `mm/page_reporting.c`: two seconds after they were
freed), the first touch of such memory goes through the host, at a tenth of the rate or less. A
replica that has been at zero for a while starts in such memory; one that is started over and over,
as measurements do, does not. So they rest before each start.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser

__all__ = ["add_rest", "is_given_back", "rest_of"]

_DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"
_REPORTING = 5
"""The feature's number: VIRTIO_BALLOON_F_REPORTING of virtio 1.2, 5.5.3."""
_REST_S = 8.0
"""Not all that is free is reported at once: a share of it every two seconds."""


def is_given_back(driver: str = _DRIVER) -> bool:
    """Whether this machine gives free memory back to a host."""
    for features in Path(driver).glob("*/features"):
        try:
            if features.read_text()[_REPORTING : _REPORTING + 1] == "1":
                return True
        except OSError:
            continue  # the device is being taken away
    return False


def add_rest(parser: Parser) -> None:
    """The flag of commands that measure starts."""
    parser.flag(
        "--at-zero",
        type=float,
        metavar="SECONDS",
        help="before each start, as a replica is at zero for a while before it comes up "
        f"({_REST_S:g} where free memory goes back to a host, else 0)",
    )


def rest_of(args: argparse.Namespace) -> float:
    """How long to rest, in seconds.

    Raises:
        RequestError: For less than no time, or for ever.
    """
    rest: float | None = args.at_zero
    if rest is None:
        return _REST_S if is_given_back() else 0.0
    if not 0 <= rest < math.inf:
        raise RequestError("no such time", where="--at-zero", expected="0 or more", got=rest)
    return rest
