"""Requests that other replicas' fronts pass on, to be decoded here: the other end of `remote`.

A listener on the front's loop. Whoever comes has to know the secret; from there on one connection
is one replica, whose requests are this one's like any other, and end with it. What is said on it
stands in `remote`. Beside tokens, that this is there goes out every few seconds, and who says
nothing for as long as that is looked at is given up.

A request that fails of itself is said to have failed. Where all fail since what serves them is
lost, the connections end: over there they go on elsewhere, as behind a machine that is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError, TransferError
from coldframe.loader.peers.listener import listen
from coldframe.loader.transport.base import parse_address
from coldframe.loader.transport.handshake import welcome
from coldframe.loader.transport.secret import read_secret
from coldframe.loader.transport.secure import SecureSocket
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.transport.base import Given
from coldframe.runtime.transport.remote import BEAT_S, MOST_MESSAGE, PURPOSE, SILENCE_S
from coldframe.runtime.worker.handoff import Job

__all__ = ["Takeover", "open_listener"]

_MOST_CONNECTIONS = 64
_SEND_S = 2.0


def open_listener(address: str) -> tuple[socket.socket, bytes]:
    """A listening socket, and what those who come there have to know.

    Raises:
        PlatformError: There is no secret, or the address cannot be listened at.
        TransferDenied: The secret is none.
    """
    place, secret = parse_address(address), read_secret()
    if place is None:
        raise PlatformError(
            "this is no address to listen at", where="--listen", got=address, expected="HOST:PORT"
        )
    if secret is None:
        raise PlatformError(
            "requests are taken from nobody who does not know a secret, and there is none",
            where="--listen",
            expected="COLDFRAME_KV_SECRET_FILE",
            hint="Make one with `openssl rand -hex 32`, the same on all hosts.",
        )
    try:
        return listen(*place), secret
    except PlatformError as error:
        raise PlatformError(
            "decode workers cannot be reached at this address",
            where=address,
            got=error.got,
            hint=error.hint,
        ) from None


class Takeover:
    """Answers other replicas' fronts, from when it is made.

    Args:
        listener: A listening socket; closed with this.
        secret: That they must know.
        model: Decodes.
        log: Gets who comes and goes.
    """

    def __init__(self, listener: socket.socket, secret: bytes, model: Supervisor, log: Log) -> None:
        self._listener = listener
        self._secret = secret
        self._model = model
        self._log = log
        self._fronts: dict[int, _Front] = {}
        self._came: deque[SecureSocket] = deque()
        self._greeting = 0
        self._leaving = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        listener.setblocking(False)
        model.loop.watch(listener.fileno(), self._accept)
        model.loop.watch(self._wake, self._woken)
        host, port, *_ = listener.getsockname()
        log.info("takes requests over", address=f"{host} port {port}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where it listens."""
        host, port, *_ = self._listener.getsockname()
        return host, port

    @property
    def idle(self) -> bool:
        """Whether none of their requests is open."""
        return all(front.idle for front in self._fronts.values())

    def drain(self) -> None:
        """Takes no more requests; those that are open get their answers."""
        if self._leaving:
            return
        self._leaving = True
        self._model.loop.unwatch(self._listener.fileno())
        self._listener.close()
        for front in list(self._fronts.values()):
            front.say({"type": "leaving"})

    def close(self) -> None:
        """Ends all connections."""
        self.drain()
        for front in list(self._fronts.values()):
            self._end(front, None)
        self._model.loop.unwatch(self._wake)
        os.close(self._wake)

    def step(self) -> None:
        """Beats, and looks who is there; to be called at least once a second."""
        for front in list(self._fronts.values()):
            front.step(up=self._model.state == "warm")
            if front.broken is not None:
                self._end(front, front.broken)

    def wake(self) -> None:
        """There is something to send."""
        os.eventfd_write(self._wake, 1)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it went again, or there are no descriptors at the moment
            return
        if self._greeting + len(self._fronts) >= _MOST_CONNECTIONS:
            sock.close()
            return
        self._greeting += 1
        threading.Thread(target=self._greet, args=(sock,), name="takeover", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        """Beside the loop: a stranger may take its time."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            front = welcome(sock, self._secret, PURPOSE, most=MOST_MESSAGE)
            sock.settimeout(_SEND_S)
            self._came.append(front)
        except (TransferError, OSError):
            sock.close()
        finally:
            self._greeting -= 1
            with contextlib.suppress(OSError):  # all is over meanwhile
                os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._came:
            self._add(self._came.popleft())
        for front in list(self._fronts.values()):
            front.flush()
            if front.broken is not None:
                self._end(front, front.broken)

    def _add(self, channel: SecureSocket) -> None:
        if self._leaving:
            channel.close()
            return
        front = _Front(channel, self._model, self)
        self._fronts[channel.fileno()] = front
        self._model.loop.watch(channel.fileno(), lambda: self._receive(front))
        self._log.info("a replica came", address=front.where)
        # It starts, too, or somebody has asked it: its first token is about to come.
        self._model.wake()
        front.step(up=self._model.state == "warm")

    def _receive(self, front: _Front) -> None:
        messages, ended = front.channel.receive_ready()
        try:
            for body in messages:
                front.take(body)
        except Exception as error:  # noqa: BLE001 - who talks nonsense harms only itself
            self._end(front, f"it cannot be understood: {error!r}")
            return
        if ended:
            self._end(front, "it is gone")

    def _end(self, front: _Front, why: str | None) -> None:
        if self._fronts.pop(front.fd, None) is None:
            return
        self._model.loop.unwatch(front.fd)
        front.close()
        if why is not None:
            self._log.info("a replica went", address=front.where, why=why)


class _Front:
    """One replica's front: its requests by its names for them."""

    def __init__(self, channel: SecureSocket, model: Supervisor, owner: Takeover) -> None:
        self.channel = channel
        self.fd = channel.fileno()
        host, port, *_ = channel.sock.getpeername()
        self.where = f"{host} port {port}"
        self.broken: str | None = None
        self._model = model
        self._owner = owner
        self._names: dict[str, tuple[int, str]] = {}
        """The attempt at each request, and its name here."""
        self._tokens: list[list[Any]] = []
        self._clock = AwakeClock()
        self._heard = self._clock()
        self._said = time.monotonic()
        self._up = False

    @property
    def idle(self) -> bool:
        return not self._names and not self._tokens

    def take(self, body: dict[str, Any]) -> None:
        """A message.

        Raises:
            Exception: It is none.
        """
        self._heard = self._clock()
        match body.get("type"):
            case "handoff":
                self._begin(Job.from_wire(body["job"]), body["kv"])
            case "cancel":
                known = self._names.pop(str(body["request"]), None)
                if known is not None:
                    self._model.cancel(known[1])
            case "beat":
                pass
            case other:
                raise ReplicaError("unknown message", got=other)

    def _begin(self, job: Job, kv: dict[str, Any]) -> None:
        self.say({"type": "ack", "request": job.request, "attempt": job.attempt})
        listener = _Listener(self, job.request, job.attempt)
        try:
            given = Given.from_params(kv)
            if given is not None:
                given.handoff(job)  # looked at here, where who sent it can be told
            name = self._model.submit(
                job.params,
                listener,
                prompt_ids=job.prompt_ids,
                generated_ids=job.generated_ids,
                kv=given,
            )
        except ColdframeError as error:
            self.failed(job.request, job.attempt, error)
            return
        self._names[job.request] = (job.attempt, name)

    def token(self, request: str, attempt: int, event: TokenEvent) -> None:
        """A token of one of its requests; as `Emission.to_wire` has it."""
        if self._names.get(request, (None,))[0] != attempt:
            return
        if event.finish is not None:
            del self._names[request]
        self._tokens.append(
            [
                *(request, attempt, event.index, event.token, event.text, event.finish),
                *(event.logprob, [list(pair) for pair in event.top], event.prompt_tokens),
                [spelling.decode("latin-1") for spelling in event.spellings],
                event.cached_tokens,
            ]
        )
        if len(self._tokens) == 1:
            self._owner.wake()  # all of a step go together

    def failed(self, request: str, attempt: int, error: ColdframeError) -> None:
        """One of its requests has failed, or what serves all of them is lost."""
        self._names.pop(request, None)
        self.flush()
        if self._model.is_lost_to(error):
            self._break(f"its requests cannot go on here: {error}")
            return
        body = {"type": "failed", "request": request, "attempt": attempt}
        self.say({**body, "error": error.to_wire()})

    def flush(self) -> None:
        """Sends the tokens that there are."""
        tokens, self._tokens = self._tokens, []
        if tokens:
            self.say({"type": "tokens", "items": tokens})

    def say(self, body: dict[str, Any]) -> None:
        if self.broken is not None:
            return
        self._said = time.monotonic()
        try:
            self.channel.send(body)
        except TransferError as error:
            self._break(str(error))

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = why
            self._owner.wake()  # it is ended when nobody is in the middle of something

    def step(self, *, up: bool) -> None:
        """See `Takeover.step`.

        Args:
            up: Whether what comes would be decoded at once.
        """
        if up and not self._up:
            self._up = True
            self.say({"type": "up"})
        if time.monotonic() - self._said > BEAT_S:
            self.say({"type": "beat"})
        if self._clock() - self._heard > SILENCE_S:
            self.broken = self.broken or "it says nothing any more"

    def close(self) -> None:
        """Ends the connection, and what it has asked for."""
        names, self._names = self._names, {}
        for _, name in names.values():
            self._model.cancel(name)
        self.channel.close()


class _Listener:
    """Who asked, over there."""

    __slots__ = ("_attempt", "_front", "_request")

    def __init__(self, front: _Front, request: str, attempt: int) -> None:
        self._front = front
        self._request = request
        self._attempt = attempt

    def on_token(self, event: TokenEvent) -> None:
        self._front.token(self._request, self._attempt, event)

    def on_error(self, error: ColdframeError) -> None:
        self._front.failed(self._request, self._attempt, error)
