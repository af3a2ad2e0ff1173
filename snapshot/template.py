"""A resident template: one warm process that is forked for each worker that a front asks for.

It is for machines that forbid CRIU and let a process stay. Two processes stay: the one that is
forked, warm at the freeze point, without a device's context and with one thread; and this one,
which keeps it, listens on a socket in a private directory, and serves each front that comes as the
restorer does (`service`). Forks live in the template's own container, not in the front's.

A template is of this user alone, and ends when it is told to, or when either of its processes
dies. Its clones end with it, and each front's end with that front.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Any, NoReturn

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel
from coldframe.snapshot.fields import Refusal
from coldframe.snapshot.forking import Fork, Forker
from coldframe.snapshot.libraries import Library, mapped_files
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.service import CloneService
from coldframe.snapshot.template_socket import TemplateSocket, peer_uid

__all__ = ["ForkSource", "Template"]

_WARM_S = 120.0
_END_S = 5.0
_PAUSE_S = 0.1
# What the shell has left open here is nothing that a clone may have.
_ALONE = "import os; os.closerange(4, 1 << 16); "


class ForkSource:
    """Makes clones by forks (see `service.Source`).

    Args:
        name: The MODEL that the template was made for, as it was written.
        model: What that is.
        machine: What the template runs on and with.
        forker: Asks it for forks.
        recorder: Gets the span `snapshot_check`.
        template: Its id.
    """

    def __init__(
        self,
        name: str,
        model: ModelKey,
        machine: Machine,
        forker: Forker,
        recorder: Recorder,
        template: str,
    ) -> None:
        self._name = name
        self._model = model
        self._machine = machine
        self._forker = forker
        self._recorder = recorder
        self._template = template

    def prepare(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Sees whether the template fits.

        Args:
            wanted: As the restorer takes it. What is said of stores and of keys is about images,
                which others may write; who may be a template, the sockets' owners say.

        Raises:
            ColdframeError: It does not fit, or the model cannot be read.
        """
        started = now()
        refusal = self._refusal(wanted)
        self._recorder.add("snapshot_check", started, note=self._template)
        if refusal is not None:
            raise SnapshotError(
                "the template does not fit",
                where=refusal.field,
                expected=refusal.expected,
                got=refusal.got,
                hint="Start another one with `coldframe snapshot template`.",
            )
        return {
            "id": self._template,
            "manifest": {"name": self._name, "model": self._model.to_json(), "oracle": None},
        }

    def clone(self, name: str, control_fd: int) -> Fork:
        return self._forker.fork(control_fd)

    def gone(self, name: str) -> None:
        """Nothing is kept for a clone."""

    def rest(self) -> None:
        """Nothing is kept ready but the template itself."""

    def _refusal(self, wanted: dict[str, Any]) -> Refusal | None:
        if wanted["manifest"] is not None:
            return Refusal("image", self._template, "another one is wanted")
        directory = wanted["directory"]
        if directory is not None:
            refusal = self._model.refusal(ModelKey.of(directory))
        elif wanted["name"] != self._name:
            refusal = Refusal("name", self._name, wanted["name"])
        else:
            refusal = None
        # What is installed now is what a fresh worker would run, and the front runs.
        return refusal or self._machine.refusal(Machine.here())


class Template:
    """Starts a process to be forked, keeps it, and serves it to fronts.

    Args:
        name: The MODEL, as it was written.
        model: What it is.
        code: The line of Python that the process runs. Its control socket is descriptor 3, and it
            waits at its freeze point in `fork_on_demand`.
        order: The message that it gets.
        environment: All that it sees of this process's.

    Attributes:
        id: What clones are said to be made of.
        pid: The process that is forked.

    Raises:
        SnapshotError: It could not be warmed.
        PlatformError: It or the socket cannot be made. Nothing is left in either case.
    """

    def __init__(
        self,
        name: str,
        model: ModelKey,
        code: str,
        order: dict[str, Any],
        environment: dict[str, str],
    ) -> None:
        self._name = name
        self._model = model
        # Before anything is imported there: what is exchanged from now on does not fit.
        machine = Machine.here()
        self._fronts: dict[threading.Thread, Channel] = {}
        self._socket: TemplateSocket | None = None
        self._control, theirs = Channel.pair()
        try:
            self._child: Child = spawn_python(_ALONE + code, [], theirs.fileno(), environment)
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid = self._child.pid
        self.id = f"template-{self.pid}"
        try:
            self._control.send(order)
            self._await_warmth()
            libraries = Library.all_of(mapped_files(self.pid))
            self._machine = machine._replace(libraries=libraries)
            self._forker = Forker(self._control)
            self._socket = TemplateSocket.open(model)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """The socket where fronts are served."""
        assert self._socket is not None
        return self._socket.path

    def serve(self) -> NoReturn:
        """Serves fronts, each in a thread, until the process that is forked is gone.

        Raises:
            ColdframeError: It is gone.
        """
        assert self._socket is not None
        poll = select.poll()
        for fd in (self._control.fileno(), self._socket.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._control.fileno() in ready:
                raise self._death()
            try:
                self._admit(self._socket.accept())
            except (OSError, RuntimeError):  # no descriptor or no thread is left for it just now
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Ends it and all its clones."""
        if self._socket is not None:
            self._socket.close()
        for channel in list(self._fronts.values()):
            channel.hang_up()
        for thread in list(self._fronts):
            thread.join(_END_S)
        self._control.close()
        self._wait()

    def _wait(self) -> int:
        """Its exit code; it ends with its control socket, or else now."""
        deadline = time.monotonic() + _END_S
        while self._child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self._child.kill()

    def _await_warmth(self) -> None:
        try:
            message = self._control.recv(_WARM_S)
        except TimeoutError:
            raise SnapshotError(
                "the template was not warm in time", expected=f"within {_WARM_S:g} s"
            ) from None
        if message is None:
            raise self._death()
        if message.kind != "frozen":
            raise ColdframeError.from_wire(message.body["error"])

    def _death(self) -> ColdframeError:
        """Why there is an end of the control socket."""
        message = self._control.recv(_END_S)
        if message is not None:
            return ColdframeError.from_wire(message.body["error"])
        return SnapshotError(
            "the template's process is gone",
            got=f"exit status {self._wait()}",
            hint="Start it again.",
        )

    def _admit(self, connection: socket.socket) -> None:
        if peer_uid(connection) != os.getuid():
            connection.close()
            return
        channel = Channel(connection)
        thread = threading.Thread(target=self._serve_front, args=(channel,), daemon=True)
        self._fronts[thread] = channel
        try:
            thread.start()
        except RuntimeError:
            del self._fronts[thread]
            channel.close()
            raise

    def _serve_front(self, channel: Channel) -> None:
        recorder = Recorder("snapshot")
        source = ForkSource(self._name, self._model, self._machine, self._forker, recorder, self.id)
        try:
            CloneService(channel, source, recorder).run()
        finally:
            channel.close()
            del self._fronts[threading.current_thread()]
