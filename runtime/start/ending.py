"""SIGTERM and SIGINT, kept until there is somebody to end things in good order."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ending"]


class Ending:
    """Takes the signals from now on.

    A process that is a container's first gets none that it has no handler for: the kernel keeps
    them from it. So this is among the first things that a server does.
    """

    def __init__(self) -> None:
        self._asked, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def follow(
        self, watch: Callable[[int, Callable[[], None]], None], end: Callable[[], None]
    ) -> None:
        """Has something called for each signal, also for those that came before.

        Args:
            watch: Registers what is called when a descriptor is readable.
            end: Called for each signal.
        """

        def asked() -> None:
            for number in os.read(self._asked, 16):
                if number in (signal.SIGTERM, signal.SIGINT):
                    end()

        watch(self._asked, asked)
