"""A connection's end that leaves its peer time to read the last answer.

Closing a socket with unread data in it resets the connection, and a reset throws away what the
peer has not read yet: the very answer that says why it is refused. So the answer is sent, then the
end of the stream, and what still comes is read and forgotten for a moment (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["LingeringTransport"]


class LingeringTransport(asyncio.Transport):
    """A transport whose `close` waits for a peer that is still sending.

    Args:
        transport: The real one.
        still_sending: Whether the peer may be in the middle of something.
        seconds: How long it is listened to.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        still_sending: Callable[[], bool],
        seconds: float,
    ) -> None:
        super().__init__()
        self._real = transport
        self._still_sending = still_sending
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self.write = transport.write  # type: ignore[method-assign]  # no detour for each token
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]

    @property
    def lingering(self) -> bool:
        """Whether nothing is sent any more, and what comes is to be forgotten."""
        return self._timer is not None

    def close(self) -> None:
        if self._timer is not None:
            return
        if self._real.is_closing() or not self._still_sending() or not self._real.can_write_eof():
            self._real.close()
            return
        self._real.resume_reading()
        try:
            self._real.write_eof()
        except OSError:  # it is gone already
            self._real.abort()
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._seconds, self._real.abort)

    def abort(self) -> None:
        self._real.abort()

    def lost(self) -> None:
        """Ends the waiting; for `connection_lost`."""
        if self._timer is not None:
            self._timer.cancel()

    def is_closing(self) -> bool:
        return self.lingering or self._real.is_closing()

    def pause_reading(self) -> None:
        self._real.pause_reading()

    def resume_reading(self) -> None:
        self._real.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._real.get_write_buffer_size()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._real.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._real.get_protocol()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
