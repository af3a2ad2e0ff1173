"""The gateway's side of chat templates: it asks a process of its own to fill them in.

Whatever a template does, asking ends: with the text, or with an ApiError once the deadline has
passed. What a template was in the middle of then is killed, and the next one gets a new process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.wire import Channel
from coldframe.runtime.gateway.api import ApiError
from coldframe.snapshot.forking import Fork, Forker
from coldframe.snapshot.identity import Identity

__all__ = ["Renderer", "start_template_process"]

_MAIN = "from coldframe.runtime.gateway.template_process import main; main(3)"
# What an interpreter may need to start at all, and the zone of `strftime_now`.
_ENVIRONMENT = (
    "LD_LIBRARY_PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONPYCACHEPREFIX",
    "TZ",
)
_START_S = 10.0
_END_S = 5.0
_SEND_S = 2


class Renderer:
    """Fills in chat templates; may be used from several threads.

    A process without privileges may not be able to start an interpreter. So one that will give up
    its own calls `start` before it does (and before it confines itself: what it starts then can
    become nobody else), and `settle` when it knows whom it becomes.

    Args:
        deadline_s: How long one template may take, in seconds.
        memory_bytes: Address space of the process that it runs in.
        max_chars: The most characters that it may make.

    Where the process that is forked has died and this one may not start another, `elsewhere` is
    called, if somebody has set it: for a socket to one that somebody else has started.
    """

    def __init__(
        self,
        deadline_s: float = 2.0,
        memory_bytes: int = 512 << 20,
        max_chars: int = 8 << 20,
    ) -> None:
        self._deadline_s = deadline_s
        self._max_chars = max_chars
        self._limits = {
            "type": "limits",
            "memory_bytes": memory_bytes,
            "max_chars": max_chars,
        }
        self.elsewhere: Callable[[], Channel] | None = None
        self._identity: Identity | None = None
        self._lock = threading.Lock()
        """One template at a time: there is one process for them."""
        self._forks: _Forks | None = None
        self._fork: tuple[Channel, Fork] | None = None
        self._closed = False

    def start(self) -> None:
        """Starts the process that is forked, and returns at once: it imports behind this.

        Raises:
            PlatformError: It cannot be started.
        """
        with self._lock:
            self._forks = self._forks or _Forks()

    def settle(self, identity: Identity) -> None:
        """Says whose the processes are to be; without that they stay this process's user's.

        Args:
            identity: Whom they become as soon as they have their imports, without capabilities.

        Raises:
            PlatformError: The process cannot be started.
            ReplicaError: It is gone.
        """
        with self._lock:
            self._identity = identity
            self._forks = self._forks or _Forks()
            self._forks.settle(identity)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Fills in a template; blocks.

        Args:
            template: Jinja source.
            variables: JSON values by name: `messages`, `add_generation_prompt`, special tokens.

        Raises:
            ApiError: The template refuses these messages or fails (400), or there is no process to
                run it in (503).
        """
        return self._ask({"type": "render", "template": template, "variables": variables})

    def prepare(self, template: str) -> None:
        """Compiles a template, so that the first `render` of it need not; blocks.

        Raises:
            ApiError: As `render`.
        """
        self._ask({"type": "render", "template": template})

    def rest(self) -> None:
        """Gives back what the next template can have anew; blocks while one is filled in."""
        with self._lock:
            self._end_fork()

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._closed = True
        forks = self._forks
        if forks is not None:
            forks.hang_up()  # wakes who waits for a template
        with self._lock:
            self._end_fork()
            self._end_forks()

    def _ask(self, request: Mapping[str, Any]) -> str:
        with self._lock:
            answer = self._answer(request)
        kind = answer.get("type")
        if kind == "rendered":
            return str(answer.get("text", ""))
        if kind == "refused":
            raise _refusal(str(answer.get("why")))
        raise _refusal(f"The model's chat template fails: {answer.get('why')}")

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a process says; asked twice, for the first may have been killed by somebody else."""
        for _ in range(2):
            channel = self._running()
            message = None
            try:
                channel.send(request)
                message = channel.recv(self._deadline_s)
            except (TypeError, ValueError, RecursionError) as error:  # nothing has been sent
                raise _refusal(f"The messages are no JSON: {error}") from error
            except TimeoutError:
                self._end_fork()
                return _failed(f"it takes longer than {self._deadline_s:g} s")
            except ReplicaError:
                pass
            if message is not None and self._sound(message.body):
                return message.body
            self._end_fork()
        return _failed("it ends the process that it runs in")

    def _running(self) -> Channel:
        """The process that templates run in, started where there is none."""
        if self._closed:
            raise self._unavailable("the server is shutting down")
        if self._fork is None:
            try:
                self._fork = self._new_fork()
            except (ColdframeError, OSError) as error:
                self._end_forks()
                raise self._unavailable("it cannot be started") from error
        return self._fork[0]

    def _new_fork(self) -> tuple[Channel, Fork]:
        if self._forks is not None:
            try:
                return self._forks.fork(self._identity, self._limits)
            except ReplicaError:  # somebody has killed it
                self._end_forks()
        try:
            self._forks = _Forks()
            return self._forks.fork(self._identity, self._limits)
        except (ColdframeError, OSError):
            if self.elsewhere is None:
                raise
        self._end_forks()
        self._forks = _Forks(self.elsewhere())
        return self._forks.fork(self._identity, self._limits)

    def _sound(self, answer: Mapping[str, Any]) -> bool:
        """Whether a fork, which may no longer be what it was, says what it may."""
        said = [answer.get(name, "") for name in ("text", "why")]
        return all(isinstance(text, str) and len(text) <= self._max_chars for text in said)

    def _end_fork(self) -> None:
        if self._fork is not None:
            channel, fork = self._fork
            self._fork = None
            channel.close()
            fork.kill()

    def _end_forks(self) -> None:
        if self._forks is not None:
            self._forks.close()
            self._forks = None

    @staticmethod
    def _unavailable(why: str) -> ApiError:
        return ApiError(
            503,
            f"There is no process to run the chat template in: {why}.",
            kind="server_error",
            code="replica_error",
        )


def start_template_process() -> tuple[Channel, Child]:
    """Starts a process that is forked for templates: a socket to it, with whose end it ends.

    Raises:
        PlatformError: It cannot be started.
    """
    ours, theirs = Channel.pair()
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        child = spawn_python(_MAIN, [], theirs.fileno(), environment, site_packages=False)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours, child


class _Forks:
    """The process that is forked, as it is seen here.

    Args:
        control: A socket to it, where somebody else has started it and reaps it.

    Raises:
        PlatformError: It cannot be started.
    """

    def __init__(self, control: Channel | None = None) -> None:
        self._child: Child | None = None
        if control is None:
            control, self._child = start_template_process()
        self._control = control
        self._told = False
        self._forker: Forker | None = None

    def settle(self, identity: Identity | None) -> None:
        """Says whom it is to become, once; None for its own user."""
        if not self._told:
            self._told = True
            wire = None if identity is None else identity.to_wire()
            self._control.send({"type": "settle", "identity": wire})

    def fork(self, identity: Identity | None, limits: Mapping[str, Any]) -> tuple[Channel, Fork]:
        """A new process for templates.

        Args:
            identity: Whom it becomes, where that has not been said yet.
            limits: The first message to it.

        Raises:
            ColdframeError: It cannot be had.
        """
        if self._forker is None:
            self.settle(identity)
            self._settled()
            self._forker = Forker(self._control)
        ours, theirs = Channel.pair()
        try:
            fork = self._forker.fork(theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            ours.send(limits)
        except BaseException:
            ours.close()
            fork.kill()
            raise
        ours.set_send_timeout(_SEND_S)
        return ours, fork

    def _settled(self) -> None:
        """Waits until it has its imports and is whom it is to be."""
        try:
            message = self._control.recv(_START_S)
        except TimeoutError:
            message = None
        if message is None:
            raise ReplicaError("the process for chat templates does not come up")
        if "failed" in message.body:
            raise ColdframeError.from_wire(message.body["failed"])

    def hang_up(self) -> None:
        """Has it end, and its forks with it."""
        self._control.hang_up()

    def close(self) -> None:
        """Ends it."""
        self._control.close()
        if self._child is None:
            return
        deadline = time.monotonic() + _END_S
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        self._child.kill()


def _failed(why: str) -> dict[str, Any]:
    return {"type": "failed", "why": why}


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="chat_template")
