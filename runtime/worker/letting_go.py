"""A worker's answer to being told to rest: that it has nothing of the device that is not its own.

Then its context can leave the device (`runtime.replica.contexts`). Weights and KV go by what the
memory service says; here is only waited for that, and for what is queued on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coldframe.runtime.worker.worker import Worker

__all__ = ["LettingGo"]


class LettingGo:
    """Whether a worker was told to rest, and has said that it does.

    Args:
        worker: The worker. Its main thread has this.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._number: int | None = None

    def asked(self, number: int) -> None:
        """It was told to; the number is the order's, and goes back with the answer."""
        self._number = number

    def check(self) -> None:
        """Answers, if that is due; to be called while nothing is computed."""
        if self._number is None or not self._worker.client.holds_nothing:
            return
        from coldframe.runtime.engine.device import give_back, reserved

        self._worker.model.settle()
        give_back(self._worker.model.device)  # or it would be kept in host memory instead
        number, self._number = self._number, None
        own_bytes = reserved(self._worker.model.device) + self._worker.steps.own_bytes
        told = {"type": "rested", "number": number, "own_bytes": own_bytes}
        self._worker.control.send(told)
