"""A decode worker on another host, as a process of this replica: to the front it is any worker.

It has no model and no torch. What the front hands it, it has the memory service keep under a
ticket, and passes on over one authenticated connection, on which the tokens come back. When that
ends, or nothing comes over it any more, this process ends, and with it everything happens that
happens when a worker dies: its requests go on elsewhere, from the tokens that the client has.

Messages in:  `init` (with a connection to the memory service), `handoff`, `cancel`.
Messages out: `imported`, `up`, `beat`, `tokens`, `ack`, `failed`, `leaving`, `broken`.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from coldframe.loader.errors import (
    ColdframeError,
    MemoryServiceGone,
    ReplicaError,
    TransferBroken,
    TransferDenied,
)
from coldframe.loader.process import collect_garbage, die_with_parent
from coldframe.loader.timeline import Recorder
from coldframe.loader.transport.base import Ticket
from coldframe.loader.transport.handshake import dial
from coldframe.loader.transport.secret import read_secret
from coldframe.loader.transport.secure import SecureSocket
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.replica.loads import blocks_of
from coldframe.runtime.transport.base import Given
from coldframe.runtime.worker.handoff import Handoff

__all__ = ["BEAT_S", "MOST_MESSAGE", "PURPOSE", "SILENCE_S", "main"]

PURPOSE = "decode"
BEAT_S = 3.0
"""How often either side says that it is there, in seconds."""
SILENCE_S = 20.0
"""How long the other may say nothing, in seconds."""
MOST_MESSAGE = 64 << 20
_CONNECT_S = 5.0
_SEND_S = 10.0
_FIRST_WAIT_S = 0.1
_MOST_WAIT_S = 2.0
_PASSED_ON = ("tokens", "ack", "failed", "leaving")


def main(control_fd: int, spawned_ns: int, first_ns: int) -> NoReturn:
    """The process's entry; see `worker.process.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder("worker")
    recorder.add("interpreter", spawned_ns, first_ns)
    control = Channel.from_fd(control_fd)
    collect_garbage()
    try:
        _Remote(control, recorder).run()
    except ColdframeError as error:
        _try_to_say(control, error)
    except Exception as error:  # noqa: BLE001 - the front must hear of whatever ends a worker
        _try_to_say(control, ReplicaError("a remote worker's process broke", got=repr(error)))
    os._exit(1)


def _try_to_say(control: Channel, error: ColdframeError) -> None:
    try:
        control.send({"type": "broken", "error": error.to_wire()})
    except ReplicaError:  # nobody is there to hear it
        return


