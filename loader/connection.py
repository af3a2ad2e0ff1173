"""One connection to the memory service, from the service's side."""

from __future__ import annotations

from coldframe.loader.wire import Channel

__all__ = ["Connection"]


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
