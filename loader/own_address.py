"""By which address others reach this machine."""

from __future__ import annotations

import os
import socket

from coldframe.loader.errors import PlatformError

__all__ = ["own_address"]

_ANY = ("0.0.0.0", "::")
_FAR = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}
"""Addresses that are nobody's (RFC 5737, RFC 3849)."""


def own_address(host: str, hint: str) -> str:
    """The address by which others reach a listener.

    Args:
        host: Where it listens. All addresses of the machine are told from one another: it is the
            pod's, or the one that packets to other networks would leave by.
        hint: What to do where that cannot be told.

    Raises:
        PlatformError: It cannot.
    """
    if host not in _ANY:
        return host
    pod = os.environ.get("POD_IP")
    if pod:
        return pod
    family, far = _FAR[host]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((far, 9))  # nothing is sent: it asks which way that would be
            return str(sock.getsockname()[0])
        except OSError:
            raise PlatformError(
                "it cannot be told by which address others reach this machine",
                where=host,
                hint=hint,
            ) from None
