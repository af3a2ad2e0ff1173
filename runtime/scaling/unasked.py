"""A policy's schedule, followed in time: what is to become of a model that nobody asks.

There are two clocks. A policy learns when requests come by one that goes on whatever becomes of
this process, the machine's suspension included: half an hour between two requests is half an hour.
Its schedule is followed by one that stands still while this process does: who is stopped between
two requests has not held anything meanwhile, and does not go to rest by that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from coldframe.runtime.scaling.policies import LEVELS, Level, LivePolicy, Schedule
from coldframe.runtime.scaling.worth import saved_per_second

__all__ = ["Unasked", "since_boot"]


def since_boot() -> float:
    """Seconds since the machine booted, those included in which it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Unasked:
    """One model's time without requests.

    Args:
        policy: What it follows.
        clock: Seconds, monotonic, by which its schedule goes; it is looked at often.
        arrivals: Seconds, monotonic, by which requests come; the same where there is none.
    """

    def __init__(
        self,
        policy: LivePolicy,
        clock: Callable[[], float],
        arrivals: Callable[[], float] | None = None,
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.arrivals = arrivals or clock
        self.most: Level = "warm"
        """The level that others leave it; see `coldframe.runtime.scaling.allotment`."""
        self.foregone = False
        """Whether it had to go, or died, and is not to come back until somebody asks."""
        self._schedule: Schedule | None = None
        self._since = clock()
        self._left_at = self.arrivals()
        """When the last answer ended, as the policy has it."""

    def asked(self) -> None:
        """Somebody asks."""
        self.policy.arrived(self.arrivals())
        self._schedule, self.foregone, self.most = None, False, "warm"

    def restart(self) -> None:
        """It is somewhere else by somebody's order: `begin` counts anew."""
        self._schedule, self.foregone, self.most = None, False, "warm"

    def begin(self) -> None:
        """Nobody asks from now on, or still."""
        if self._schedule is None:
            self._since, self._left_at = self.clock(), self.arrivals()
            self._schedule = self.policy.idle(self._left_at)

    def hold(self) -> None:
        """It is not to rest yet. What only goes down from here on waits for that."""
        if self._schedule is not None and not self.will_rise:
            self._since = self.clock()

    def parked(self) -> None:
        """It is parked from now on, be it sooner or later than its schedule has it.

        A schedule that only goes down says how long it is to be parked, one that goes up again when
        that is to be.
        """
        idle_s, schedule = self.idle_s, self._schedule
        if schedule is None or self.will_rise:
            return
        steps = [at_s for at_s, level in schedule.steps if level == "parked"]
        later = [at_s for at_s in steps if at_s > idle_s]
        if schedule.level(idle_s) == "parked":
            self._since += idle_s - max(at_s for at_s in steps if at_s <= idle_s)
        elif later:
            self._since += idle_s - later[0]

    @property
    def idle_s(self) -> float:
        """For how long nobody has asked, in seconds; 0 while somebody does."""
        moment = self.clock()
        return 0.0 if self._schedule is None else moment - self._since

    @property
    def due(self) -> Level:
        """The level that it is to go down to where it is higher."""
        idle_s = self.idle_s
        if self._schedule is None:
            return "warm"
        return min(self._schedule.level(idle_s), self.most, key=LEVELS.index)

    @property
    def rising(self) -> Level | None:
        """The level that it is to go up to where it is lower, by its schedule alone."""
        idle_s = self.idle_s
        if self._schedule is None or self.foregone or not self._schedule.rises(idle_s):
            return None
        return self._schedule.level(idle_s)

    @property
    def will_rise(self) -> bool:
        """Whether it is to go up, now or later, before anybody asks."""
        if self._schedule is None or self.foregone:
            return False
        return self.rising is not None or self._schedule.will_rise(self.idle_s)

    @property
    def change_s(self) -> float:
        """In how many seconds it is to be at another level; infinite where that is not to be."""
        idle_s = self.idle_s
        next_s = None if self._schedule is None else self._schedule.next_s(idle_s)
        return math.inf if next_s is None else next_s - idle_s

    def chance(self, within_s: float) -> float:
        """How likely somebody asks within so many seconds."""
        idle_s = 0.0 if self._schedule is None else self.arrivals() - self._left_at
        return self.policy.chance(idle_s, within_s)

    def worth(self, start_s: float, *, there: bool) -> float:
        """What it saves its clients, in seconds of waiting, for each second for which it is held.

        Args:
            start_s: How long its start takes, in seconds.
            there: Whether it is there already.
        """
        return saved_per_second(self.chance, start_s, there=there)

    def document(self) -> dict[str, Any]:
        """The policy, where it is in its schedule and why, as JSON values."""
        idle_s, schedule = self.idle_s, self._schedule
        next_s = None if schedule is None else schedule.next_s(idle_s)
        change = None
        if schedule is not None and next_s is not None:
            change = {"in_s": round(next_s - idle_s, 3), "level": schedule.level(next_s)}
        return {
            "name": self.policy.name,
            "why": self.policy.why,
            "idle_s": None if schedule is None else round(idle_s, 3),
            "schedule": None if schedule is None else schedule.to_json(),
            "next": change,
            "most": self.most,
        }
