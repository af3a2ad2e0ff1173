"""The life of one simulated model: the states of a `Supervisor`, and what leads to which.

It does what a `Supervisor` does when somebody asks, when nobody does, and when another model wants
its room, and takes for it as long as was measured. It follows its policy by what the endpoint
itself does so with (`runtime/scaling/unasked.py`), on the simulation's clock, and is one of those
among whom memory and the budget are allotted, as a `Supervisor` is (`candidate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from coldframe.benchmarks.traffic.played import From, Stay
from coldframe.benchmarks.traffic.service import Ask, Clock, Service
from coldframe.benchmarks.traffic.stages import Draw, StartTier, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.scaling.allotment import Need
from coldframe.runtime.scaling.candidate import Candidate
from coldframe.runtime.scaling.policies import Level, LivePolicy
from coldframe.runtime.scaling.unasked import Unasked

__all__ = ["SimulatedModel", "Takes", "World"]

State = Literal["zero", "starting", "warm", "draining", "parked"]


@dataclass(frozen=True, slots=True)
class Takes:
    """What a model takes of a device that it shares, in bytes.

    Args:
        warm: Weights and KV.
        parked: What stays there while it is parked: the weights, or 0 where these leave it.
        host: What it takes of the host's memory then, where they do.
    """

    warm: int
    parked: int
    host: int = 0


class World(Clock, Protocol):
    """What all models have in common."""

    room: Room | None

    def load(self, seconds: float, beside: float, call: Callable[[], None]) -> Callable[[], None]:
        """Has something called when a start is done that takes so long alone.

        Args:
            seconds: Alone.
            beside: See `Times.beside`.
            call: What is called.

        Returns:
            What ends the start before it is done.
        """
        ...

    def rises(self, model: SimulatedModel) -> None:
        """A model is to go up: it is seen to until it is there, or is not to be any more."""
        ...


class SimulatedModel(Candidate):
    """One model.

    Args:
        name: Its name.
        world: The clock and the room.
        times: How long its stages take.
        tier: How it starts from zero.
        policy: When it rests.
        takes: Of the room, where there is one.
        may_park: Whether it may be parked for another one's sake, where that gives all its room.
        running: How many requests are with its workers at once.
        seed: Of the order of the measured runs.
    """

    def __init__(
        self,
        name: str,
        world: World,
        times: Times,
        tier: StartTier,
        policy: LivePolicy,
        takes: Takes,
        *,
        may_park: bool,
        running: int,
        seed: int,
    ) -> None:
        self.name = name
        self.waiting = False
        """Whether it waits for room."""
        self.ends = False
        self._state: State = "zero"
        self._ordered = False
        self._world = world
        self._policy = policy
        self._takes = takes
        self._may_park = may_park
        self._starts = Draw(times.start(tier), seed)
        self._beside = times.beside
        self._wakes = Draw(times.parked, seed)
        self._behind = Draw(times.behind, seed)
        self._ends = Draw(times.end, seed)
        self._probe_s = times.prefill(1)
        self._service = Service(world, times, running, self._first_token, self._answered)
        self.unasked = Unasked(policy, lambda: world.now)
        self._rest: Level | None = None
        self._gives_way = False
        self._ahead = False
        """Whether it goes up before anybody asks, and is not there yet."""
        self._ending = False
        self._cancel: Callable[[], None] = lambda: None
        """Ends what is under way."""
        self._used_s = 0.0
        self._roused_s = 0.0
        self._room_s = 0.0
        """When there was room for its last start."""
        self._warm_since = 0.0
        self._start_s = 0.0
        self._plan = 0
        """Which look at its schedule is the next: earlier ones are in vain."""
        self._stays: list[Stay] = []
        self._since = 0.0

    # -- requests --------------------------------------------------------------------------------

    def ask(self, number: int, arrival: Arrival) -> Ask:
        """Takes a request."""
        self.unasked.asked()
        ask = Ask(number, arrival, self._met)
        self._service.add(ask)
        self._ordered = self._ahead = False
        if self.state == "starting":
            self._rest = None  # it was started ahead, to rest until somebody asks
        self._rouse()
        self._feed()
        return ask

    @property
    def _met(self) -> From:
        if self.state == "warm":
            return "warm"
        ends = self._ending or (self.state == "draining" and self._rest == "zero")
        if ends or self.state in ("zero", "starting"):
            return "zero"
        return "parked"

    def _feed(self) -> None:
        if self.state == "warm" or (self.state == "starting" and self._service.up):
            self._service.feed()

    def _first_token(self, _: Ask) -> None:
        if self.state == "starting":
            self._service.decode_from_s = self._world.now + self._behind()
            self._become_warm()

    def _answered(self) -> None:
        self._feed()
        if not self._service.open:
            self._used_s = self._world.now
            self.look()
        if self.state == "draining" and not self._service.inside:
            self._go()

    # -- from zero -------------------------------------------------------------------------------

    def start(self) -> None:
        """Has it started although nobody asks it."""
        self._rouse()

    def start_ahead(self, level: Level = "parked") -> None:
        """Has it started and parked, or warm, unless somebody asks it before it is."""
        self._ahead = True
        self._rouse()
        self._rest = None if level == "warm" else level
        self.unasked.most = "warm"  # what it had to leave to others before is over

    def be_warm(self) -> None:
        """Is warm from the beginning, where there is room for it."""
        if not self.fits:
            return
        if self._world.room is not None:
            self._world.room.take(self, self._takes.warm)
        self._enter("warm")
        self._service.up = True
        self.look()

    @property
    def state(self) -> State:
        """Which it is in."""
        return self._state

    @property
    def rising(self) -> Level | None:
        """The level at which it is to be before somebody asks, where it is lower."""
        return None if self._ending else super().rising

    def follow(self) -> None:
        """Goes where it may still be, which others have less of now."""
        self.look()

    def order_to_zero(self) -> None:
        """Was sent there: nobody but who asks starts it."""
        self._ordered = True

    def _wake_ahead(self) -> None:
        self._ahead = True
        self._rouse()

    def _stand_down(self) -> None:
        self.unasked.foregone = True
        self._end()

    def _rouse(self) -> None:
        if self.state == "zero":
            self._roused_s = self._world.now
            self._enter("starting")
            self.take_room()
        elif self.state == "parked" and not self._ending:
            self.take_room()

    def take_room(self) -> None:
        """Goes on where there is room for it; others are sent away for it."""
        room = self._world.room
        self.waiting = room is not None and not room.take(self, self._takes.warm)
        if self.waiting:
            return
        now = self._world.now
        if self.state == "starting":
            self._room_s = now
            self._cancel = self._world.load(self._starts(), self._beside, self._loaded)
            return
        wake_s, self._warm_since, self._gives_way = self._wakes(), now, False
        if not self._ahead and self.idle:
            self.unasked.restart()
        self._ahead = False
        self._enter("warm")
        self._feed()
        self._after(wake_s, lambda: self._woken(wake_s))

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        """Has something called then, unless it rests before."""
        left = True

        def cancel() -> None:
            nonlocal left
            left = False

        self._cancel = cancel
        self._world.at(self._world.now + seconds, lambda: call() if left else None)

    def _woken(self, seconds: float) -> None:
        self._policy.started("parked", seconds)
        self._loaded()

    def _loaded(self) -> None:
        self._service.begin()
        self._feed()
        if self.state == "starting" and self.idle:
            # For nobody; who asks meanwhile is behind that.
            self._service.up = False
            self._after(self._probe_s, self._probed)
        elif self.idle:
            self.look()

    def _probed(self) -> None:
        self._service.begin()
        self._become_warm()
        self._feed()

    def _become_warm(self) -> None:
        now = self._world.now
        self._warm_since, self._start_s, self._gives_way = now, now - self._roused_s, False
        self._policy.started("zero", now - self._room_s)
        if not self._ahead and self.idle:
            self.unasked.restart()
        self._ahead = False
        self._enter("warm" if self._rest is None else "draining")
        if self.state == "draining" and not self._service.inside:
            self._go()
        elif self.idle:
            self.look()

    # -- back to it ------------------------------------------------------------------------------

    def look(self) -> None:
        """Goes where its policy has it by now, and where others leave it."""
        self._give_up_the_start()
        if self._service.open or self._ending:
            return
        if self.state != "starting":
            self.unasked.begin()
        due = self.unasked.due
        if self.state == "warm" and due != "warm" and self._service.up:
            self._rest = due
            self._enter("draining")
            self._go()
        elif self.state == "parked" and not self._ordered and due == "zero":
            self._end()
        else:
            if self.rising is not None:
                self._world.rises(self)
            self._expect()

    def _expect(self) -> None:
        """Looks again when its schedule has it somewhere else."""
        self._plan += 1
        now, change_s, plan = self._world.now, self.unasked.change_s, self._plan
        if change_s < math.inf:
            # Later than now in any case: sums of seconds are rounded.
            self._world.at(
                max(now + change_s, math.nextafter(now, math.inf)), lambda: self._due(plan)
            )

    def _due(self, plan: int) -> None:
        if plan == self._plan:
            self.look()

    def _go(self) -> None:
        if self._rest == "parked":
            self._park()
        else:
            self._end()

    def _park(self) -> None:
        self._cancel()
        self._service.up, self._rest = False, None
        self._enter("parked")
        self.unasked.parked()
        if self._world.room is not None:
            self._world.room.shrink(self, self._takes.parked)
        self._again()

    def _end(self) -> None:
        if not self._ending:
            self._cancel()
            self._service.up, self._ending, self.waiting = False, True, False
            self._ahead, self._rest = False, "zero"
            if self._world.room is not None:
                self._world.room.withdraw(self)
            self._world.at(self._world.now + self._ends(), self._ended)

    def _ended(self) -> None:
        self._ending, self._rest, self._gives_way = False, None, False
        self._enter("zero")
        if self._world.room is not None:
            self._world.room.leave(self)
        self._again()

    def _again(self) -> None:
        """Whoever has asked meanwhile was held; and it may be late to be somewhere else."""
        self._rouse() if self._service.open else self.look()

    # -- a tenant of the room --------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._service.open

    @property
    def used_at(self) -> float:
        """When somebody asked it last; who is being asked was used just now."""
        return self._world.now if self._service.open else self._used_s

    @property
    def leaving(self) -> bool:
        """Whether its memory will be free soon."""
        gone = self._rest == "zero" or self._gives_way
        return self._ending or (self.state == "draining" and gone)

    @property
    def _comes_for_nobody(self) -> bool:
        """Whether it is on its way before anybody has asked."""
        return self.state == "starting" and self._ahead and self.idle and not self._ending

    @property
    def can_go(self) -> bool:
        """Whether it may be sent away now: see `Supervisor.can_go`."""
        if self.state == "starting":
            return self._comes_for_nobody
        if self.state != "warm":
            return self.state == "parked"
        return self.idle or self._world.now >= self.may_go_s

    @property
    def may_go_s(self) -> float:
        """From when on it may be sent away although it is being asked."""
        return self._warm_since + self._start_s

    @property
    def fits(self) -> bool:
        """Whether it could start now without anybody being sent away."""
        room = self._world.room
        if room is None:
            return True
        if room.awaited(self):
            return False
        return self._takes.warm - room.held(self) <= room.free

    @property
    def devices(self) -> int:
        """How many devices it holds while it is held."""
        return 1

    def needs(self, held_s: float) -> Mapping[Level, Need]:
        """What it takes at each level; see `Candidate`."""
        takes = self._takes
        warm, parked = Need(takes.warm, 0, held_s), Need(takes.parked, takes.host)
        return {"warm": warm, "parked": parked}

    def make_room(self) -> None:
        """Goes, once those that are with the workers have their answers."""
        if self.leaving:
            return
        self._ordered, self.unasked.foregone = False, True
        if self._comes_for_nobody:
            self._end()
        elif self.state == "warm":
            self._gives_way = self._may_park and self._policy.parks
            self._rest = "parked" if self._gives_way else "zero"
            self._enter("draining")
            if not self._service.inside:
                self._go()
        elif self.state == "parked":
            self._end()

    # -- what it was -----------------------------------------------------------------------------

    def _enter(self, state: State) -> None:
        now = self._world.now
        if now > self._since:
            self._stays.append(Stay(self.state, self._since, now))
            self._since = now
        elif self._stays and self._stays[-1].state == state:
            self._since = self._stays.pop().start_s  # it was something else for no time
        self._state = state

    def stays(self, seconds: float) -> list[Stay]:
        """What it was from 0 on until so many seconds, the last of these stays included."""
        found = [*self._stays, Stay(self.state, self._since, max(seconds, self._since))]
        return [
            Stay(stay.state, stay.start_s, min(stay.end_s, seconds))
            for stay in found
            if stay.start_s < seconds
        ]
