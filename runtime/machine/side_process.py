"""A question for a short-lived process: what it loads or gives up does not touch this one."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import spawn_python

__all__ = ["ask"]

_MOST_BYTES = 1 << 20


def ask(code: str, what: str, seconds: float = 30.0) -> dict[str, Any]:
    """Runs a line of Python in a bare interpreter, and reads the JSON that it writes.

    Args:
        code: It writes one object to descriptor 3.
        what: What it looks into, for the error.
        seconds: How long it may take.

    Raises:
        PlatformError: It has died, hung or said nothing.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = spawn_python(code, [], theirs.fileno(), dict(os.environ), site_packages=False)
        try:
            text = _read(ours, time.monotonic() + seconds)
            found = json.loads(text)
        except ValueError:  # it has ended in the middle of it
            found = None
        except TimeoutError:
            raise PlatformError(
                f"the process that looks into {what} hangs", expected=f"an answer in {seconds:g} s"
            ) from None
        finally:
            code_of_end = child.kill() if child.poll() is None else child.wait()
    if not isinstance(found, dict):
        raise PlatformError(
            f"the process that looks into {what} died",
            got=f"exit status {code_of_end}" if code_of_end >= 0 else f"signal {-code_of_end}",
            hint="What it said, if anything, is on standard error.",
        )
    return found


def _read(source: socket.socket, until: float) -> bytes:
    """All that comes before the other end closes."""
    found = bytearray()
    while len(found) <= _MOST_BYTES:
        source.settimeout(max(0.001, until - time.monotonic()))
        part = source.recv(1 << 16)
        if not part:
            return bytes(found)
        found += part
    return b""
