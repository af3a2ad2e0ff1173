"""What became of a model, as it is counted: how long it was in which state, and for whom."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from coldframe.runtime.gateway.logs import Log

__all__ = ["LifeLog", "State"]

State = Literal["zero", "starting", "warm", "draining", "parked", "failed"]
_STATES: tuple[State, ...] = ("zero", "starting", "warm", "draining", "parked", "failed")


class LifeLog:
    """One model's states, each change a line of the log.

    Args:
        log: Gets a line `state` for each, with `from`, `to` and `at_s`, CLOCK_MONOTONIC.
        state: Which it is in at first.
        since_s: Since when, CLOCK_MONOTONIC; None for now.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        log: Log,
        state: State = "zero",
        since_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: State = state
        self.cold_starts = 0
        """Starts from zero, or anew, that somebody has waited for."""
        self.wakes = 0
        """How often somebody has asked while it was parked."""
        self.prewarms: Counter[str] = Counter(begun=0, used=0, late=0, vain=0)
        """What was begun before anybody asked: how often, and how often somebody came when it was
        there (`used`), while it was on its way (`late`), or nobody did (`vain`)."""
        self.ahead = False
        """Whether it was begun before anybody asked, and nobody has since."""
        self._log = log
        self._clock = clock
        self._since = clock() if since_s is None else since_s
        self._seconds: dict[State, float] = dict.fromkeys(_STATES, 0.0)
        self._waited_for = False
        log.info("state", to=state, at_s=round(self._since, 6))

    def enter(self, state: State, *, asked: bool = False) -> None:
        """It is in that state from now on; it may be already.

        Args:
            state: Which.
            asked: Whether somebody has asked, and waits.
        """
        if state == self.state:
            return
        moment = self._clock()
        self._seconds[self.state] += moment - self._since
        fields = {"from": self.state, "to": state, "at_s": round(moment, 6)}
        self.state, self._since = state, moment
        if state == "starting":
            self._waited_for = False
            if asked:
                self._wait()
        self._log.info("state", **fields, ahead=self.ahead or None)

    def begin_ahead(self) -> None:
        """It is about to be there before anybody asks."""
        if not self.ahead:
            self.ahead = True
            self.prewarms["begun"] += 1

    def asked(self, before: State) -> None:
        """Somebody asks.

        Args:
            before: The state in which that was.
        """
        if self.ahead:
            self.prewarms["late" if before == "starting" else "used"] += 1
            self.ahead = False
        if before == "parked":
            self.wakes += 1
        if before in ("zero", "starting"):
            self._wait()

    def _wait(self) -> None:
        """Somebody waits for the start: with those who do already, it is still one."""
        if not self._waited_for:
            self.cold_starts += 1
            self._waited_for = True

    def gone(self) -> None:
        """What it had is gone: what was there for nobody was there in vain."""
        if self.ahead:
            self.prewarms["vain"] += 1
            self.ahead = False

    def document(self) -> dict[str, Any]:
        """Seconds by state, and the counts, as JSON values."""
        seconds = dict(self._seconds)
        seconds[self.state] += self._clock() - self._since
        return {
            "seconds": {state: round(value, 6) for state, value in seconds.items()},
            "cold_starts": self.cold_starts,
            "wakes": self.wakes,
            "prewarmed": self.prewarms["begun"],
            "prewarmed_used": self.prewarms["used"],
            "prewarmed_late": self.prewarms["late"],
            "prewarmed_in_vain": self.prewarms["vain"],
        }
