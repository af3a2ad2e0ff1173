"""The process that freezes a worker and puts its image into a store: started bare, privileged.

The worker is started in a PID namespace of its own, with a number that no PID 1 or CRIU of a later
restore will have, and from an allow-listed environment: all of what it holds is in the image. When
it says that it is `frozen`, CRIU writes it to memory, and from there it goes into the store. It is
published when whoever asked for it has seen a clone of it answer.

A worker on a GPU has a context, which the driver has to write to the worker's own memory first.
That takes a process with a context of its own, so whoever asked is asked to have it done. Such a
worker also needs a connection to the memory service: the one that comes with `freeze`.

Messages in:  `freeze`, `checkpointed`, then `publish`.
Messages out: `checkpoint` (of which PID, and what that has of the GPU), `staged` (the manifest),
`published`, or `failed`; with each, `spans`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError, SnapshotError
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.dumping import freeze
from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.gpu_image import GpuImage
from coldframe.snapshot.gpus import FOLDER
from coldframe.snapshot.linux import die_with_parent, mount_tmpfs, own_mounts
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Arena, Draft, Manifest, Process
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.signing import read_key
from coldframe.snapshot.store import open_store

__all__ = ["ALLOWED", "freezing_environment", "main"]

ALLOWED = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
)
"""What a worker that is to be frozen gets of its creator's environment: what it needs to find
programs and libraries, and nothing that could be a secret."""

_OF_GPUS = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING")
"""What else, of a worker on a GPU: without it the first GPU may be another one there."""


_ON_GPUS = {
    # As workers that start fresh have it (`runtime/replica/launch.py`): torch reads these but once.
    "TORCH_DISABLE_NATIVE_JIT": "1",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
}


def freezing_environment(threads: int, device: str = "cpu") -> dict[str, str]:
    """The environment of a worker that is to be frozen.

    Args:
        threads: Of its kernels while they are warmed; a clone sets its own.
        device: What it computes on.
    """
    names, more = (ALLOWED, {}) if device == "cpu" else ((*ALLOWED, *_OF_GPUS), _ON_GPUS)
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {
        **kept,
        **more,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's would start its threads when it is imported
        "MKL_NUM_THREADS": str(threads),
        # Read once, at the first parallel region: clones wait as the frozen one did.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


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
            manifest = self._freeze(message.body, message.fds)
        except ColdframeError as error:
            self._say({"type": "failed", "error": error.to_wire()})
        else:
            self._say({"type": "published", "id": manifest.id, "manifest": manifest.to_json()})
        self._channel.recv()  # until whoever asks has read that

    def _freeze(self, wanted: dict[str, Any], fds: tuple[int, ...]) -> Manifest:
        criu = Criu.find()
        key_file = wanted["key_file"]
        store = open_store(wanted["store"], key=None if key_file is None else read_key(key_file))
        store.check_writable()  # before anybody has warmed up for nothing
        engine = wanted.get("engine")
        key = None if engine is None else EngineKey.here(engine)
        user = own_mounts()
        criu.check(user=user)
        machine = Machine.here(device=wanted["device"])
        if machine.device != "cpu" and machine.driver is None:
            raise SnapshotError(
                "it cannot be seen which driver this machine's GPUs have",
                where=FOLDER,
                expected="/proc/driver/nvidia/version",
                got="nothing of the kind",
                hint="No image could be held against that later; workers start fresh.",
            )
        started = now()
        images = os.path.join(wanted["work"], "image")
        try:
            os.makedirs(images, 0o700, exist_ok=True)
        except OSError as error:
            raise PlatformError("no room for an image", where=images, got=error.strerror) from error
        mount_tmpfs(images)
        try:
            said = freeze(
                *(criu, wanted["code"], wanted["order"], wanted["environment"], images),
                user=user,
                fds=fds,
                checkpoint=self._checkpoint,
            )
        finally:
            for fd in fds:
                os.close(fd)
        self._recorder.add("snapshot_freeze", started)
        started = now()
        draft = Draft(
            wanted["name"],
            ModelKey.from_json(wanted["model"]),
            Machine.here(device=machine.device, libraries=said["libraries"]),
            Arena.from_json(wanted["arena"]),
            Process(said["pid"], said["control_inode"], criu.version, user),
            said.get("decode_steps", ""),
            _on_gpu(said),
            key,
        )
        manifest = store.put(images, draft, compress=wanted["compress"], finish=self._prove)
        self._recorder.add("snapshot_store", started)
        return manifest

    def _checkpoint(self, pid: int, own_bytes: int) -> dict[str, Any]:
        """Asks whoever asked for the image."""
        self._say({"type": "checkpoint", "pid": pid, "own_bytes": own_bytes})
        message = self._channel.recv()
        if message is None or message.kind != "checkpointed":
            raise SnapshotError("the image was given up before its context was checkpointed")
        if message.body["error"] is not None:
            raise ColdframeError.from_wire(message.body["error"])
        return message.body

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


def _on_gpu(said: dict[str, Any]) -> GpuImage | None:
    """What a worker and those who checkpointed it have said, for the manifest."""
    if said.get("gpu") is None:
        return None
    done = said["checkpointed"]
    gpus = [[uuid, name] for uuid, name in done["uuids"].items()]
    return GpuImage.from_json({**said["gpu"], "gpus": gpus, "context_bytes": done["bytes"]})


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
