"""One restore, timed, and what stands beside it: fresh processes, and plain reads of an image.

The parts are those of a real start: a process that restores is asked for a clone, and the clone
says itself when its first instruction ran.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.process import spawn_python
from coldframe.loader.sources.direct import open_direct
from coldframe.loader.timeline import Span, clock_shift_ns, now
from coldframe.loader.wire import Channel
from coldframe.runtime.frozen.worker import FREEZE, freeze_order
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.replica.workforce import init_message
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.wake import Wake

__all__ = [
    "Restored",
    "files_in",
    "freeze_point_s",
    "import_engine_s",
    "read_direct_s",
    "read_s",
    "restore_once",
]

_IMPORT = (
    "import torch, time; import coldframe.runtime.worker.prefill, coldframe.runtime.worker.decode; "
    "print(time.monotonic_ns())"
)
_FREEZE = f"import os; os.closerange(4, 1 << 16); {FREEZE}"  # what our own parent has left open
_WAIT_S = 60.0
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Restored:
    """What one restore took, in seconds.

    Args:
        total: From the moment that it was asked for to the clone's first instruction.
        check: Of that, to find an image that fits.
        read: To have it in memory.
        criu: From there on.
    """

    total: float
    check: float
    read: float
    criu: float


def restore_once(model: Path, store: Path, *, verify: bool, stage: str = "up") -> Restored:
    """Restores one clone and ends it.

    Args:
        model: The checkpoint's directory.
        store: Where there is an image of it.
        verify: Whether the image is held against its hashes.
        stage: What is there when the clock starts: nothing (`exec`: the process that restores has
            to be started), that process (`up`), or the image in its memory too (`prepared`).

    Raises:
        ColdframeError: It cannot be restored.
    """
    with tempfile.TemporaryDirectory(prefix="coldframe-bench-") as work:
        wanted: dict[str, Any] = {
            "store": str(store),
            "name": str(model),
            "directory": str(model),
            "manifest": None,
            "hash": verify,
            "key_file": None,
            "device": "cpu",
            "work": work,
        }
        facts = ModelFacts(str(model))
        asked = now()
        cloner = Cloner.spawn_restorer()
        try:
            if stage != "exec":
                _wait_up(cloner, wanted)
                asked = now()
            cloner.prepare(wanted)
            if stage == "prepared":
                error = _answer(cloner)
                if error is not None:
                    raise error
                asked = now()
            first = _first_instruction(cloner, work, facts)
            spans = {span[0]: Span.from_wire(span) for span in cloner.spans}
        finally:
            cloner.close()
    check, read = spans["snapshot_check"], spans["snapshot_read"]
    return Restored(
        (first - asked) / 1e9,
        (check.end_ns - check.start_ns) / 1e9,
        (read.end_ns - read.start_ns) / 1e9,
        (first - max(asked, read.end_ns)) / 1e9,
    )


def _wait_up(cloner: Cloner, wanted: dict[str, Any]) -> None:
    """Waits until the process has all its imports: it refuses an empty store only then."""
    cloner.prepare({**wanted, "store": os.path.join(wanted["work"], "empty")})
    if _answer(cloner) is None:
        raise ReplicaError("an image was found where there is none")
    # What it refused was that store; the next one it may take.
    cloner.error = None
    cloner.spans.clear()


def _answer(cloner: Cloner) -> ColdframeError | None:
    """Waits for the next news: an error, or None where all is well."""
    while not cloner.events:
        cloner.receive(None)
    return cloner.events.popleft().error


def _first_instruction(cloner: Cloner, work: str, facts: ModelFacts) -> int:
    """Asks for a clone: when it ran its first instruction (CLOCK_MONOTONIC of this process, ns).

    Raises:
        ColdframeError: There is no clone.
    """
    ours, theirs = Channel.pair()
    try:
        try:
            cloner.clone("bench", theirs.fileno())
        finally:
            theirs.close()
        environment = freezing_environment(cpu_count())
        asked = now() - clock_shift_ns()
        wake = Wake.message("bench", environment, cpu_count(), work, asked, Identity.current())
        ours.send(wake, [2])
        # A memory service that has gone: the clone says what it has recorded, and ends.
        memory, gone = Channel.pair()
        gone.close()
        with closing(memory):
            init = init_message("bench", "prefill", ReplicaOptions(facts.directory), facts)
            ours.send(init, [memory.fileno()])
        while (message := ours.recv(_WAIT_S)) is not None:
            if message.kind == "spans":
                spans = [Span.from_wire(data) for data in message.body["spans"]]
                cloner.receive()
                return next(span.end_ns for span in spans if span.name == "snapshot_restore")
    finally:
        ours.close()
    while (error := _answer(cloner)) is None:
        continue
    raise error


def import_engine_s() -> float:
    """Seconds from the exec of a fresh interpreter until it has imported torch and the engine."""
    started = time.monotonic_ns()
    done = subprocess.run(
        [sys.executable, "-P", "-c", _IMPORT],
        env=freezing_environment(cpu_count()),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return (int(done.stdout) - started) / 1e9


def freeze_point_s(model: ModelFacts, manifest: Manifest) -> float:
    """Seconds from the exec of a fresh worker until it is as warm as the one that was frozen.

    Args:
        model: The model.
        manifest: Its image, which says what addresses are reserved.

    Raises:
        ColdframeError: It cannot be warmed.
    """
    ours, theirs = Channel.pair()
    try:
        try:
            environment = freezing_environment(cpu_count())
            child = spawn_python(_FREEZE, [], theirs.fileno(), environment)
        finally:
            theirs.close()
        try:
            weights, kv = manifest.arena.weights.nbytes, manifest.arena.kv.nbytes
            ours.send(freeze_order(model, weights, kv, cpu_count()))
            message = ours.recv(_WAIT_S)
            ready = now()
        finally:
            child.kill()
    finally:
        ours.close()
    if message is None:
        raise ReplicaError("a worker died before it was warm", where="bench")
    if message.kind != "frozen":
        raise ColdframeError.from_wire(message.body["error"])
    return (ready - child.spawned_ns) / 1e9


def files_in(store: Path) -> list[Path]:
    """The files of a store: its manifests and its objects."""
    return sorted(path for path in store.rglob("*") if path.is_file())


def read_s(files: Iterable[Path]) -> float:
    """Seconds to read files once, one after the other, through the page cache."""
    with mmap.mmap(-1, _PIECE) as buffer:
        buffer[:] = bytes(_PIECE)  # its pages are there before the clock starts
        started = now()
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        return (now() - started) / 1e9


def read_direct_s(files: Iterable[Path]) -> float:
    """Seconds to read files once, one after the other, past the page cache.

    Raises:
        PlatformError: The file system refuses that.
    """
    taken = 0
    with mmap.mmap(-1, _PIECE) as buffer:
        buffer[:] = bytes(_PIECE)
        for file in files:
            fd = open_direct(str(file))
            if fd is None:
                raise PlatformError("the file system refuses O_DIRECT", where=file)
            try:
                size, offset, started = os.fstat(fd).st_size, 0, now()
                while offset < size:
                    offset += os.preadv(fd, [buffer], offset)
                taken += now() - started
            finally:
                os.close(fd)
    return taken / 1e9
