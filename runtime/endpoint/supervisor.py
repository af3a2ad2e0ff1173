"""A model's life: from zero, when somebody asks, and back when nobody does.

    zero      nothing is held but the gateway and the front
    starting  processes and weights are on their way; requests are held
    warm      requests are answered
    draining  those that there are get their answers first; new ones are held
    parked    the weights stay in memory and the workers up; the device's memory for KV is free, and
              that of the weights and of the workers' contexts where they can be elsewhere
    failed    it cannot be loaded; where that may pass by itself it is at zero again after a while,
              if it is not the only one, which ends with this

A replica that dies is started again, behind the requests that have not had a token yet; what keeps
dying is started ever later. Where several models share a device, one that starts waits until there
is room for it, and may be sent to zero for another one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import (
    ColdframeError,
    DeviceLost,
    PlatformError,
    ReplicaError,
    SourceUnreachable,
)
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.endpoint.asks import SOON_S, Asks, FirstToken
from coldframe.runtime.endpoint.frontcount import FrontCount
from coldframe.runtime.endpoint.lifelog import LifeLog, State
from coldframe.runtime.endpoint.quarters import Quarters
from coldframe.runtime.endpoint.relapses import Relapses
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.startlog import StartLog
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frozen.creating import NextImage
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import Listener
from coldframe.runtime.replica.kvwatch import KvWatch
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.scaling.allotment import Need
from coldframe.runtime.scaling.candidate import Candidate
from coldframe.runtime.scaling.policies import Level, LivePolicy
from coldframe.runtime.scaling.unasked import Unasked, since_boot
from coldframe.runtime.transport.base import Given

__all__ = ["State", "Supervisor"]

_ROOM_S = 0.05
"""How soon to ask for room again: who has it may be left alone no longer."""
_LONG_S = 60.0
_CALM_S = 2.0
"""How long nobody must have asked before it gets ready to rest."""
_PASSING = (DeviceLost, PlatformError, ReplicaError, SourceUnreachable)
"""What may pass by itself: a network that is down, too few descriptors, processes or a GPU that
die."""
_AGAIN_S = 60.0
"""After so long a model that has failed of that may be asked again, in seconds."""


class Supervisor(Candidate):
    """One model, started, watched, put to rest and started again.

    Args:
        options: What its replica is to be.
        policy: When it rests, and is there again before anybody asks; of this model and no other.
        recorder: Gets the front's spans; of this model and no other.
        log: Gets what happens.
        loop: The front's.
        launch: The processes of the first start, where they are on their way already.
        began_ns: When that began, CLOCK_MONOTONIC; None to start when somebody asks.
        room: The device's memory, where others want some of it.
        alone: Whether there is nothing to serve where the first start is none.
        watch: Told which KV is there for requests to come.

    Raises:
        ColdframeError: The first start is none, and it is alone.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        policy: LivePolicy,
        recorder: Recorder,
        log: Log,
        loop: Loop,
        launch: Launch | None,
        began_ns: int | None,
        room: Room | None = None,
        *,
        alone: bool = True,
        watch: KvWatch | None = None,
    ) -> None:
        self.watch = watch
        self.loop = loop
        began_s = None if began_ns is None else began_ns / 1e9
        self.life = LifeLog(log, "zero" if began_s is None else "starting", began_s)
        self.error: ColdframeError | None = None
        """Why it cannot go on, where that is so."""
        self.starts = 0
        """How many there were."""
        self.used_at = time.monotonic()
        """When somebody asked last; who is being asked was used just now."""
        self._options = options
        # Who is stopped between two requests, as some platforms do it, does not fall asleep by
        # that: it goes on because somebody asks.
        self.unasked = Unasked(policy, AwakeClock(), since_boot)
        self._recorder = recorder
        self._log = log
        self._asks = Asks(self._has_died)
        self._quarters = Quarters(self, options, room)
        self._relapses = Relapses()
        self._was_warm = False
        self._warm_since = 0.0
        self._start_s = 0.0
        self._started_at = time.monotonic() if began_s is None else began_s
        """When there was room for the last start, or it began anew."""
        self._woken_at: float | None = None
        """When it was woken, until it has back what it was parked without."""
        self._rest: Level | None = None
        """What is wanted once those that are with the workers have their answers."""
        self._ordered = False
        """Whether somebody has said so: nobody who asks before changes that, and it stays there
        until somebody asks."""
        self._gives_way = False
        """Whether it rests for another one's sake."""
        self._ahead = False
        """Whether it goes up before anybody asks, and is not there yet."""
        self._first = FirstToken()
        self._image = NextImage(log)
        self._last_error: ColdframeError | None = None
        self._failed_at = 0.0
        self.count = FrontCount(devices=options.devices)
        self.start_log = StartLog(now() if began_ns is None else began_ns, recorder)
        self.replica: Replica | None = None
        self.ends = False
        """Whether all is to end, once those that ask have their answers."""
        self._on_demand = began_ns is None
        self._called = not self._on_demand
        """Whether it is to start also where nobody asks it."""
        if began_ns is not None:
            self._start_first(launch, alone)

    # -- requests --------------------------------------------------------------------------------

    @property
    def options(self) -> ReplicaOptions:
        """What its replicas are to be."""
        return self._options

    @property
    def has_vllm(self) -> bool:
        """Whether its replica has a vLLM engine, which serves what the native one does not."""
        return self._options.vllm is not None

    @property
    def known(self) -> bool:
        """Whether the model's config has been read."""
        return self._quarters.known

    @property
    def model(self) -> ModelFacts:
        """The model's configs and shape, as they were read last.

        Raises:
            ReplicaError: They have not been yet.
        """
        return self._quarters.model

    @property
    def failures(self) -> int:
        """Deaths, one soon after the other."""
        return self._relapses.count

    @property
    def fits(self) -> bool:
        """Whether it could start now without anybody being sent away."""
        return self._quarters.fits

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._asks

    def submit(
        self,
        params: SamplingParams,
        listener: Listener,
        *,
        prompt: str | None = None,
        prompt_ids: tuple[int, ...] | None = None,
        add_special: bool = True,
        generated_ids: tuple[int, ...] = (),
        give: bool = False,
        kv: Given | None = None,
    ) -> str:
        """Takes a request, and wakes the replica for it: its id; see `Replica.submit`.

        Raises:
            ColdframeError: It cannot go on.
        """
        if self.error is not None:
            raise self.error
        before = self.state
        if before == "starting" and not self._ordered:
            self._rest = None  # it was started ahead, to rest until somebody asks
        self._ahead = False
        if self.watch is not None and prompt_ids is not None:
            listener = self.watch.follow(prompt_ids, generated_ids, listener)
        name = self._asks.add(
            params,
            listener,
            prompt=prompt,
            prompt_ids=prompt_ids,
            add_special=add_special,
            generated_ids=generated_ids,
            give=give,
            kv=kv,
        )
        self.unasked.asked()
        self._rouse()
        self.life.asked(before)
        return name

    def is_lost_to(self, error: ColdframeError) -> bool:
        """Whether an error is the end of what serves requests, and not of the one that got it."""
        died = None if self.replica is None else self.replica.error
        return any(error is of for of in (self.error, self._last_error, died))

    @property
    def given(self) -> int:
        """Requests that were given away, and whose KV nobody has taken yet."""
        return 0 if self.replica is None else self.replica.given

    def cancel(self, name: str) -> None:
        """Forgets a request."""
        self._asks.cancel(name, self.replica)

    # -- states ----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Which it is in."""
        return self.life.state

    @state.setter
    def state(self, state: State) -> None:
        self.life.enter(state, asked=bool(self._asks))

    def wake(self) -> None:
        """Has it started, if it is not; the next `step` does so. An order to rest is forgotten."""
        self._rest, self._ordered, self._called = None, False, True
        self._ahead = False
        self.unasked.restart()
        if self.state == "draining":
            self.state, self._gives_way = "warm", False
        self._rouse()

    @property
    def devices(self) -> int:
        """How many devices it holds while it is held."""
        return len(self._options.devices)

    def needs(self, held_s: float) -> Mapping[Level, Need]:
        """What it takes at each level, as far as that is known; see `Candidate`."""
        return self._quarters.needs(held_s)

    def start_ahead(self, level: Level = "parked") -> None:
        """Has it started and parked, or warm, unless somebody asks it before it is."""
        self.life.begin_ahead()
        self._rouse()
        self._ahead, self._called = True, True
        self._rest = None if level == "warm" else level
        self.unasked.most = "warm"  # what it had to leave to others before is over

    @property
    def will_rise(self) -> bool:
        """Whether it is to go up, now or later, before anybody asks."""
        stays = self._ordered or self.ends or self.state == "failed"
        return not stays and self.unasked.will_rise

    def _wake_ahead(self) -> None:
        self.life.begin_ahead()
        self._ahead = True
        self._rouse()

    def follow(self) -> None:
        """Goes where it may still be, which others have less of now."""
        self.step()

    def _rouse(self) -> None:
        if self.state == "zero":
            self.state, self._ordered = "starting", False
            self.start_log = StartLog(now(), self._recorder)
        elif self.state == "parked":
            self._ordered = False
            if self._quarters.take() and self.replica is not None:
                self.replica.wake()
                self._woken_at = time.monotonic()
                self._become_warm()

    def sleep(self, level: int) -> None:
        """Has it parked (level 1) or ended (2), once the requests with the workers are answered."""
        if self.state == "failed":
            return
        self._ordered = True
        if self.state == "zero":
            return
        if self.state == "starting" and level != 1 and not self._asks:
            self._end()  # also where it dies again and again
        elif self.state != "parked":
            self._rest = "parked" if level == 1 else "zero"
            if self.state == "warm":
                self.state = "draining"
        elif level != 1:
            self._end()

    @property
    def wait_s(self) -> float:
        """How long nothing is to be done unless something happens, in seconds."""
        return min(self._quiet_s, self.unasked.change_s)

    @property
    def _quiet_s(self) -> float:
        if self._asks and self.state in ("parked", "zero"):
            return _ROOM_S if self._quarters.waiting else 0.0
        if self.replica is not None:
            return self.replica.wait_s
        if self.state != "starting":
            return _LONG_S
        return max(_ROOM_S if self._quarters.waiting else 0.0, self._relapses.wait_s)

    def tick(self) -> None:
        """Has the replica take note of what has happened; to be called after each poll."""
        if self.replica is not None:
            self.replica.resigned = self.ends or self.state in ("draining", "parked")
            self.replica.step()
            if self.state == "parked" and self.replica.resting.left:
                # Before others find that it has left, and too little.
                self._quarters.weights_left(with_contexts=self.replica.contexts.left)

    def step(self) -> None:
        """What there is to do after something has happened; to be called after `tick`."""
        replica = self.replica
        if replica is not None and replica.error is not None:
            self._lost(replica.error)
        if self.state == "failed":
            self._forgive()
        if self._asks:
            # Those that were held while it drained. Not in the step that has it rest: whoever has
            # ordered that is to hear of it.
            self._rouse()
        elif self.state == "parked" and self._quarters.waiting:
            self._rouse() if self._called else self._quarters.withdraw()
        self._give_up_the_start()
        if self.state == "starting" and self.replica is None:
            self._start()
        if self.replica is not None:
            self._step(self.replica)
        if self._asks:
            self.used_at = time.monotonic()
        elif self.state == "zero":
            self.unasked.begin()
        self.count.step(self.replica, idle=self.idle, parked=self.state == "parked")

    def _step(self, replica: Replica) -> None:
        if not self._has_settled(replica):
            return
        if self.start_log.step(replica):
            self._log.info("decode", **(self.start_log.decode or {}))
        if self.state == "warm" and not replica.loaded:
            self.state, self._first = "starting", FirstToken()  # it had to start over
            self._started_at = time.monotonic()
        if replica.known and self.state in ("starting", "warm"):
            self._asks.pass_on(replica)
        if self.state == "starting":
            self._get_warm(replica)
        if self.state == "warm" or self._image.making:
            self._image.step(replica, self.unasked.idle_s)
        if self._woken_at is not None and _is_back(replica):
            self.unasked.policy.started("parked", time.monotonic() - self._woken_at)
            self._woken_at = None
        self._get_rest()

    def close(self) -> None:
        """Ends all processes; requests get no word of it."""
        self._asks.clear()
        self._leave()

    # -- what the gateway is told ----------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether requests are welcome, even where they have to wait for a start."""
        if self.state == "starting":
            return (self._was_warm or self._on_demand) and not self._relapses.looping
        return self.state != "failed"

    def load_state(self) -> LoadState:
        """How far it is."""
        replica = self.replica
        phase = {"warm": "ready", "draining": "ready"}.get(self.state, self.state)
        error = self.error or (self._last_error if self.state == "starting" else None)
        told = None if error is None else error.to_wire()
        if replica is None:
            waits_for = "memory" if self._quarters.waiting else "plan"
            stage = waits_for if self.state == "starting" else None
            return LoadState(phase, stage, error=told, open=self.open, failures=self.failures)
        done, total = replica.board.progress if replica.board is not None else (0, 0)
        return LoadState(
            phase,
            _stage(replica) if self.state == "starting" else None,
            done,
            total,
            replica.load_s,
            _tier(replica),
            told,
            self.open,
            self.failures,
            replica.facts["device"],
            replica.facts["device_why"],
            None if replica.options.device == CPU else replica.contexts.status,
        )

    # -- from zero -------------------------------------------------------------------------------

    def _start_first(self, launch: Launch | None, alone: bool) -> None:
        try:
            if self._quarters.take():
                self.starts = 1
                self.replica = self._replica(launch)
        except ColdframeError as error:
            if launch is not None:
                launch.close()
            if alone:
                raise
            self._lost(error)

    def _replica(self, launch: Launch | None) -> Replica:
        def warn(what: str) -> None:
            self._log.warning("not as asked", why=what)

        return Replica(self._options, self._recorder, launch, self.loop, warn, self.watch)

    def _start(self) -> None:
        if self._comes_for_nobody and not self.fits:
            self._stand_down()  # nobody is to go for who is not asked
            return
        if self._relapses.wait_s:
            return
        if self._quarters.waiting and not self._asks and not self._called:
            self._quarters.leave()  # nobody is to go for those who have gone meanwhile
            self.state = "zero"
            return
        try:
            if not self._quarters.take():
                return
            self.starts += 1
            self._started_at = time.monotonic()
            self.replica = self._replica(None)
        except ColdframeError as error:
            self._lost(error)

    def _stand_down(self) -> None:
        """Does not come before anybody asks."""
        self._leave()
        self._ahead = self._called = False
        self._rest, self.unasked.foregone = None, True
        self.life.gone()
        self.state = "zero"

    def read_ahead(self) -> None:
        """Reads the model's config before a start does, where it lies in a directory."""
        if self.error is None:
            try:
                self._quarters.read_ahead()
            except ColdframeError as error:
                self._lost(error)

    def _has_settled(self, replica: Replica) -> bool:
        """Whether the replica is still there after it is known what it is."""
        try:
            if replica.known:
                self._quarters.learn(replica.model)
            if self._quarters.settle(replica):
                return True
        except ColdframeError as error:
            self._lost(error)
            return False
        self._log.info("others make room first")
        self._asks.take_back()
        self._leave()
        return False

    def _get_warm(self, replica: Replica) -> None:
        """Warm is who has its weights and has made a token: for a client, or for nobody."""
        if not replica.loaded:
            return
        if replica.answered:
            first_s, tier = self.start_log.first_token_s, _tier(replica)
            self.unasked.policy.started("zero", time.monotonic() - self._started_at)
            self._become_warm()
            self._image.started(replica)
            self._log.info(
                "ready",
                first_token_s=first_s,
                tier=tier,
                no_clone=replica.facts.get("snapshot", {}).get("why"),
                load_s=replica.load_s,
            )
            return
        if self._first.why is not None:
            self._log.warning("no first token", why=str(self._first.why))
            if self._first.hopeless:
                self._lost(self._first.why)
                return
            self._first.why = None
        try:
            self._first.step(replica)
        except ColdframeError as error:
            self._lost(error)

    def _become_warm(self) -> None:
        self.state = "warm" if self._rest is None else "draining"
        self._gives_way = False
        self._was_warm, self._called = True, False
        self._relapses.warm()
        self._warm_since = time.monotonic()
        if not self._ahead and not self._asks:
            self.unasked.restart()  # it was not to be there before, for whoever has had it started
        self._ahead = False
        self._start_s = self.start_log.first_token_s
        self._first, self._last_error = FirstToken(), None

    # -- back to it ------------------------------------------------------------------------------

    @property
    def leaving(self) -> bool:
        """Whether what it has of the device is to come free soon."""
        if self.state == "draining":
            return self._rest == "zero" or self._gives_way
        replica = self.replica
        if self.state != "parked" or not self._gives_way or replica is None:
            return False
        return replica.resting.leaving or replica.contexts.leaving

    @property
    def can_go(self) -> bool:
        """Whether it may be sent to zero for another one.

        One that is being asked stays for as long as its start took: where all are asked all the
        time, half of it at most goes into starts. One that is started for nobody is in nobody's
        way.
        """
        if self.state == "starting":
            return self._comes_for_nobody
        if self.state != "warm":
            return self.state == "parked"
        if self._image.holds and self._image.urgent:
            return False
        return self.idle or time.monotonic() - self._warm_since >= self._start_s

    def make_room(self) -> None:
        """Goes to zero, once those that are with the workers have their answers.

        Where it may be parked, and its weights then take nothing that others could have, to there.
        """
        if self.leaving:
            return
        if self._comes_for_nobody:
            self._stand_down()
            return
        if self.state == "warm":
            self._gives_way = self._may_park and self._quarters.weights_may_leave
            self.state, self._rest = "draining", "parked" if self._gives_way else "zero"
        self._ordered, self.unasked.foregone = False, True
        replica = self.replica
        idle = replica is not None and replica.idle and not self._asks
        if self.state == "draining" and self._gives_way and replica is not None and idle:
            self._park(replica)
        elif self.state == "parked" or idle:
            self._end()

    def _get_rest(self) -> None:
        """Goes where nobody asking, or an order, leads."""
        replica, due = self.replica, self.unasked.due
        if not self._asks and self.state != "starting":
            self.unasked.begin()
            if self._image.holds:
                self.unasked.hold()
            due = self.unasked.due
        if self.state == "warm" and due != "warm" and not self._image.holds:
            self._rest = due
            self.state, self._ordered = "draining", False
        elif self.state == "warm" and self._may_park and self.unasked.idle_s >= _CALM_S:
            assert replica is not None
            replica.keep()
        if self.state == "draining" and replica is not None and replica.idle:
            self._park(replica) if self._rest == "parked" else self._end()
        elif self.state == "parked" and not self._ordered and due == "zero":
            self._end()

    @property
    def _may_park(self) -> bool:
        return self.unasked.policy.parks

    def _park(self, replica: Replica) -> None:
        self._image.rest()
        self._woken_at = None
        replica.park()
        self._quarters.park()
        self.state, self._rest = "parked", None
        self.unasked.parked()
        self._log.info("parked")

    def _end(self) -> None:
        self._leave()
        self._ahead = False
        self.life.gone()
        self.state, self._rest = "zero", None
        self._relapses.forget()
        self._log.info("zero")

    def _leave(self) -> None:
        """Ends the replica."""
        self._image.leave()
        self._first, self._gives_way, self._woken_at = FirstToken(), False, None
        replica, self.replica = self.replica, None
        if replica is not None:
            self.start_log.close()
            if replica.faults.absent:  # nor will it be there for the next one
                self._options = self._options.on_cpu(str(replica.options.device_why))
            self.count.leave(replica)
            replica.close()
        self._quarters.leave()

    # -- when it dies ----------------------------------------------------------------------------

    def _lost(self, error: ColdframeError) -> None:
        """The replica cannot go on: another one is started, where that may help."""
        self._relapses.died()
        self._last_error = error
        self._log.error("failed", error=str(error), failures=self.failures)
        self._leave()
        died = isinstance(error, ReplicaError)
        if not self._was_warm and (not died or self._relapses.too_many):
            self.state, self.error, self._failed_at = "failed", error, time.monotonic()
        if isinstance(error, _PASSING):
            error.retry_after_s = SOON_S if self.error is None else _AGAIN_S
        self._asks.lose(error, for_good=self.error is not None)
        ahead = self._ahead
        if ahead or self.life.ahead or self.error is not None:
            self._ahead, self.unasked.foregone = False, True
            self.life.gone()
        if not self._asks:
            self.unasked.begin()
        if self.error is not None:
            return
        resting = self.state in ("draining", "parked")
        stays = self.unasked.policy.always and not resting
        if resting and (not self._asks or not self._ordered):
            self._rest = None  # others have the room that it was to make, or it is at zero
        # Who was to come for nobody does not come again at the cost of others.
        self._called = not ahead and (not self._was_warm or stays)
        self.state = "starting" if self._asks or self._called else "zero"
        self.start_log = StartLog(now(), self._recorder)

    def _forgive(self) -> None:
        """Lets it be asked again, where what it has failed of may have passed."""
        late = time.monotonic() - self._failed_at >= _AGAIN_S
        if late and isinstance(self.error, _PASSING):
            self.state, self.error, self._on_demand = "zero", None, True
            self._relapses.forget()

    def give_up(self, error: ColdframeError) -> None:
        """Serves it no more: what was read of it beside its weights is wrong."""
        self._was_warm = False
        self._lost(error)

    def _has_died(self) -> bool:
        return self.replica is not None and self.replica.error is not None


def _is_back(replica: Replica) -> bool:
    """Whether a replica has what it was parked without."""
    places = replica.contexts.places.values()
    return not replica.resting.coming and all(place == "here" for place in places)


def _tier(replica: Replica) -> str | None:
    found: str | None = replica.facts.get("snapshot", {}).get("tier")
    return found


def _stage(replica: Replica) -> str:
    """What the first token waits for."""
    if not replica.known or replica.board is None:
        return "plan"
    if not replica.loaded:
        return "weights"
    return "first_token" if _tier(replica) else "workers"
