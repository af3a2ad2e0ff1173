"""The very first step of a cold start: the memory service's process, before anything else.

It needs nothing from the command line; what to load follows over its socket. So its interpreter
starts while the front still reads its arguments. The imports here are few for that reason.
"""

from __future__ import annotations

import os
import socket
from time import monotonic_ns

from coldframe.loader.process import Child, make_run_dir, remove_run_dir, spawn_python

__all__ = ["MemoryProcess"]

_MAIN = (
    "from coldframe.loader.service import main; main(3, sys.argv[1], int(sys.argv[2]), first_ns)"
)


class MemoryProcess:
    """A memory service that has not been told yet what to load.

    Args:
        parent: Where the run directory is made; None chooses.

    Raises:
        PlatformError: The process or the run directory cannot be made.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.started_ns = monotonic_ns()
        self.run_dir, self.lock = make_run_dir(parent)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.child: Child = spawn_python(
                _MAIN,
                [self.run_dir, str(self.started_ns)],
                theirs.fileno(),
                dict(os.environ),
                site_packages=False,
            )
        except BaseException:
            ours.close()
            remove_run_dir(self.run_dir)
            os.close(self.lock)
            raise
        finally:
            theirs.close()
        self.socket = ours
        self.spawned_ns = monotonic_ns()
