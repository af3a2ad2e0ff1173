"""A replica behind a gateway: the two brought together, watched, and ended in good order.

One loop, that of `Replica.poll`. The gateway is replaced when it dies, with the same listener, so
that clients see a connection break and can come again. When the replica cannot go on the requests
get to know why, and the process ends: whoever started the container starts the next.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from typing import Any

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import Recorder, Span, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.creating import ImageInTheMaking
from coldframe.runtime.early import GatewayProcess
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frontcount import FrontCount
from coldframe.runtime.frontdesk import FrontDesk
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.jobs import JobFetcher
from coldframe.runtime.replica import Replica
from coldframe.runtime.router import TokenEvent
from coldframe.runtime.timeline import Timeline
from coldframe.runtime.workforce import ending

__all__ = ["Endpoint"]


_PROGRESS_S = 0.1
_IDLE_S = 1.0
_MOST_SPANS = 100
_PROBES = 3
"""How often the first token is tried for nobody, before the replica is given up."""
_SPANS_NS = 2_000_000_000
"""How long after the first token spans of the start may still come."""
_GOODBYE_S = 2.0
"""How long a gateway gets to tell clients that the replica has failed, in seconds."""
_LAST_S = 0.2
_GATEWAY_CRASHES = 5
_GATEWAY_WINDOW_S = 60.0


class Endpoint:
    """A replica that is served.

    Args:
        replica: Who answers.
        listeners: The bound ports; they are kept open here for as long as requests are taken.
        gateway: Its process, as it was started.
        settings: What the gateway is told.
        recorder: Gets spans of the front.
        log: Gets what happens.
        chat_template: A file with the operator's own, in place of the checkpoint's.
        jobs: Fetches requests from a queue.
    """

    def __init__(
        self,
        replica: Replica,
        listeners: list[socket.socket],
        gateway: GatewayProcess,
        settings: GatewaySettings,
        recorder: Recorder,
        log: Log,
        chat_template: str | None = None,
        jobs: JobFetcher | None = None,
    ) -> None:
        self._replica = replica
        self._listeners = listeners
        self._settings = settings
        self._recorder = recorder
        self._log = log
        self._count = FrontCount(replica)
        self._spans: list[Span] = []
        self._timeline_open = True
        self._told_startup: dict[str, Any] | None = None
        self._chat_template = chat_template
        self._jobs = jobs
        self._card: dict[str, Any] | None = None
        self._phase = "starting"
        self._told: dict[str, Any] | None = None
        self._first_token_ns: int | None = None
        self._probe: _Probe | None = None
        self._probes = 0
        self._error: ColdframeError | None = None
        self._image: ImageInTheMaking | None = None
        self._idle_since = time.monotonic()
        self._drain_until: float | None = None
        self._drained = False
        self._crashes: deque[float] = deque(maxlen=_GATEWAY_CRASHES)
        self._take_gateway(gateway)

    # -- the gateway -----------------------------------------------------------------------------

    def _take_gateway(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._recorder.add("process_spawn", gateway.started_ns, gateway.spawned_ns, note="gateway")
        self._desk = FrontDesk(
            Channel(gateway.socket),
            self._replica,
            {"startup": self._startup, "stats": self._stats},
            self._settings.max_running,
            self._on_message,
            lambda what: self._log.error("the gateway is not itself", said=what),
            self._gateway_gone,
        )
        self._told = None
        self._desk.send(
            {"type": "settings", "settings": self._settings.to_wire(), "parent": os.getpid()},
            tuple(listener.fileno() for listener in self._listeners),
        )
        if self._card is not None:
            self._desk.send({"type": "model", "card": self._card})

    def _gateway_gone(self) -> None:
        code = _status(self._gateway)
        if self._phase in ("draining", "failed"):
            self._drained = True
            return
        if len(self._crashes) == _GATEWAY_CRASHES and (
            time.monotonic() - self._crashes[0] < _GATEWAY_WINDOW_S
        ):
            self._error = ReplicaError("the gateway dies again and again", got=ending(code))
            self._phase, self._drained = "failed", True
            return
        self._log.error("the gateway died", why=ending(code))
        self._crashes.append(time.monotonic())
        self._take_gateway(GatewayProcess())

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case "spans" if self._timeline_open:
                spans = [_span(wire) for wire in message.body["spans"][:_MOST_SPANS]]
                self._replica.add_spans(spans)
            case "drained" if self._phase in ("draining", "failed"):
                self._drained = True

    # -- the loop --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serves until it is asked to end, or cannot go on.

        Raises:
            ColdframeError: It cannot go on. Clients have been told.
        """
        try:
            while not self._over():
                self._replica.poll(_PROGRESS_S if self._phase == "starting" else 1.0)
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
        if self._jobs is not None:
            self._jobs.drain()  # the rest follows when it has ended
        else:
            self._drain_gateway()

    def _drain_gateway(self) -> None:
        self._phase = "draining"
        # Else the kernel would go on taking connections that nobody will ever look at.
        self._stop_listening()
        self._tell()

    def close(self) -> None:
        """Ends the gateway, and an image in the making."""
        if self._image is not None:
            self._image.close()
        if self._jobs is not None:
            self._jobs.close()
        self._desk.close()
        self._gateway.child.kill()
        self._stop_listening()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()

    def _over(self) -> bool:
        if self._drained:
            return True
        return self._drain_until is not None and time.monotonic() > self._drain_until

    def _step(self) -> None:
        """What there is to do after something has happened."""
        self._desk.flush()
        replica = self._replica
        self._count.step()
        if replica.error is not None and self._error is None:
            self._fail(replica.error)
        if self._error is not None:
            return
        self._watch_jobs()
        if self._card is None and replica.known:
            self._introduce()
        if self._first_token_ns is None and replica.answered:
            self._first_token_ns = now()
        if self._phase == "ready" and not replica.loaded:
            self._phase, self._probe = "starting", None  # it had to start over
        if self._phase == "starting":
            self._get_ready()
        self._tell()
        self._close_timeline()
        self._make_image()

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

    def _introduce(self) -> None:
        """Tells the gateway what the model is, as soon as its config is there."""
        from coldframe.runtime.gateway.card import read_card

        replica = self._replica
        try:
            card = read_card(
                replica.model.directory,
                self._settings.model,
                replica.spec.context_length,
                replica.spec.vocab_size,
                self._chat_template,
            )
        except ColdframeError as error:
            self._fail(error)
            return
        self._card = card.to_wire()
        self._desk.send({"type": "model", "card": self._card})

    def _get_ready(self) -> None:
        """Ready is who has its weights and has made a token: for a client, or for nobody."""
        replica = self._replica
        if not replica.loaded:
            return
        if replica.answered:
            self._phase = "ready"
            tier = replica.facts.get("snapshot", {}).get("tier")
            first = (self._first_token_ns or now()) - self._settings.exec_ns
            self._log.info("ready", first_token_s=first / 1e9, tier=tier, load_s=replica.load_s)
        elif self._probe is None and replica.idle and replica.known:
            # Two tokens, so that decode is known to work as well.
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            self._probe = _Probe()
            self._probes += 1
            try:
                replica.submit(params, self._probe, prompt_ids=(0,))
            except ColdframeError as error:
                self._fail(error)
        elif self._probe is not None and self._probe.error is not None:
            self._log.warning("no first token", why=str(self._probe.error))
            if self._probes >= _PROBES:
                self._fail(self._probe.error)
            self._probe = None

    def _tell(self) -> None:
        """Tells the gateway how far the replica is, where that has changed."""
        replica = self._replica
        done, total = replica.board.progress if replica.board is not None else (0, 0)
        tier = replica.facts.get("snapshot", {}).get("tier")
        state = LoadState(
            self._phase,
            self._stage() if self._phase == "starting" else None,
            done,
            total,
            replica.load_s,
            tier,
            None if self._error is None else self._error.to_wire(),
        ).to_wire()
        told = {**state, "elapsed_s": 0.0}
        if told != self._told:
            self._told = told
            self._desk.send({"type": "state", **state})

    def _stage(self) -> str:
        replica = self._replica
        if not replica.known or replica.board is None:
            return "plan"
        if not replica.loaded:
            return "weights"
        return "first_token" if replica.facts.get("snapshot", {}).get("tier") else "workers"

    # -- what the gateway asks -------------------------------------------------------------------

    def _timeline(self) -> Timeline:
        self._spans += [*self._recorder.drain(), *self._replica.spans]
        self._replica.spans.clear()
        return Timeline(self._spans, self._settings.exec_ns, self._first_token_ns)

    def _close_timeline(self) -> None:
        """Takes no more spans once the start is over: every request to come has some, too."""
        if self._first_token_ns is None or not self._replica.loaded:
            return
        if self._timeline_open and now() - self._first_token_ns > _SPANS_NS:
            self._startup()
            self._timeline_open = False
        if not self._timeline_open:
            self._recorder.drain()
            self._replica.spans.clear()

    def _startup(self) -> dict[str, Any]:
        if self._told_startup is None or self._timeline_open:
            facts = self._replica.facts
            self._told_startup = {
                "timeline": self._timeline().to_json(),
                "snapshot": facts.get("snapshot"),
                "load_mode": facts.get("mode"),
                "verified": facts.get("verified"),
            }
        return self._told_startup

    def _stats(self) -> dict[str, Any]:
        pids = {"front": os.getpid(), "gateway": self._gateway.child.pid, **self._replica.pids}
        return self._count.stats(self._timeline(), pids).to_wire()

    # -- an image for the next start -------------------------------------------------------------

    def _make_image(self) -> None:
        """Freezes a worker for the next start, where there was no image, once nobody asks."""
        if self._image is not None:
            if self._image.outcome is None:
                self._image.step()
                if self._image.outcome:
                    self._log.info("image for the next start", **self._image.outcome)
        elif self._phase == "ready":
            if not self._replica.idle:
                self._idle_since = time.monotonic()
            elif time.monotonic() - self._idle_since > _IDLE_S:
                self._image = ImageInTheMaking(self._replica)


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


def _status(gateway: GatewayProcess) -> int:
    """What a gateway that has hung up ended with; it is given a moment to do so by itself."""
    late = time.monotonic() + _LAST_S
    while gateway.child.poll() is None and time.monotonic() < late:
        time.sleep(0.005)
    return gateway.child.kill()


class _Probe:
    """Who asks for the first token where no client does."""

    def __init__(self) -> None:
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: ColdframeError) -> None:
        self.error = error
