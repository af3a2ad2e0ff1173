"""A vLLM engine that decodes alone and does not come up: tried again, ever later, and not for ever.

One that was up and died is replaced at once, like any worker. One that never was takes so long to
start that a count of deaths in a minute does not tell that no other will come up, either.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.runtime.replica.bridge import AGAIN_S
from coldframe.runtime.replica.launch import WorkerProcess

__all__ = ["Comebacks"]

_MOST = 3
"""Starts in a row that may fail."""


class Comebacks:
    """The starts of an engine without which nobody decodes.

    Args:
        start: Starts a worker of a role, or raises a `ColdframeError`.
        wanted: Whether there is such an engine.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        start: Callable[[str], None],
        *,
        wanted: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._wanted = wanted
        self._clock = clock
        self._failures = 0
        self._due: float | None = None
        """When the next one is to be started; None where that is settled."""

    def died(self, worker: WorkerProcess, why: str) -> bool:
        """A worker is dead. Whether it is an engine that was not up, which is seen to here.

        Raises:
            ReplicaError: It is the last of as many as are tried.
        """
        if not self._wanted or worker.role != "vllm":
            return False
        if worker.up:
            self._failures = 0
            return False
        self._failures += 1
        if self._failures >= _MOST:
            raise ReplicaError(
                "vLLM does not come up, and nobody else decodes",
                where=worker.name,
                expected=f"fewer than {_MOST} starts in a row that fail",
                got=why,
                hint="What it said last is on standard error.",
            )
        self._due = self._clock() + AGAIN_S * 2 ** (self._failures - 1)
        return True

    def tick(self) -> ColdframeError | None:
        """Starts the engine that is due; to be called about once a second.

        Returns:
            Why that cannot be done, where it cannot.
        """
        if self._due is None or self._clock() < self._due:
            return None
        self._due = None
        try:
            self._start("vllm")
        except ColdframeError as error:
            return error
        return None
