"""Threads of the connector, which copy and wait beside the one that computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["LateThread"]


class LateThread:
    """A thread that is started by who first needs it.

    On Linux a thread gets the priority of the one that starts it, and keeps it. An engine may be
    made by a thread of a low one; who gives it requests has that of all others.

    Args:
        run: What it does.
        name: Its name.
    """

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._run = run
        self._thread = threading.Thread(target=self._roaming, name=name, daemon=True)

    def start(self) -> None:
        """Starts it, where that has not been done; from one thread at a time."""
        if self._thread.ident is None:
            self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits until it has ended, where it was ever started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _roaming(self) -> None:
        _roam()
        self._run()


def _roam() -> None:
    """Lets this thread run wherever one of the process may.

    vLLM binds the threads that compute to cores, and a thread that they start would share one with
    the one that has started it.
    """
    allowed: set[int] = set()
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:
        return  # who is confined may not see it
    for task in tasks:
        try:
            allowed |= os.sched_getaffinity(int(task))
        except OSError:
            continue
    if allowed:
        os.sched_setaffinity(0, allowed)
