"""What the memory service tells its owner, with the spans recorded so far; and that all failed."""

from __future__ import annotations

from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.timeline import Recorder

__all__ = ["Reporter"]


class Reporter:
    """Tells. All methods are the loop's.

    Args:
        reactor: Has the owner, and the workers.
        recorder: Has the spans.

    Attributes:
        failure: Why the replica is of no use any more, where that is so; the last reason given.
    """

    def __init__(self, reactor: Reactor, recorder: Recorder) -> None:
        self._reactor = reactor
        self._recorder = recorder
        self.failure: ColdframeError | None = None

    def tell(self, body: dict[str, Any]) -> None:
        """Sends a message to the owner, and with it the spans since the last."""
        spans = [span.to_wire() for span in self._recorder.drain()]
        self._reactor.send(self._reactor.owner, {**body, "spans": spans})

    def fail(self, error: ColdframeError) -> None:
        """Tells all workers, those to come, and the owner."""
        self.failure = error
        body = {"type": "failed", "error": error.to_wire()}
        for worker in self._reactor.workers:
            self._reactor.send(worker, body)
        self.tell(body)
