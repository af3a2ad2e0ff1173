"""The port, bound before anything else: whoever asks from now on waits instead of being refused.

Only a guess is parsed here, from the command line and the environment. The imports are few: this
runs before the first byte of the weights is asked for.
"""

from __future__ import annotations

import os
import socket

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.platforms.table import by_name, detect
from coldframe.runtime.start.guess import said

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldframe.runtime.gateway.platforms.table import Profile

__all__ = ["bind", "bind_early", "take_secrets"]

SECRETS = ("COLDFRAME_API_KEYS", "COLDFRAME_API_KEYS_FILE")
"""As `keys` has them; no child of the front has any use for them, the gateway is told by socket."""

_BACKLOG = 4096
"""Connections that wait to be accepted; the kernel has a limit of its own (somaxconn)."""


def bind_early(arguments: Sequence[str]) -> tuple[Profile, list[socket.socket]]:
    """The platform, and the listeners that it or the command line asks for.

    Args:
        arguments: The command's, as they are.

    Raises:
        PlatformError: They cannot be had.
    """
    name = said(arguments, "--platform")
    profile = by_name(name) if name else detect(os.environ, arguments)
    port = said(arguments, "--port", "--http_port")
    if port and port.startswith("tcp://"):
        port = None  # Kubernetes sets COLDFRAME_PORT so where a Service is called coldframe
    host = said(arguments, "--host") or profile.host
    listeners = [bind(host, _number(port) if port else profile.port(os.environ))]
    health = profile.health_port(os.environ)
    if health is not None:
        listeners.append(bind(host, health))
    return profile, listeners


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: An address of this machine; one with a colon is IPv6.
        port: 0 takes any that is free.

    Raises:
        PlatformError: It cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that starts again must not wait for the old one's connections to be forgotten.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise PlatformError(
            "cannot listen",
            where=f"{host} port {port}",
            got=error.strerror or str(error),
            hint="Another --port or --host may be free.",
        ) from error
    return sock


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 0xFFFF):
        raise PlatformError(
            "there is no such port", where="--port", expected="0 to 65535", got=text
        )
    return int(text)


def take_secrets() -> dict[str, str]:
    """What the environment says of API keys, taken out of it before any process is started."""
    return {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
