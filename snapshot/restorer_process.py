"""The process that restores images, started bare: what it is to find is told over its socket."""

from __future__ import annotations

import os
import socket
import sys
from time import monotonic_ns

from coldframe.loader.process import Child, spawn_python

__all__ = ["RestorerProcess"]

_MAIN = "from coldframe.snapshot.restorer import main; main(3, int(sys.argv[1]), first_ns)"
_AHEAD = "from coldframe.snapshot.places import read_ahead; read_ahead(sys.argv[2]); "


class RestorerProcess:
    """A process that restores images, and has not been told yet which.

    Args:
        executable: The interpreter of those that were frozen; by default this one. What an image
            must fit is looked at there.
        store: Where images probably are; they are on their way from the disk while it imports.

    Raises:
        PlatformError: It cannot be started.
    """

    def __init__(self, executable: str | None = None, store: str | None = None) -> None:
        # Another one has packages of its own, and this package among them.
        own = executable is None or executable == sys.executable
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.child: Child = spawn_python(
                _MAIN if store is None else _AHEAD + _MAIN,
                [str(monotonic_ns()), *([] if store is None else [store])],
                theirs.fileno(),
                dict(os.environ),
                site_packages=not own,
                executable=executable,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.socket = ours

    def close(self) -> None:
        """Ends it."""
        self.socket.close()
        self.child.kill()
