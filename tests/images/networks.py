"""Networks with nothing but a loopback in them, and what is asked or served there.

A network is a thread's own, and a socket's for good: what a thread in one starts is in it, too.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["network", "within"]

_NEW_NETWORK = 0x40000000
_SET_FLAGS = 0x8914  # SIOCSIFFLAGS, netdevice(7)
_UP = 0x1


def within(place: int, call: Callable[[], Any]) -> Any:
    """Calls something in a thread that is in a network.

    Args:
        place: A descriptor of the network.
        call: What is called; what it raises is raised here.
    """

    def inside() -> Any:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.setns(place, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
        return call()

    return _in_a_thread(inside)


@contextmanager
def network() -> Iterator[int]:
    """A descriptor of a new network, which goes with the last of who is in it."""
    place = _in_a_thread(_made)
    try:
        yield place
    finally:
        os.close(place)


def _made() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        fcntl.ioctl(asked, _SET_FLAGS, struct.pack("16sh22x", b"lo", _UP))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def work() -> None:
        try:
            found.extend((True, call()))
        except BaseException as error:  # noqa: BLE001 - raised below
            found[:] = [False, error]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if not found[0]:
        raise found[1]
    return found[1]
