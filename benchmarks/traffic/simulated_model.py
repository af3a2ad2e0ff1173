"""The life of one simulated model: the states of `runtime/supervisor.py`, and what leads to which.

It does what a `Supervisor` does when somebody asks, when nobody does, and when another model wants
its room, and takes for it as long as was measured. It follows the same schedules as the endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from coldframe.benchmarks.traffic.played import From, Stay
from coldframe.benchmarks.traffic.service import Ask, Clock, Service
from coldframe.benchmarks.traffic.stages import Draw, StartTier, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.runtime.room import Room
from coldframe.runtime.scaling import Level, Policy, Schedule

__all__ = ["Needs", "SimulatedModel", "World"]

State = Literal["zero", "starting", "warm", "draining", "parked"]

_RANK = {"zero": 0, "parked": 1, "warm": 2}
_NO_TIME_S = 1e-9
"""Of two moments that are the same but for the rounding of their sums, at most."""


class Needs:
    """What a model needs of a device that it shares, in bytes.

    Args:
        warm: Weights and KV.
        parked: What stays while it is parked: the weights, or 0 where these leave the device.
    """

    def __init__(self, warm: int, parked: int) -> None:
        self.warm = warm
        self.parked = parked


class World(Clock, Protocol):
    """What all models have in common."""

    room: Room | None

    def load(self, seconds: float, beside: float, call: Callable[[], None]) -> None:
        """Has something called when a start is done that takes so long alone.

        Args:
            seconds: Alone.
            beside: See `Times.beside`.
            call: What is called.
        """
        ...

    @property
    def starts_one(self) -> bool:
        """Whether a model is on its way."""
        ...

    def overdue(self, model: SimulatedModel) -> None:
        """A model is to rest, or to be there, and the front is to notice it."""
        ...

    def rises_later(self, model: SimulatedModel) -> None:
        """A model is to be there and cannot yet: it looks again when something has happened."""
        ...


class SimulatedModel:
    """One model.

    Args:
        name: Its name.
        world: The clock and the room.
        times: How long its stages take.
        tier: How it starts from zero.
        policy: When it rests.
        needs: Of the room, where there is one.
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
        policy: Policy,
        needs: Needs,
        *,
        may_park: bool,
        running: int,
        seed: int,
    ) -> None:
        self.name = name
        self.state: State = "zero"
        self.waiting = False
        """Whether it waits for room."""
        self.ordered = False
        """Whether it was told to be at zero: nobody but who asks starts it then."""
        self.began_s = 0.0
        """When its replica was started: the front looks after it every second from then on."""
        self._world = world
        self._policy = policy
        self._needs = needs
        self._may_park = may_park
        self._starts = Draw(times.start(tier), seed)
        self._beside = times.beside
        self._wakes = Draw(times.parked, seed)
        self._behind = Draw(times.behind, seed)
        self._ends = Draw(times.end, seed)
        self._probe_s = times.prefill(1)
        self._service = Service(world, times, running, self._first_token, self._answered)
        self._rest: Literal["parked", "zero"] | None = None
        self._gives_way = False
        self._foregone = False
        """Whether it had to go, and is not to come back until somebody asks."""
        self._ending = False
        self._used_s = 0.0
        self._roused_s = 0.0
        self._warm_since = 0.0
        self._start_s = 0.0
        self._idle_since = 0.0
        self._schedule: Schedule | None = None
        self._level: Level = "warm"
        """Where the schedule had it when it was looked at last."""
        self._plan = 0
        self._stays: list[Stay] = []
        self._since = 0.0

    # -- requests --------------------------------------------------------------------------------

    def ask(self, number: int, arrival: Arrival) -> Ask:
        """Takes a request."""
        self._policy.arrived(self._world.now)
        ask = Ask(number, arrival, self._met)
        self._service.add(ask)
        self.ordered = self._foregone = False
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
            self._begin_idle()
        if self.state == "draining" and not self._service.inside:
            self._go()

    # -- from zero -------------------------------------------------------------------------------

    def start(self, rest: Literal["parked"] | None = None) -> None:
        """Has it started although nobody asks it.

        Args:
            rest: Where it is to go as soon as it is there.
        """
        self._rouse()
        self._rest = rest

    def be_warm(self) -> None:
        """Is warm from the beginning, where there is room for it."""
        if not self._fits:
            return
        if self._world.room is not None:
            self._world.room.take(self, self._needs.warm)
        self._enter("warm")
        self._service.up = True
        self._begin_idle()

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
        self.waiting = room is not None and not room.take(self, self._needs.warm)
        if self.waiting:
            return
        now = self._world.now
        if self.state == "starting":
            self.began_s = now
            self._world.load(self._starts(), self._beside, self._loaded)
        else:
            self._warm_since, self._gives_way = now, False
            self._enter("warm")
            self._feed()
            self._world.at(now + self._wakes(), self._loaded)

    def _loaded(self) -> None:
        self._service.begin()
        self._feed()
        if self.state == "starting" and self.idle:
            # For nobody; who asks meanwhile is behind that.
            self._service.up = False
            self._world.at(self._world.now + self._probe_s, self._probed)
        elif not self._service.open:
            self.look()

    def _probed(self) -> None:
        self._service.begin()
        self._become_warm()
        self._feed()

    def _become_warm(self) -> None:
        now = self._world.now
        self._warm_since, self._start_s, self._gives_way = now, now - self._roused_s, False
        # As the endpoint tells a policy that wants to know.
        started = getattr(self._policy, "started", None)
        if started is not None:
            started("zero", self._start_s)
        self._enter("warm" if self._rest is None else "draining")
        if self.state == "draining" and not self._service.inside:
            self._go()
        elif not self._service.open:
            self._begin_idle() if self._schedule is None else self.look()

    # -- back to it ------------------------------------------------------------------------------

    def _begin_idle(self) -> None:
        """Nobody asks from now on."""
        self._idle_since, self._level = self._world.now, "warm"
        self._schedule = self._policy.idle(self._world.now)
        self.look()

    def look(self) -> None:
        """Goes where its schedule has it by now.

        It is started ahead where the schedule has it rise, one at a time with others, and not where
        it is lower because others had to have its room.
        """
        now = self._world.now
        if self._service.open or self._ending or self._schedule is None:
            return
        idle_s = now - self._idle_since + _NO_TIME_S
        level = self._schedule.level(idle_s)
        rises = _RANK[level] > _RANK[self._level] and not self._foregone
        if level != "warm" and self.state == "warm" and self._service.up:
            self._rest = level
            self._enter("draining")
            self._go()
        elif level == "zero" and self.state == "parked":
            self._end()
        elif rises and level == "warm" and self.state == "parked" and self._fits:
            self._rouse()
        elif rises and self.state == "zero" and not self.ordered:
            if self._world.starts_one or not self._fits:
                self._world.rises_later(self)
                level = self._level
            else:
                self.start("parked" if level == "parked" else None)
        self._level = level
        self._plan += 1
        next_s, plan = self._schedule.next_s(idle_s), self._plan
        if next_s is not None:
            self._world.at(max(now, self._idle_since + next_s), lambda: self._due(plan))

    def _due(self, plan: int) -> None:
        if plan == self._plan and not self._service.open:
            self._world.overdue(self)

    def _go(self) -> None:
        if self._rest == "parked":
            self._park()
        else:
            self._end()

    def _park(self) -> None:
        self._service.up, self._rest = False, None
        self._enter("parked")
        if self._world.room is not None:
            self._world.room.shrink(self, self._needs.parked)
        self._again()

    def _end(self) -> None:
        if not self._ending:
            self._service.up, self._ending, self.waiting = False, True, False
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
    def can_go(self) -> bool:
        """Whether it may be sent away now: see `Supervisor.can_go`."""
        if self.state != "warm":
            return self.state == "parked"
        return self.idle or self._world.now >= self.may_go_s

    @property
    def may_go_s(self) -> float:
        """From when on it may be sent away although it is being asked."""
        return self._warm_since + self._start_s

    @property
    def may_start_ahead(self) -> bool:
        """Whether it could be there before somebody asks."""
        return self.state == "zero" and not self.ordered and self._fits

    @property
    def _fits(self) -> bool:
        room = self._world.room
        return room is None or self._needs.warm <= room.free

    def make_room(self) -> None:
        """Goes, once those that are with the workers have their answers."""
        if self.leaving:
            return
        self._foregone = True
        if self.state == "warm":
            self._gives_way = self._may_park
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
        self.state = state

    def stays(self, seconds: float) -> list[Stay]:
        """What it was from 0 on until so many seconds, the last of these stays included."""
        found = [*self._stays, Stay(self.state, self._since, max(seconds, self._since))]
        return [
            Stay(stay.state, stay.start_s, min(stay.end_s, seconds))
            for stay in found
            if stay.start_s < seconds
        ]
