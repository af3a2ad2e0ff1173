"""One connection to the memory service, from the service's side."""

from __future__ import annotations

import os
from typing import Any

from coldframe.loader.errors import ReplicaError
from coldframe.loader.wire import Channel

__all__ = ["OWNER", "Connection"]

OWNER = "owner"
"""The key of the one that started the service, and ends it."""


class Connection:
    """The owner, a gateway or a worker.

    Args:
        key: Its name in the ledger; no two connections ever have the same.
        channel: The socket.
    """

    def __init__(self, key: str, channel: Channel) -> None:
        self.key = key
        self.channel = channel
        self.name = ""
        """What it calls itself, for messages to people."""
        self.gone = False
        self.attached = False
        """Whether it has said hello: a worker, which maps the arenas."""
        self.remapping = False
        """Whether it has been told to map the weights anew, and has not said yet that it did."""
        self.busy = 0
        """What is written for it elsewhere than by itself: its blocks stay its own meanwhile."""
        self.waits_for_blocks = False
        self._held: list[tuple[dict[str, Any], tuple[int, ...]]] | None = None

    def require_owner(self, does: str) -> None:
        """Refuses what only the owner may ask.

        Args:
            does: What that is: "loads", for example.

        Raises:
            ReplicaError: This is not the owner.
        """
        if self.key != OWNER:
            raise ReplicaError(f"only the owner {does}", where=self.key)

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Sends a message, or keeps it with copies of its descriptors, where all is held back.

        Raises:
            ReplicaError: It cannot be sent.
        """
        if self._held is None:
            self.channel.send(body, fds)
        else:
            self._held.append((body, tuple(os.dup(fd) for fd in fds)))

    def hold(self) -> None:
        """Nothing is sent from now on."""
        self._held = self._held or []

    def release(self) -> None:
        """Sends what was held back, in its order, and all that follows at once.

        Raises:
            ReplicaError: It cannot be sent.
        """
        held, self._held = self._held or [], None
        try:
            for body, fds in held:
                self.channel.send(body, fds)
        finally:
            _close(held)

    def close(self) -> None:
        """Closes the socket; what was held back is of no interest any more."""
        held, self._held = self._held or [], None
        _close(held)
        self.channel.close()


def _close(held: list[tuple[dict[str, Any], tuple[int, ...]]]) -> None:
    for _, fds in held:
        for fd in fds:
            os.close(fd)
