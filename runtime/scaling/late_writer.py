"""Writes what it was given last, in a thread: whoever has tokens to pass on waits for no disk.

One write at a time, in the order given. What is given while one goes on waits for its end, and what
was waiting already is not written any more: it is older.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["LateWriter"]

_What = TypeVar("_What")


class LateWriter(Generic[_What]):
    """Calls something with the latest of what it is given.

    Args:
        write: Is called in a thread, by one at a time; may take as long as it likes.
        failed: Gets what it raises, in that thread.
        name: The thread's.
    """

    def __init__(
        self, write: Callable[[_What], None], failed: Callable[[Exception], None], name: str
    ) -> None:
        self._write = write
        self._failed = failed
        self._name = name
        self._changed = threading.Condition()
        self._next: list[_What] = []
        self._busy = False

    def give(self, what: _What) -> None:
        """Has that written as soon as may be."""
        with self._changed:
            self._next = [what]
            if self._busy:
                return
            self._busy = True
        # Only for as long as there is something to write: a process with one thread forks easily.
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits until all that was given has been written: whether it has been, in so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._next:
                    self._busy = False
                    self._changed.notify_all()
                    return
                what = self._next.pop()
            try:
                self._write(what)
            except Exception as error:  # noqa: BLE001 - what comes next is written all the same
                self._failed(error)