class _Remote:
    def __init__(self, control: Channel, recorder: Recorder) -> None:
        self._control = control
        self._recorder = recorder
        self._selector = selectors.DefaultSelector()
        self._offered: dict[str, Handoff] = {}
        """Requests that wait for a ticket."""
        self._address = ""
        self._ttl_s = 0.0
        self._up = False
        self._heard = self._said = time.monotonic()

    def run(self) -> None:
        """Serves until one of the sockets ends.

        Raises:
            ColdframeError: It was not the front's.
        """
        self._control.send({"type": "imported"})
        message = self._control.recv()
        if message is None:
            return
        init, (memory_fd,) = message
        die_with_parent(init["parent"])
        self._recorder.process = init["name"]
        self._address, self._ttl_s = init["address"], init["ttl_s"]
        self._memory = Channel.from_fd(memory_fd)
        self._far = self._connect()
        self._heard = time.monotonic()
        self._watch(self._control, self._on_front)
        self._watch(self._memory, self._on_memory)
        self._watch(self._far, self._on_far)
        for late in self._control.buffered():
            self._take(late)
        while True:
            for key, _ in self._selector.select(1.0):
                key.data()
            self._keep_up()

    def _watch(self, channel: Channel | SecureSocket, ready: Callable[[], None]) -> None:
        self._selector.register(channel.fileno(), selectors.EVENT_READ, ready)

    def _connect(self) -> SecureSocket:
        """The connection, as soon as there is somebody; the front ends this if it takes too long.

        Raises:
            TransferDenied: There is no secret, or it is another one there.
        """
        secret = read_secret()
        if secret is None:
            raise TransferDenied("there is no secret to show to a decode worker on another host")
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                far = dial(self._address, secret, PURPOSE, timeout_s=_CONNECT_S, most=MOST_MESSAGE)
            except TransferBroken:
                if self._control.wait_readable(wait_s):
                    os._exit(0)  # nothing is said to one that is not up, but that it is to go
                wait_s = min(2 * wait_s, _MOST_WAIT_S)
            else:
                far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                far.sock.settimeout(_SEND_S)
                return far

    def _keep_up(self) -> None:
        """Says that this is there, and looks whether the other side is."""
        moment = time.monotonic()
        if moment - self._said > BEAT_S:
            self._said = moment
            self._far.send({"type": "beat"})
        if moment - self._heard > SILENCE_S:
            raise TransferBroken(
                "a decode worker on another host says nothing any more",
                where=self._address,
                expected=f"a word every {BEAT_S:g} s",
                got=f"none for {SILENCE_S:g} s",
            )

    # -- what is said ----------------------------------------------------------------------------

    def _on_front(self) -> None:
        messages, ended = self._control.receive_ready()
        for message in messages:
            self._take(message)
        if ended:
            os._exit(0)

    def _take(self, message: Message) -> None:
        match message.kind:
            case "handoff":
                self._offer(Handoff.from_wire(message.body["handoff"]))
            case "cancel":
                self._offered.pop(message.body["request"], None)
                self._far.send({"type": "cancel", "request": message.body["request"]})

    def _offer(self, handoff: Handoff) -> None:
        """Has the KV kept; the request goes on when there is a ticket."""
        job = handoff.job
        self._offered[job.request] = handoff
        self._memory.send(
            {
                "type": "offer",
                "request": job.request,
                "attempt": job.attempt,
                "written": blocks_of(handoff.kv_tokens),
                "kv_tokens": handoff.kv_tokens,
                "fingerprint": handoff.fingerprint,
                "kv_format": handoff.kv_format,
                "ttl_s": self._ttl_s,
            }
        )

    def _on_memory(self) -> None:
        messages, ended = self._memory.receive_ready()
        for message in messages:
            if message.kind == "offered":
                self._pass_on(message.body["request"], message.body["ticket"])
        if ended:
            raise MemoryServiceGone("the memory service is gone")

    def _pass_on(self, request: str, ticket: dict[str, Any] | None) -> None:
        handoff = self._offered.pop(request, None)
        if handoff is None:
            return  # it was cancelled meanwhile
        given = Given.of(handoff, None if ticket is None else self._told(Ticket.from_wire(ticket)))
        job = handoff.job.to_wire()
        self._far.send({"type": "handoff", "job": job, "kv": given.to_params()})

    def _told(self, ticket: Ticket) -> Ticket:
        """A ticket with the address by which this host is known over there."""
        host = str(self._far.sock.getsockname()[0])
        host = f"[{host}]" if ":" in host else host
        ways = tuple(
            replace(way, address=f"{host}{way.address}") if way.address.startswith(":") else way
            for way in ticket.ways
        )
        return replace(ticket, ways=ways)

    def _on_far(self) -> None:
        messages, ended = self._far.receive_ready()
        if messages:
            self._heard = time.monotonic()
        for body in messages:
            kind = body.get("type")
            if kind == "up" and not self._up:
                self._up = True
                self._control.send({"type": "up"})
            elif kind == "beat":
                self._control.send({"type": "beat"})
            elif kind in _PASSED_ON:
                self._control.send(body)
        if ended:
            raise TransferBroken(
                "the connection to a decode worker on another host ended", where=self._address
            )
