"""Whether CRIU runs on a machine, and takes a process along whose context is in host memory.

It is called as for a worker: the process has reserved as many addresses, which a dump has to look
through; it is dumped in a PID namespace of its own and made again in another one, and what knows of
GPUs is the helper alone, which is outside (see `questions`).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.checkpoint_questions import able, thawed
from coldframe.benchmarks.gpu.questions import up
from coldframe.benchmarks.gpu.targets import CODE, heard, order
from coldframe.loader.devices.checkpoint_calls import CheckpointCalls
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.dumping import Checkpoint, freeze
from coldframe.snapshot.init import Init
from coldframe.snapshot.left_open import left_open
from coldframe.snapshot.linux import detach_mounts, mount_tmpfs, own_mounts
from coldframe.snapshot.manifest import Process
from coldframe.snapshot.restoring import restore

__all__ = ["criu", "criu_context", "criu_graph", "criu_plain", "criu_private"]

_LOCK_S = 5.0
_MADE_S = 30.0


def criu(_: int) -> dict[str, str]:
    """Which one there is, and what it says of this kernel.

    Raises:
        SnapshotError: There is none.
    """
    found = Criu.find()
    user = own_mounts()
    found.check(user=user)
    where = "in a user namespace" if user else "with this process's own privileges"
    return {"program": found.path, "version": found.version, "check": f"looks good, {where}"}


def criu_plain(ordinal: int) -> dict[str, Any]:
    """Without a GPU in it: what goes wrong here has nothing to do with one."""
    return _made_again("plain", ordinal)


def criu_private(ordinal: int) -> dict[str, Any]:
    """With a context, and some memory of the GPU that is its own."""
    return _made_again("private", ordinal)


def criu_context(ordinal: int) -> dict[str, Any]:
    return _made_again("torch", ordinal)


def criu_graph(ordinal: int) -> dict[str, Any]:
    return _made_again("graph", ordinal)


def _made_again(kind: str, ordinal: int) -> dict[str, Any]:
    """Dumps a process and makes it again.

    Raises:
        ColdframeError: It cannot be dumped, or made again.
    """
    program = Criu.find()
    found: dict[str, Any] = {}
    calls: CheckpointCalls | None = None
    checkpoint: Checkpoint | None = None
    if kind != "plain":
        context = up(ordinal)
        calls = able(context.driver)

        def taken_off(pid: int, _: int) -> dict[str, Any]:
            assert calls is not None
            started = time.perf_counter()
            calls.lock(pid, _LOCK_S)
            calls.checkpoint(pid)
            found["checkpoint"] = _seconds(started)
            found["left open of /dev/nvidia*"] = ", ".join(left_open(pid)) or "nothing"
            return {}

        checkpoint = taken_off
    user = own_mounts()
    folder = tempfile.mkdtemp()
    mount_tmpfs(folder)
    try:
        _there_and_back(found, program, kind, ordinal, folder, user, checkpoint, calls)
    finally:
        detach_mounts(folder)
        os.rmdir(folder)
    return found


def _there_and_back(
    found: dict[str, Any],
    program: Criu,
    kind: str,
    ordinal: int,
    folder: str,
    user: bool,
    checkpoint: Checkpoint | None,
    calls: CheckpointCalls | None,
) -> None:
    images, work = Path(folder, "image"), Path(folder, "work")
    images.mkdir()
    work.mkdir()
    started = time.perf_counter()
    said = freeze(
        *(
            program,
            CODE,
            order(kind, ordinal, roomy=kind != "plain"),
            dict(os.environ),
            str(images),
        ),
        user=user,
        checkpoint=checkpoint,
    )
    found["before"] = said["told"]
    found["started, frozen and dumped"] = _seconds(started)
    found["image"] = f"{sum(file.stat().st_size for file in images.iterdir()) / 1e6:.0f} MB"
    ours, theirs = Channel.pair()
    process = Process(said["pid"], said["control_inode"], program.version, user)
    started = time.perf_counter()
    init = restore(program, process, str(images), str(work), theirs.fileno(), user=user)
    theirs.close()
    try:
        pid = _made(init)
        found["made again by CRIU"] = _seconds(started)
        if calls is None or thawed(found, calls, pid):
            ours.send({"type": "go"})
            found["behind it"] = heard(ours)
    finally:
        init.kill()
        ours.close()


def _made(init: Init) -> int:
    """Waits until a process is made again: its PID, here.

    Raises:
        RuntimeError: It is not.
    """
    message = init.channel.recv(_MADE_S)
    if message is None or message.kind != "started":
        raise RuntimeError("nothing" if message is None else message.body["error"]["what"])
    pid = init.inside()
    if pid is None:
        raise RuntimeError("it was made again, and has ended")
    return pid


def _seconds(started: float) -> str:
    return f"{time.perf_counter() - started:.3f} s"
