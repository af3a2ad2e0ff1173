"""A request that did not work out, and may the next time."""

from __future__ import annotations

__all__ = ["Broken", "reason_of"]


class Broken(Exception):
    """The request got no answer, or not all of it; another attempt may fare better.

    Args:
        why: What happened, for the error when patience ends.
        status: The HTTP status, where there was one.
        after_s: Not before so many seconds.
        slow_down: The other side has too much to do.
        at_once: Needs no pause, and is no failure of the path.
        hopeless: Unless this has worked before: a name that nobody knows.
        ended: The other side has ended the connection, or it was ended here.
    """

    def __init__(
        self,
        why: str,
        *,
        status: int | None = None,
        after_s: float | None = None,
        slow_down: bool = False,
        at_once: bool = False,
        hopeless: bool = False,
        ended: bool = False,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.status = status
        self.after_s = after_s
        self.slow_down = slow_down
        self.at_once = at_once
        self.hopeless = hopeless
        self.ended = ended


def reason_of(error: OSError) -> str:
    """What a failed system call says, for people."""
    # OpenSSL's errors quote nothing of what was sent.
    return error.strerror or type(error).__name__
