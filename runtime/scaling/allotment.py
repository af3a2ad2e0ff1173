"""Who may be warm or parked where not all can be who would: a rule and nothing else.

Several models want some of a device's memory, of the host's where their weights are parked there,
and of a budget of seconds in which the device may be held while nobody asks. Those that are being
asked have what they have. Of the others come first those that are expected to save their clients
most, for what they take of what is scarcest: the greedy rule for knapsacks (Dantzig 1957). Who does
not fit at the level that it wants gets the next one below at which it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coldframe.runtime.scaling.policies import LEVELS, Level

__all__ = ["Need", "Supply", "Wish", "allot"]


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes at a level.

    Args:
        device: Bytes of the device.
        host: Bytes of host memory, where its weights are there.
        held_s: Of the budget, in seconds.
    """

    device: float = 0
    host: float = 0
    held_s: float = 0.0

    def within(self, supply: Supply) -> bool:
        """Whether there is so much of all."""
        pairs = ((self.device, supply.device), (self.host, supply.host))
        return all(have is None or need <= have for need, have in pairs) and (
            supply.held_s is None or self.held_s <= supply.held_s
        )


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is; None where that is without a limit."""

    device: float | None = None
    host: float | None = None
    held_s: float | None = None

    def less(self, need: Need) -> Supply:
        """What is left behind it; never less than nothing."""
        return Supply(
            None if self.device is None else max(0, self.device - need.device),
            None if self.host is None else max(0, self.host - need.host),
            None if self.held_s is None else max(0.0, self.held_s - need.held_s),
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What one model would be.

    Args:
        name: Whose it is.
        level: At which level it would be.
        needs: What it takes there, and at those below; a level that is not named takes nothing.
        benefit: What it is expected to save its clients there, in seconds of waiting for each
            second for which it is held (`worth`): of all models over the same time.
        asked: Whether it is being asked.
        levels: The levels at which it may be at all.
        begin_s: What of the budget is gone before it is up, in seconds: what has less is not begun.
    """

    name: str
    level: Level
    needs: Mapping[Level, Need] = field(default_factory=dict)
    benefit: float = 0.0
    asked: bool = False
    levels: tuple[Level, ...] = LEVELS
    begin_s: float = 0.0

    def need(self, level: Level) -> Need:
        """What it takes there."""
        return self.needs.get(level, Need())

    def fits(self, level: Level, left: Supply) -> bool:
        """Whether so much is enough for it to be there."""
        if level != "zero" and left.held_s is not None and left.held_s < self.begin_s:
            return False
        return self.need(level).within(left)


def allot(wishes: Iterable[Wish], supply: Supply) -> dict[str, Level]:
    """The level that each may have: the one that it wants, or one below.

    Who is being asked is never put down, even where they take more than there is: it is not for
    this to send clients away. The others fit into what is left, and each is at the highest level
    that does. A greater benefit never leads to a lower level for a model.

    Args:
        wishes: One for each model.
        supply: What there is for all.
    """
    found: dict[str, Level] = {}
    wishes = list(wishes)
    left = supply
    for wish in wishes:
        if wish.asked:
            found[wish.name] = wish.level
            # The budget is for who is not asked.
            need = wish.need(wish.level)
            left = left.less(Need(need.device, need.host))
    rest = [wish for wish in wishes if not wish.asked]
    for wish in sorted(rest, key=lambda wish: (-_worth(wish, supply), wish.name)):
        below = [level for level in LEVELS[: LEVELS.index(wish.level) + 1] if level in wish.levels]
        level: Level = next((level for level in reversed(below) if wish.fits(level, left)), "zero")
        found[wish.name] = level
        left = left.less(wish.need(level))
    return found


def _worth(wish: Wish, supply: Supply) -> float:
    """The benefit for the greatest part that it takes of anything."""
    need = wish.need(wish.level)
    parts = [
        amount / total if total > 0 else math.inf
        for amount, total in (
            (need.device, supply.device),
            (need.host, supply.host),
            (need.held_s, supply.held_s),
        )
        if total is not None and amount > 0
    ]
    most = max(parts, default=0.0)
    return math.inf if most == 0 else wish.benefit / most
