"""What is between asyncio and the other end of a connection: the kernel's TCP."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios

__all__ = ["prepare", "unacknowledged"]

_INTERNET = (socket.AF_INET, socket.AF_INET6)


def prepare(sock: socket.socket, seconds: float) -> None:
    """Sends each token at once, and ends the connection of a client that is gone without a word.

    Without the first, an answer waits 40 ms for the client's kernel to acknowledge its head.
    asyncio sees to it, but not where a listener was made without naming its protocol. Without the
    second, a request is computed for nobody, and what is sent to it tried for 15 minutes.

    Args:
        sock: A connection; nothing happens where it is not TCP.
        seconds: How long what was sent may stay unacknowledged, or the client's window closed.
    """
    if sock.family not in _INTERNET:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that were sent and the other side has not acknowledged (tcp(7), SIOCOUTQ)."""
    try:
        found = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:  # it is closed
        return 0
    return int.from_bytes(found, sys.byteorder)
