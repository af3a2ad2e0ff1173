"""What would become of a trace: models that share a front and a device, as discrete events.

Pure and without chance but for a seed: the same arguments give the same answer. It is made of the
policies that the endpoint follows (`runtime/scaling/policies.py`), of the room that it has them
share (`runtime/endpoint/room.py`), of what decides who may be held and who comes before anybody
asks (`runtime/scaling/foresight.py`, with the allotment and the budget), of each model's life
(`simulated_model.py`) and of stages as long as they were measured (`stages.py`).

It leaves out what models take from each other by computing at the same time on one device, the
making of images, and deaths.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from coldframe.benchmarks.traffic.loading import Loading
from coldframe.benchmarks.traffic.played import Asked, Played
from coldframe.benchmarks.traffic.service import Ask
from coldframe.benchmarks.traffic.simulated_model import SimulatedModel, Takes
from coldframe.benchmarks.traffic.stages import StartTier, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import RequestError
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.scaling.budget import Budget
from coldframe.runtime.scaling.foresight import Foresight
from coldframe.runtime.scaling.policies import LivePolicy

__all__ = ["Setup", "Sharing", "Takes", "simulate"]

_NOTHING = Takes(0, 0)


@dataclass(frozen=True, slots=True)
class Sharing:
    """A device that models share, and the host's memory behind it.

    Args:
        memory: Its bytes.
        takes: What models take of it, in their order; further ones take as much as the last.
        host: Bytes of the host's memory for weights that are parked there; None for no limit.
    """

    memory: int
    takes: Sequence[Takes]
    host: int | None = None

    def of(self, number: int) -> Takes:
        """What a model takes, by its number."""
        return self.takes[min(number, len(self.takes) - 1)]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    Args:
        names: The models, in the order in which they are served.
        times: How long their stages take.
        policy: Makes one for each of them.
        tier: How they start from zero.
        begin: `first` as a server begins, whose first model starts with it; `zero` where all have
            been sent there and wait to be asked; `warm` where all are there.
        pool: So many are kept parked (`serve --pool`).
        running: Requests that a model's workers get at once (`serve --max-running`).
        sharing: The device, where it does not hold them all.
        budget: For how many seconds in an hour devices may be held for nobody, of all models
            together (`serve --budget`); None for no limit.
        budget_left: How much there is of it at first; None for all.
        seed: Of the order in which measured runs are drawn.
    """

    names: Sequence[str]
    times: Times
    policy: Callable[[], LivePolicy]
    tier: StartTier = "fresh"
    begin: Literal["first", "zero", "warm"] = "first"
    pool: int = 0
    running: int = 32
    sharing: Sharing | None = None
    budget: float | None = None
    budget_left: float | None = None
    seed: int = 0


def simulate(
    arrivals: Sequence[Arrival],
    asks: Sequence[int],
    setup: Setup,
    seconds: float | None = None,
) -> Played:
    """What becomes of a trace.

    Args:
        arrivals: In their order.
        asks: Which model each of them asks, by its number in `setup.names`.
        setup: The models, and what decides over them.
        seconds: How long they are looked at: until all is answered at least, which is the default.

    Raises:
        RequestError: Nobody asks, there are no models, or one that is asked is not there.
        DeviceError: A model does not fit the device.
    """
    if not arrivals or not setup.names or len(asks) != len(arrivals):
        raise RequestError("there is nothing to simulate", got=f"{len(arrivals)} arrivals")
    if not all(0 <= number < len(setup.names) for number in asks):
        raise RequestError("a model is asked that is not there", expected=len(setup.names))
    return _Simulation(setup).run(arrivals, asks, seconds)


