"""A model among those that would be held: what it would be, what that takes, and what comes of it.

The allotment knows models by this alone. The endpoint's `Supervisor` is one, and so is the
simulation's model (`benchmarks/traffic`): who may be held, who is to come before anybody asks and
who has to go is decided by the same rules for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from coldframe.runtime.endpoint.lifelog import State
from coldframe.runtime.scaling.allotment import Need, Wish
from coldframe.runtime.scaling.policies import LEVELS, Level
from coldframe.runtime.scaling.unasked import Unasked

__all__ = ["HELD_S", "Candidate"]

HELD_S = 1.0
"""For so long there must be enough of the budget for a model to stay, in seconds of each device."""


class Candidate(ABC):
    """One model; whoever is one has these."""

    unasked: Unasked
    """Its policy's schedule, and what others leave it."""
    ends: bool
    """Whether all is to end, once those that ask have their answers."""
    _ordered: bool
    """Whether somebody has sent it to rest: it stays there until somebody asks."""
    _rest: Level | None
    """What is wanted once those that are with the workers have their answers."""
    _ahead: bool
    """Whether it goes up before anybody asks, and is not there yet."""
    _start_s: float
    """How long its last start took."""

    # -- what it has ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def state(self) -> State:
        """Which it is in."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether no request is open."""

    @property
    @abstractmethod
    def fits(self) -> bool:
        """Whether it could start now without anybody being sent away."""

    @property
    @abstractmethod
    def devices(self) -> int:
        """How many devices it holds while it is held."""

    @abstractmethod
    def needs(self, held_s: float) -> Mapping[Level, Need]:
        """What it takes at each level, as far as that is known.

        Args:
            held_s: Seconds for which devices would be held while it is warm.
        """

    @property
    def may_start_ahead(self) -> bool:
        """Whether it could be there before somebody asks, and nobody has ordered it to zero."""
        return self.state == "zero" and not self._ordered and not self.ends and self.fits

    @property
    def rising(self) -> Level | None:
        """The level at which it is to be before somebody asks, where it is lower."""
        if not self.idle or self._ordered or self.ends:
            return None
        level, here = self.unasked.rising, {"zero": 0, "parked": 1}.get(self.state)
        if level is None or here is None or LEVELS.index(level) <= here:
            return None
        # What was put off until it would go again as soon as it is there is not begun.
        late = here == 0 and self.unasked.change_s <= self._start_s
        return None if late else level

    def wish(self, name: str) -> Wish:
        """What it would be while nobody asks, or is while somebody does.

        Its benefit follows from how soon its policy has somebody ask, and from what it takes until
        it is there: by the same measure for who is held and for who is to come.

        Args:
            name: What it is called.
        """
        rising, here = self.rising, self.state
        held: dict[State, Level] = {"warm": "warm", "starting": "warm", "parked": "parked"}
        level = rising or self._rest or held.get(here, "zero")
        going = here in ("starting", "draining") or self._ordered
        asked = not self.idle or (going and not self._ahead)
        free = asked or level == "zero"  # whoever takes nothing, or is not asked for it, has it
        start_s, held_s = max(self._start_s, HELD_S), HELD_S * self.devices
        needs = dict(self.needs(held_s))
        if self._comes_for_nobody:  # whatever it is to be: it holds its devices until then
            needs["parked"] = replace(needs["parked"], held_s=held_s)
        return Wish(
            name,
            level,
            needs,
            0.0 if free else self.unasked.worth(start_s, there=here != "zero"),
            asked=asked,
            levels=LEVELS if self.unasked.policy.parks else ("zero", "warm"),
            begin_s=self.begin_s if rising is not None and here == "zero" else 0.0,
        )

    @property
    def begin_s(self) -> float:
        """What of the budget is gone before it is up, in seconds."""
        return max(self._start_s, HELD_S) * self.devices

    @property
    def bytes_parked(self) -> int:
        """Bytes of host memory that its weights have while it is parked."""
        return int(self.needs(0.0)["parked"].host) if self.state == "parked" else 0

    @property
    def devices_unasked(self) -> int:
        """How many devices are held for nobody."""
        held = (self.state == "warm" and self.idle) or self._comes_for_nobody
        return self.devices if held else 0

    @property
    def _comes_for_nobody(self) -> bool:
        """Whether it is on its way before anybody has asked."""
        return self.state == "starting" and self._ahead and self.idle

    # -- what comes of it -------------------------------------------------------------------------

    @abstractmethod
    def follow(self) -> None:
        """Goes where it may still be, which others have less of now."""

    @abstractmethod
    def start_ahead(self, level: Level = "parked") -> None:
        """Has it started and parked, or warm, unless somebody asks it before it is."""

    @abstractmethod
    def _wake_ahead(self) -> None:
        """Has it warm, from parked, before anybody asks."""

    @abstractmethod
    def _stand_down(self) -> None:
        """Ends a start that nobody has asked for."""

    def rise(self, level: Level) -> None:
        """Goes up to a level before somebody asks, where there is room that nobody else wants."""
        level = min(level, self.unasked.most, key=LEVELS.index)
        if level != "zero" and self.may_start_ahead:
            self.start_ahead(level)
        elif self.state == "parked" and level == "warm" and not self._ordered and self.fits:
            self._wake_ahead()

    def _give_up_the_start(self) -> None:
        """Does not come where it would have to go at once: nobody waits for it."""
        if not self._comes_for_nobody or self.unasked.most == "warm":
            return
        if self.unasked.most == "zero":
            self._stand_down()
        else:
            self._rest = self.unasked.most
