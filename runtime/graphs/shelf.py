"""Where a replica keeps its workers' captured steps: written by the front, which may.

A worker may run as a user who may write nowhere; so it hands over the bytes, and they are written
by whoever has started it, beside the images of workers. What is not an archive, by its own hash, is
not written; what is in it nobody looks at but the next worker, which may no more than the one that
has made it.

A step that works in the wrong place can take its worker with it, and would take the next one. So
what was being tried when a worker was lost is not tried again by this replica: an archive is
removed, and behind the loss by a step of the worker's own no step is replayed any more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Message
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.snapshot.places import default_store, expanded

__all__ = ["GraphShelf", "Trial"]

_FOLDER = "graphs"
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Trial:
    """What a worker replays for the first time.

    Attributes:
        archive: The archive that it comes from; None where the worker has captured it.
    """

    archive: str | None

    @classmethod
    def of(cls, message: Message) -> Trial | None:
        """What `trying` tells of; None where it is over."""
        what = str(message.body["what"])
        if not what:
            return None
        return cls(str(message.body["archive"]) if what == "rebuilt" else None)


class GraphShelf:
    """Archives of captured steps, beside a store of images.

    Args:
        options: How workers may start: with `off` nothing is read, and without `create` nothing is
            written. Where images are in a bucket, archives are where they would be without one.
        recorder: Gets a span for each that cannot be written.

    Attributes:
        root: The folder, for workers to read; None where they are to capture for themselves.
    """

    def __init__(self, options: SnapshotOptions, recorder: Recorder) -> None:
        store = options.store
        if not store or "://" in store:
            store = default_store()
        off = options.mode == "off"
        self.root = None if off else os.path.join(os.path.abspath(expanded(store)), _FOLDER)
        self._may_write = options.create and not off
        self._replaying = True
        self._recorder = recorder

    def options(self, options: ReplicaOptions) -> ReplicaOptions:
        """What the next worker is to be, behind what was lost so far."""
        return options if self._replaying else replace(options, graphs=False)

    def lost(self, worker: str, trial: Trial) -> None:
        """A worker is dead that was replaying something for the first time.

        Args:
            worker: Its name.
            trial: What.
        """
        if trial.archive is None:
            self._replaying = False
            note = "steps are computed kernel by kernel"
        else:
            note = "its archive is left alone"
            root, self.root = self.root, None
            if root is not None and self._may_write:
                note = _remove(root, trial.archive)
        what = "a captured" if trial.archive is None else "a rebuilt"
        note = f"{worker} was lost when it first replayed {what} step: {note}"
        self._recorder.add("graph_trial", now(), note=note)

    def take(self, message: Message) -> None:
        """Keeps what a worker has sent, in a thread: disks are slow.

        Args:
            message: `graphs`, with the archive's `name`; its bytes are in the descriptor.
        """
        if len(message.fds) != 1:
            for fd in message.fds:
                os.close(fd)
            return
        (fd,) = message.fds
        if self.root is None or not self._may_write:
            os.close(fd)
            return
        work = (self.root, str(message.body["name"]), fd, self._failed)
        threading.Thread(target=_write, args=work, name="graphs", daemon=True).start()

    def _failed(self, error: ColdframeError) -> None:
        self._recorder.add("graph_save", now(), note=f"failed: {error}")


def _remove(root: str, name: str) -> str:
    from coldframe.snapshot.graph_store import GraphStore

    try:
        GraphStore(root).remove(name)
    except ColdframeError as error:
        return f"its archive cannot be removed: {error}"
    return "its archive is removed"


def _write(root: str, name: str, fd: int, failed: Callable[[ColdframeError], None]) -> None:
    # What most replicas never need is imported here, where nobody waits.
    from coldframe.snapshot.graph_store import GraphStore

    try:
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size > _MOST_BYTES:
                raise SnapshotError(
                    "an archive of graphs is too large",
                    expected=f"at most {_MOST_BYTES:,} bytes",
                    got=f"{size:,} bytes",
                )
            file.seek(0)  # wherever its writer has left it
            GraphStore(root).publish(name, file.read(size))
    except ColdframeError as error:
        failed(error)