class _Simulation:
    """The events, and what models have in common."""

    def __init__(self, setup: Setup) -> None:
        self.now = 0.0
        sharing = setup.sharing
        self.room = None if sharing is None else Room(sharing.memory)
        takes = [_NOTHING if sharing is None else sharing.of(n) for n in range(len(setup.names))]
        if self.room is not None:
            for name, needs in zip(setup.names, takes, strict=True):
                self.room.fit(needs.warm, name)
        self.load = Loading(self).add
        self._setup = setup
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._models = [
            SimulatedModel(
                name,
                self,
                setup.times,
                setup.tier,
                setup.policy(),
                takes[number],
                may_park=sharing is not None and takes[number].parked == 0,
                running=setup.running,
                seed=setup.seed + number,
            )
            for number, name in enumerate(setup.names)
        ]
        budget = None
        if setup.budget is not None:
            budget = Budget(setup.budget, lambda: self.now, setup.budget_left)
        host = None if sharing is None or sharing.host is None else self._host_left
        self._foresight = Foresight(self.room, budget, host, lambda: self.now)
        self._looks_at = math.inf
        self._rising: set[SimulatedModel] = set()
        """Of whom it is looked whether they may; of many models most are none of these."""

    def _host_left(self) -> int:
        """Bytes of the host's memory that no parked model has."""
        assert self._setup.sharing is not None
        held = sum(model.bytes_parked for model in self._models)
        return (self._setup.sharing.host or 0) - held

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment_s, next(self._numbers), call))

    def run(
        self, arrivals: Sequence[Arrival], asks: Sequence[int], seconds: float | None
    ) -> Played:
        found: list[Ask] = []

        def arrive(number: int, arrival: Arrival) -> Callable[[], None]:
            model = self._models[asks[number]]
            return lambda: found.append(model.ask(number, arrival))

        self._begin()
        for number, arrival in enumerate(arrivals):
            self.at(arrival.at_s, arrive(number, arrival))
        answered_s = 0.0
        while self._events:
            moment_s, _, call = heapq.heappop(self._events)
            busy = len(found) < len(arrivals) or not all(model.idle for model in self._models)
            if not busy and (seconds is None or moment_s > seconds):
                break
            self.now = moment_s
            call()
            self._step()
            if busy:
                answered_s = moment_s
        end_s, names = max(answered_s, seconds or 0.0), self._setup.names
        return Played(
            [
                Asked(ask.arrival.at_s, names[asks[ask.number]], ttft_s, ask.met)
                for ask in found
                if (ttft_s := ask.ttft_s) is not None
            ],
            {model.name: model.stays(end_s) for model in self._models},
            end_s,
        )

    def _begin(self) -> None:
        for number, model in enumerate(self._models):
            if self._setup.begin == "zero":
                model.order_to_zero()
            elif self._setup.begin == "warm":
                model.be_warm()
            elif number == 0:
                model.start()
            model.look()
        self._step()

    def _step(self) -> None:
        """What the front does after everything that has happened."""
        if self.room is not None:
            self._share(self.room)
        if self._rising or self._setup.budget is not None or self._foresight.wait_s < math.inf:
            self._foresight.step((model.name, model) for model in self._models)
            self._rising = {model for model in self._rising if model.rising is not None}
        if self._setup.pool:
            self._keep_pool()
        looks_at = self.now + self._foresight.wait_s
        if looks_at < math.inf and not self.now < self._looks_at <= looks_at:
            self._looks_at = looks_at
            self.at(looks_at, lambda: None)

    def rises(self, model: SimulatedModel) -> None:
        self._rising.add(model)

    @property
    def starts_one(self) -> bool:
        return any(model.state == "starting" for model in self._models)

    def _share(self, room: Room) -> None:
        """Those that wait for room ask for it again; what comes free is the next one's at once."""
        waiting = [model for model in self._models if model.waiting]
        while waiting:
            room.changed = False
            for model in waiting:
                if model.waiting:
                    model.take_room()
            if not room.changed:
                break
            waiting = [model for model in waiting if model.waiting]
        if waiting:
            may_go = [m.may_go_s for m in self._models if m.state == "warm" and not m.idle]
            later = min((moment for moment in may_go if moment > self.now), default=math.inf)
            if later < math.inf:
                self.at(later, lambda: None)

    def _keep_pool(self) -> None:
        """Has as many models parked as there are to be: see `Fleet`."""
        models = self._models
        if self.starts_one:
            return
        parked = sorted((m for m in models if m.state == "parked"), key=lambda m: m.used_at)
        for model in parked[: max(0, len(parked) - self._setup.pool)]:
            model.make_room()
        loaded = sum(model.state != "zero" for model in models)
        if loaded < self._setup.pool and all(model.idle for model in models):
            ready = (model for model in models if model.may_start_ahead)
            ahead = next(filter(self._foresight.may_begin, ready), None)
            if ahead is not None:
                ahead.start_ahead()
