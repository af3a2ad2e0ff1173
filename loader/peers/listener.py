"""Where peers are served: a listening socket, and who may ask there."""

from __future__ import annotations

import socket

from coldframe.loader.errors import PlatformError
from coldframe.loader.peers.http import TOKEN_VARIABLE

__all__ = ["check_access", "listen"]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for a server.

    Args:
        host: A name or an address of this machine; `0.0.0.0` or `::` for all.
        port: TCP port; 0 takes a free one.

    Raises:
        PlatformError: The port is taken, or the address is not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        raise PlatformError(
            "peers cannot be served at this address",
            where=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            got=error.strerror if isinstance(error, OSError) else error,
            hint="Give an address of this machine and a port that is free.",
        ) from None
    return listener


def check_access(listener: socket.socket, token: str | None) -> None:
    """Makes sure that not anybody can ask.

    Args:
        listener: A listening socket.
        token: What peers must send, or None.

    Raises:
        PlatformError: The token cannot be sent, or there is none and others than this machine can
            reach the socket.
    """
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise _bad_token("spaces, control characters or other letters in it")
    if token == "":
        raise _bad_token("nothing")
    host = str(listener.getsockname()[0]).removeprefix("::ffff:")
    if token is None and host != "::1" and not host.startswith("127."):
        raise PlatformError(
            "there is no token for peers",
            where=host,
            expected="a token, since other machines can reach this address",
            hint=f"Set {TOKEN_VARIABLE} here and where the peers run, or serve at 127.0.0.1.",
        )


def _bad_token(got: str) -> PlatformError:
    return PlatformError(
        "this is no token for peers",
        where=TOKEN_VARIABLE,
        expected="letters, digits and signs without spaces",
        got=got,
        hint="Set another one here and where the peers run.",
    )
