"""The process that fetches jobs from a platform's queue and hands them to the gateway.

It talks to the platform and to whoever puts jobs into the queue, so it has as few rights as the
gateway. Of the front's environment it gets what its platform's SDK reads, and no other secret.
"""

from __future__ import annotations

import os
import signal

from coldframe.loader.process import Child, spawn_python
from coldframe.loader.wire import Channel
from coldframe.runtime.start.environment import without_secrets
from coldframe.snapshot.identity import Identity

__all__ = ["JobFetcher", "fetch"]

_MAIN = "from coldframe.runtime.endpoint.jobs import fetch; fetch(3)"
_PLATFORM = "RUNPOD_"


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
        sdk = {name: value for name, value in os.environ.items() if name.startswith(_PLATFORM)}
        self._channel, theirs = Channel.pair()
        try:
            self._child: Child = spawn_python(_MAIN, [], theirs.fileno(), without_secrets() | sdk)
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._channel.send(
            {
                "type": "fetch",
                "url": f"http://127.0.0.1:{port}",
                "key": key,
                "user": user.to_wire(),
                "parent": os.getpid(),
            }
        )

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
        self._channel.close()
        self._child.kill()


def fetch(fd: int) -> None:
    """The child's entry.

    Args:
        fd: The inherited end of the front's socket pair.
    """
    from coldframe.loader.process import die_with_parent
    from coldframe.runtime.gateway.preload import may_import
    from coldframe.runtime.integrations.runpod import main
    from coldframe.snapshot.privileges import become, confine

    confine()
    channel = Channel.from_fd(fd)
    told = channel.recv()
    if told is None:
        os._exit(1)
    channel.close()
    identity = Identity.from_wire(told.body["user"])
    # The SDK imports as it goes. Where that user may not, this stays who it is, without rights.
    become(identity if may_import(identity.seen_here()) else Identity.current())
    die_with_parent(told.body["parent"])
    main(told.body["url"], told.body["key"])
