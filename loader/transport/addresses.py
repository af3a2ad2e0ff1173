"""Where KV is given: the listener's address, and what others are told of it."""

from __future__ import annotations

import socket

from coldframe.loader.errors import PlatformError
from coldframe.loader.own_address import own_address
from coldframe.loader.transport.base import parse_address

__all__ = ["address_of", "bound", "place_of"]


def place_of(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`.

    Raises:
        PlatformError: It is no address.
    """
    place = parse_address(address)
    if place is None:
        raise PlatformError(
            "this is no address to give KV at", got=repr(address), expected="HOST:PORT"
        )
    return place


def bound(address: str) -> socket.socket:
    """A socket that listens at `HOST:PORT`; port 0 takes any.

    Raises:
        PlatformError: It is no address, or one that cannot be listened at.
    """
    from coldframe.loader.peers.listener import listen

    place = place_of(address)
    try:
        return listen(*place)
    except PlatformError as error:
        raise PlatformError(
            "KV cannot be given at this address", where=address, got=error.got, hint=error.hint
        ) from None


def address_of(listener: socket.socket, advertise: str | None) -> str:
    """How others reach a listener, as a ticket says it.

    Args:
        listener: The listener.
        advertise: The host to name; None finds one out, and with an empty one only the port is
            said: who passes a ticket on knows by which address it reaches the other.

    Raises:
        PlatformError: It listens at all addresses, and none can be told from the others.
    """
    host, port, *_ = listener.getsockname()
    if advertise == "":
        return f":{port}"
    host = advertise or own_address(host, "Name it with --kv-advertise, or set POD_IP.")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
