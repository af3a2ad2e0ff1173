"""Models behind a gateway: the two brought together, watched, and ended in good order.

One loop, that of `Fleet.poll`. The gateway is replaced when it dies, with the same listener,
so that clients see a connection break and can come again. When no model can be served at all
the requests get to know why, and the process ends: whoever started the container starts the next.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.process import Child
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.endpoint.announcer import Announcer
from coldframe.runtime.endpoint.fleet import Fleet
from coldframe.runtime.endpoint.frontdesk import FrontDesk
from coldframe.runtime.endpoint.jobs import JobFetcher
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.replica.workforce import ending
from coldframe.runtime.start.early import GatewayProcess

if TYPE_CHECKING:
    from coldframe.runtime.endpoint.whereabouts import Whereabouts
    from coldframe.runtime.integrations.dynamo.peer_finder import PeerFinder
    from coldframe.runtime.transport.takeover import Takeover

__all__ = ["Endpoint"]


_PROGRESS_S = 0.1
_LEND_S = 1.0
"""How often a gateway gets a process for templates at most: more would be a game."""
_MOST_SPANS = 100
_GOODBYE_S = 2.0
"""How long a gateway gets to tell clients that the replica has failed, in seconds."""
_LAST_S = 0.2
_GATEWAY_CRASHES = 5
"""After so many gateways in a row that died before they took a connection, it is given up."""
_GATEWAY_WINDOW_S = 60.0
_GATEWAY_AT_ONCE = 3
"""So many deaths within a window are answered at once; each further one is waited behind longer."""
_GATEWAY_DELAY_S = 0.2
_GATEWAY_MOST_DELAY_S = 5.0
_LEAVE_S = 5.0
"""How long a gateway gets to leave Dynamo's discovery, in seconds, beside the time of grace."""


