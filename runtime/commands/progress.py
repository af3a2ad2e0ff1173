"""A progress bar for the load, on a terminal; nothing of the kind in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["Measured", "ProgressBar"]

_EVERY_S = 0.1
_WIDTH = 28


class Measured(Protocol):
    """What goes on and says how far it is: a board, for one."""

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes done, and bytes in all."""
        ...


class ProgressBar:
    """Draws how far the weights are, with rate and time left.

    Args:
        stream: Where to, standard error by default; it draws only if that is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.active = self._stream.isatty()
        self._drawn_at = 0.0
        self._began: tuple[float, int] | None = None
        self._shown = False

    def update(self, board: Measured | None) -> None:
        if not self.active or board is None:
            return
        moment = time.monotonic()
        if moment - self._drawn_at < _EVERY_S:
            return
        self._drawn_at = moment
        done, total = board.progress
        self._began = self._began or (moment, done)
        rate = (done - self._began[1]) / max(moment - self._began[0], 1e-3)
        left = human_seconds((total - done) / rate) if rate else "?"
        filled = _WIDTH * done // max(total, 1)
        bar = "█" * filled + "░" * (_WIDTH - filled)
        text = (
            f"{bar} {human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s, {left} left"
        )
        self._stream.write(f"\r\x1b[2K{text}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Takes the bar away, before something else is written."""
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
        self.active = False
        self._shown = False
