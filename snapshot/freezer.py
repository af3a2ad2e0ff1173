"""The process that freezes a worker and puts its image into a store: started bare, privileged.

The worker is started in a PID namespace of its own, with a number that no PID 1 or CRIU of a later
restore will have, and from an allow-listed environment: all of what it holds is in the image. When
it says that it is `frozen`, CRIU writes it to memory, and from there it goes into the store. It is
published when whoever asked for it has seen a clone of it answer.

Messages in:  `freeze`, then `publish`.
Messages out: `staged` (the manifest), `published`, or `failed`; with each, `spans`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, NoReturn

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError, SnapshotError
from coldframe.loader.process import spawn_python
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.init import start_init
from coldframe.snapshot.libraries import mapped_files
from coldframe.snapshot.linux import die_with_parent, mount_tmpfs, own_mounts, set_last_pid
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Arena, Draft, Manifest, Process
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.restoring import run
from coldframe.snapshot.signing import read_key
from coldframe.snapshot.store import open_store

__all__ = ["ALLOWED", "WARM_S", "freeze", "freezing_environment", "main"]

ALLOWED = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
)
"""What a worker that is to be frozen gets of its creator's environment: what it needs to find
programs and libraries, and nothing that could be a secret."""

_FIRST_PID = 1000
WARM_S = 120.0
"""How long a worker may take to be warm, in seconds."""


def freezing_environment(threads: int) -> dict[str, str]:
    """The environment of a worker that is to be frozen.

    Args:
        threads: Of its kernels while they are warmed; a clone sets its own.
    """
    kept = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's would start its threads when it is imported
        "MKL_NUM_THREADS": str(threads),
        # Read once, at the first parallel region: clones wait as the frozen one did.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def freeze(
    criu: Criu,
    code: str,
    order: dict[str, Any],
    environment: dict[str, str],
    images: str,
    *,
    user: bool,
    warm_s: float = WARM_S,
) -> dict[str, Any]:
    """Starts a worker, waits until it is warm, and writes it to files.

    Args:
        criu: The program.
        code: The line of Python that the worker runs; its control socket is descriptor 3.
        order: The message that it gets.
        environment: All that it sees of this process's.
        images: An empty directory.
        user: Whether this is in a user namespace.
        warm_s: How long the worker may take to be warm, in seconds.

    Returns:
        What the worker said at its freeze point, and `pid`, `control_inode` and `libraries` of it.

    Raises:
        SnapshotError: The worker could not be warmed, or CRIU could not write it.
    """

    def body(channel: Channel) -> NoReturn:
        _freeze_here(criu, code, order, environment, images, channel, user, warm_s)

    init = start_init(body)
    said = None
    try:
        while (message := init.channel.recv()) is not None:
            if message.kind == "failed":
                raise ColdframeError.from_wire(message.body["error"])
            said = message.body
    finally:
        init.kill()
    if said is None:
        raise SnapshotError("the worker could not be frozen", got="its process ended")
    return said


def _freeze_here(
    criu: Criu,
    code: str,
    order: dict[str, Any],
    environment: dict[str, str],
    images: str,
    channel: Channel,
    user: bool,
    warm_s: float,
) -> NoReturn:
    """As PID 1 of the namespace: the worker, and CRIU beside it. Does not come back."""
    ours, theirs = Channel.pair()
    inode = os.fstat(theirs.fileno()).st_ino
    # What this process keeps for later it must not hand down: the worker, and every clone of it,
    # would never hear of a signal.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    set_last_pid(_FIRST_PID - 1)
    child = spawn_python(code, [], theirs.fileno(), environment, session=True)
    theirs.close()
    with contextlib.suppress(ReplicaError):  # it has died already, as is found now
        ours.send(order)
    try:
        message = ours.recv(warm_s)
    except TimeoutError:
        raise SnapshotError(
            "the worker was not warm in time", expected=f"within {warm_s:g} s"
        ) from None
    if message is None:
        raise SnapshotError(
            "the worker died before it was warm",
            got=f"exit status {child.wait()}",
            hint="What it said is on standard error.",
        )
    if message.kind != "frozen":
        raise ColdframeError.from_wire(message.body["error"])
    libraries = mapped_files(child.pid)
    command = criu.dump_command(child.pid, images, "dump.log", inode, user=user)
    run(command, os.path.join(images, "dump.log"), "CRIU cannot write the image")
    os.unlink(os.path.join(images, "dump.log"))
    state = {"pid": child.pid, "control_inode": inode, "libraries": libraries}
    channel.send({**message.body, **state})
    os._exit(0)


class Freezer:
    """Serves one request to freeze; see the module.

    Args:
        channel: The socket to whoever asks.
        recorder: Gets the spans `snapshot_freeze` and `snapshot_store`.
    """

    def __init__(self, channel: Channel, recorder: Recorder) -> None:
        self._channel = channel
        self._recorder = recorder

    def run(self) -> None:
        message = self._channel.recv()
        if message is None:
            return
        try:
            manifest = self._freeze(message.body)
        except ColdframeError as error:
            self._say({"type": "failed", "error": error.to_wire()})
        else:
            self._say({"type": "published", "id": manifest.id, "manifest": manifest.to_json()})
        self._channel.recv()  # until whoever asks has read that

    def _freeze(self, wanted: dict[str, Any]) -> Manifest:
        criu = Criu.find()
        key_file = wanted["key_file"]
        store = open_store(wanted["store"], key=None if key_file is None else read_key(key_file))
        store.check_writable()  # before anybody has warmed up for nothing
        user = own_mounts()
        criu.check(user=user)
        started = now()
        images = os.path.join(wanted["work"], "image")
        try:
            os.makedirs(images, 0o700, exist_ok=True)
        except OSError as error:
            raise PlatformError("no room for an image", where=images, got=error.strerror) from error
        mount_tmpfs(images)
        said = freeze(
            criu, wanted["code"], wanted["order"], wanted["environment"], images, user=user
        )
        self._recorder.add("snapshot_freeze", started)
        started = now()
        draft = Draft(
            wanted["name"],
            ModelKey.from_json(wanted["model"]),
            Machine.here(libraries=said["libraries"]),
            Arena.from_json(wanted["arena"]),
            Process(said["pid"], said["control_inode"], criu.version, user),
            said.get("decode_steps", ""),
        )
        manifest = store.put(images, draft, compress=wanted["compress"], finish=self._prove)
        self._recorder.add("snapshot_store", started)
        return manifest

    def _prove(self, manifest: Manifest) -> Manifest:
        """Has whoever asked try a clone, before anybody else can."""
        self._say({"type": "staged", "id": manifest.id, "manifest": manifest.to_json()})
        message = self._channel.recv()
        if message is None or message.kind != "publish":
            raise SnapshotError("the image was given up before it was published")
        return manifest.with_oracle(message.body["oracle"])

    def _say(self, body: dict[str, Any]) -> None:
        spans = [span.to_wire() for span in self._recorder.drain()]
        self._channel.send({**body, "spans": spans})


def main(control_fd: int, spawned_ns: int, first_ns: int) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited socket to whoever asks.
        spawned_ns: When it started this process (CLOCK_MONOTONIC).
        first_ns: When its first line of Python ran.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    recorder = Recorder("freezer")
    recorder.add("interpreter", spawned_ns, first_ns)
    with contextlib.suppress(ReplicaError):  # who asked is gone
        Freezer(Channel.from_fd(control_fd), recorder).run()