class Endpoint:
    """Models that are served.

    Args:
        fleet: Has them answered.
        listeners: The bound ports; they are kept open here for as long as requests are taken.
        gateway: Its process, as it was started.
        settings: What the gateway is told.
        recorder: Gets spans of the front.
        log: Gets what happens.
        chat_template: A file with the operator's own, in place of the checkpoint's.
        jobs: Fetches requests from a queue.
        takeover: Takes requests from other replicas.
        peers: Finds peers in Dynamo's discovery.
        exit_at_zero: Whether this ends where nobody asks any more, instead of waiting at zero.
    """

    def __init__(
        self,
        fleet: Fleet,
        listeners: list[socket.socket],
        gateway: GatewayProcess,
        settings: GatewaySettings,
        recorder: Recorder,
        log: Log,
        chat_template: str | None = None,
        jobs: JobFetcher | None = None,
        *,
        takeover: Takeover | None = None,
        peers: PeerFinder | None = None,
        exit_at_zero: bool = False,
    ) -> None:
        self._fleet = fleet
        self._announcer = Announcer(fleet, chat_template)
        self._listeners = listeners
        self._settings = settings
        self._recorder = recorder
        self._log = log
        self._exit_at_zero = exit_at_zero
        self._jobs = jobs
        self._takeover = takeover
        self._peers = peers
        self._phase: str | None = None
        """`draining` or `failed`, where this is about to end."""
        self._error: ColdframeError | None = None
        self._drain_until: float | None = None
        self._drained = False
        self._deaths: deque[float] = deque()
        self._stillborn = 0
        self._gateway_at: float | None = None
        """When the next gateway is started, where there is none."""
        self._leave_until: float | None = None
        """Until when the gateway may take to leave Dynamo's discovery, before it drains."""
        self._lent: Child | None = None
        """A process for chat templates that the gateway may not have been able to start."""
        self._lent_at = -_LEND_S
        self._whereabouts: Whereabouts | None = None
        self._take_gateway(gateway)

    # -- the gateway -----------------------------------------------------------------------------

    def _take_gateway(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._gateway_accepted = False
        self._recorder.add("process_spawn", gateway.started_ns, gateway.spawned_ns, note="gateway")
        self._desk = FrontDesk(
            Channel(gateway.socket),
            self._fleet,
            {
                "startup": self._startup,
                "stats": self._stats,
                "placement": self._placement,
                "sleep1": lambda name: self._sleep(name, 1),
                "sleep2": lambda name: self._sleep(name, 2),
                "wake_up": self._wake,
                "registration": self._registration,
            },
            self._settings.max_running * len(self._settings.models),
            self._on_message,
            lambda what: self._log.error("the gateway is not itself", said=what),
            self._gateway_gone,
        )
        self._desk.send(
            {"type": "settings", "settings": self._settings.to_wire(), "parent": os.getpid()},
            tuple(listener.fileno() for listener in self._listeners),
        )
        self._announcer.begin(self._desk.send)
        for _, model in self._fleet:
            if model.watch is not None:
                model.watch.forget()  # whoever was told is another one now

    def _gateway_gone(self) -> None:
        status = _status(self._gateway)
        why = "it hung" if status is None else ending(status)
        self._end_lent()
        if self._phase is not None or self._leave_until is not None:
            self._drained = True
            return
        if self._gateway_accepted:
            self._stillborn = 0
        elif status != -signal.SIGKILL:  # which is somebody else's doing, and no fault of its own
            self._stillborn += 1
        if self._stillborn == _GATEWAY_CRASHES:
            self._error = ReplicaError("no gateway comes up", got=why)
            self._phase, self._drained = "failed", True
            return
        moment = time.monotonic()
        self._deaths.append(moment)
        while self._deaths[0] < moment - _GATEWAY_WINDOW_S:
            self._deaths.popleft()
        late = len(self._deaths) - _GATEWAY_AT_ONCE
        delay = min(_GATEWAY_DELAY_S * 2**late, _GATEWAY_MOST_DELAY_S) if late > 0 else 0.0
        self._log.error("the gateway died", why=why, next_in_s=delay)
        # What connects meanwhile is held by the kernel: the listeners are open here.
        self._gateway_at = moment + delay

    def _replace_gateway(self) -> None:
        if self._gateway_at is not None and time.monotonic() >= self._gateway_at:
            self._gateway_at = None
            self._take_gateway(GatewayProcess(dynamo=self._settings.dynamo is not None))

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case "spans":
                self._gateway_accepted = True
                spans = [_span(wire) for wire in message.body["spans"][:_MOST_SPANS]]
                if self._fleet.first.replica is not None:
                    self._fleet.first.replica.add_spans(spans)
            case "drained" if self._phase is not None:
                self._drained = True
            case "templates":
                self._lend_templates()
            case "left":
                self._left()

    def _lend_templates(self) -> None:
        """Starts a process for chat templates, in the place of one that has died."""
        from coldframe.runtime.gateway.renderer import start_template_process

        if time.monotonic() - self._lent_at < _LEND_S:
            return
        self._lent_at = time.monotonic()
        self._end_lent()
        try:
            channel, self._lent = start_template_process()
        except PlatformError as error:
            self._log.error("no process for chat templates", why=str(error))
            return
        self._desk.send({"type": "templates"}, (channel.fileno(),))
        channel.close()

    def _end_lent(self) -> None:
        if self._lent is not None:
            self._lent.kill()
            self._lent = None

    # -- the loop --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serves until it is asked to end, or cannot go on.

        Raises:
            ColdframeError: It cannot go on. Clients have been told.
        """
        try:
            while not self._over():
                waits = (self._gateway_at, self._leave_until)
                busy = self._fleet.starting or any(wait is not None for wait in waits)
                self._fleet.poll(_PROGRESS_S if busy else 1.0)
                self._step()
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Takes no more requests and ends when those that there are have their answers."""
        if self._drain_until is not None:
            self._drained = True  # asked twice: at once
            return
        self._log.info("draining", seconds=self._settings.drain_s)
        self._drain_until = time.monotonic() + self._settings.drain_s
        self._fleet.drain()
        if self._takeover is not None:
            self._takeover.drain()
        if self._peers is not None:
            self._peers.leave()
        if self._settings.dynamo is not None:
            grace_s = float(self._settings.dynamo["grace_s"])
            self._leave_until = time.monotonic() + grace_s + _LEAVE_S
            self._desk.send({"type": "leave"})
        elif self._jobs is not None:
            self._jobs.drain()  # the rest follows when it has ended
        else:
            self._drain_gateway()

    def _left(self) -> None:
        """No front end sends anything any more, or it has taken too long to tell them."""
        if self._leave_until is not None:
            self._leave_until = None
            self._drain_gateway()

    def _drain_gateway(self) -> None:
        self._phase = "draining"
        # Else the kernel would go on taking connections that nobody will ever look at.
        self._stop_listening()
        self._drained = self._gateway_at is not None  # there is nobody to wait for
        self._tell()

    def close(self) -> None:
        """Ends the gateway."""
        if self._jobs is not None:
            self._jobs.close()
        if self._takeover is not None:
            self._takeover.close()
        self._desk.close()
        self._gateway.child.kill()
        self._end_lent()
        self._stop_listening()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()

    def _over(self) -> bool:
        if self._drained and not (self._phase == "draining" and self._is_elsewhere):
            return True
        return self._drain_until is not None and time.monotonic() > self._drain_until

    @property
    def _is_elsewhere(self) -> bool:
        """Whether another replica waits for what is here: answers, or KV."""
        answers = self._takeover is not None and not self._takeover.idle
        return answers or any(model.given for _, model in self._fleet)

    def _step(self) -> None:
        """What there is to do after something has happened."""
        self._desk.flush()  # the tokens first
        self._desk.watch()
        if self._takeover is not None:
            self._takeover.step()
        if self._peers is not None:
            self._peers.step(self._log)
        self._replace_gateway()
        self._fleet.step()
        if self._fleet.error is not None and self._error is None:
            self._fail(self._fleet.error)
        if self._error is not None:
            return
        if self._leave_until is not None and time.monotonic() > self._leave_until:
            self._left()
        self._watch_jobs()
        self._tell()
        self._tell_kv()
        if self._exit_at_zero and self._fleet.at_zero and self._drain_until is None:
            self.drain()

    def _watch_jobs(self) -> None:
        if self._jobs is None or self._phase == "draining":
            return
        if self._drain_until is not None:
            # The jobs first; but in the end clients, who are these jobs, are told that it is over.
            late = time.monotonic() > self._drain_until - _GOODBYE_S
            if late or self._jobs.status is not None:
                self._drain_gateway()
        elif self._jobs.status is not None:
            self._fail(ReplicaError("nobody fetches jobs any more", got=ending(self._jobs.status)))

    def _fail(self, error: ColdframeError) -> None:
        self._log.error("failed", error=str(error))
        self._error = error
        self._phase = "failed"
        self._tell()
        self._drain_until = time.monotonic() + _GOODBYE_S

    def _tell(self) -> None:
        """Tells the gateway how far the models are, where that has changed."""
        self._announcer.tell(self._desk.send, self._phase, self._error)

    def _tell_kv(self) -> None:
        """Tells the gateway which KV has come and gone, where somebody wants to know."""
        for name, model in self._fleet:
            events = [] if model.watch is None else model.watch.take()
            if events:
                self._desk.send({"type": "kv_events", "model": name, "events": events})

    # -- what the gateway asks -------------------------------------------------------------------

    def _startup(self, name: str) -> dict[str, Any]:
        model, budget = self._fleet[name], self._fleet.budget
        policy = model.unasked.document()
        policy["budget_left_s"] = None if budget is None else round(budget.left, 3)
        return {
            **model.start_log.document(),
            "policy": policy,
            "states": model.life.document(),
        }

    def _placement(self, name: str) -> dict[str, Any]:
        if self._whereabouts is None:
            from coldframe.runtime.endpoint.whereabouts import Whereabouts  # no start waits for it

            self._whereabouts = Whereabouts()
        return self._whereabouts.of(name, self._fleet[name])

    def _stats(self, name: str) -> dict[str, Any]:
        model = self._fleet[name]
        pids = {} if model.replica is None else dict(model.replica.pids)
        if model is self._fleet.first:
            pids |= {"front": os.getpid(), "gateway": self._gateway.child.pid}
        stats = model.count.stats(model.start_log.timeline(), pids)
        return replace(stats, prewarms=dict(model.life.prewarms)).to_wire()

    def _registration(self, name: str) -> dict[str, Any]:
        from coldframe.runtime.integrations.dynamo.registration import registration_of

        return registration_of(self._fleet[name])

    def _sleep(self, name: str, level: int) -> dict[str, Any]:
        self._fleet[name].sleep(level)
        return {}

    def _wake(self, name: str) -> dict[str, Any]:
        self._fleet[name].wake()
        return {}


def _span(wire: Any) -> list[Any]:
    """A span of the gateway's, which says nothing else in that name.

    Raises:
        TypeError, ValueError: It is none.
    """
    name, _, start_ns, end_ns, note, _ = wire
    latest = now()
    for moment in (start_ns, end_ns):
        if type(moment) is not int or not 0 <= moment <= latest:
            raise ValueError("this is no moment")
    if not isinstance(name, str):
        raise TypeError("this is no span")
    return [name[:40], "gateway", start_ns, end_ns, None if note is None else str(note)[:200], None]


def _status(gateway: GatewayProcess) -> int | None:
    """What a gateway ended with; None where it does not do so by itself, and is killed."""
    late = time.monotonic() + _LAST_S
    while gateway.child.poll() is None and time.monotonic() < late:
        time.sleep(0.005)
    status = gateway.child.poll()
    gateway.child.kill()
    return status
