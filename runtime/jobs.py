"""The process that fetches jobs from a platform's queue and hands them to the gateway."""

from __future__ import annotations

import os
import signal
import socket

from coldframe.loader.process import Child, spawn_python
from coldframe.snapshot.identity import Identity

__all__ = ["JobFetcher", "fetch"]

_MAIN = (
    "from coldframe.runtime.jobs import fetch; fetch(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
)
_KEY = "COLDFRAME_JOBS_KEY"


class JobFetcher:
    """RunPod's job handler as a child.

    Args:
        port: Where the gateway listens, on the loopback.
        key: An API key that it takes, where it wants one.
        user: Whom the child runs as.

    Raises:
        PlatformError: It cannot be started.
    """

    def __init__(self, port: int, key: str | None, user: Identity) -> None:
        import json

        environment = dict(os.environ)
        if key is not None:
            environment[_KEY] = key
        ours, theirs = socket.socketpair()
        try:
            self._child: Child = spawn_python(
                _MAIN,
                [f"http://127.0.0.1:{port}", str(os.getpid()), json.dumps(user.to_wire())],
                theirs.fileno(),
                environment,
            )
        finally:
            ours.close()
            theirs.close()
        self.pid = self._child.pid

    @property
    def status(self) -> int | None:
        """The exit code, where it has ended."""
        return self._child.poll()

    def drain(self) -> None:
        """Has it fetch no more, and end when its jobs are done."""
        if self._child.poll() is None:
            os.kill(self._child.pid, signal.SIGTERM)

    def close(self) -> None:
        """Ends it."""
        self._child.kill()


def fetch(url: str, parent: int, user: str) -> None:
    """The child's entry.

    Args:
        url: Of the gateway.
        parent: The front, with which it ends.
        user: Whom it becomes, as JSON.
    """
    import json

    from coldframe.loader.process import die_with_parent
    from coldframe.runtime.gateway.preload import may_import
    from coldframe.runtime.integrations.runpod import main
    from coldframe.snapshot.privileges import become, confine

    confine()
    identity = Identity.from_wire(json.loads(user))
    # The SDK imports as it goes. Where that user may not, having no capabilities must do.
    if may_import(identity.seen_here()):
        become(identity)
    die_with_parent(parent)
    main(url, os.environ.pop(_KEY, None))
