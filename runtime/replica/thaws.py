"""Clones on a GPU whose contexts are on their way back.

CRIU brings back a process whose context is in its host memory. The clone runs its hooks, and says
so with its first word. Not before that is its GPU's memory service to touch it: a change of user
interrupts all of its threads, the driver's too, and for a moment it is closed to others. Then the
service restores the context while the clone hears what it is to be, and weights come; whatever the
clone asks its driver waits for that. A clone whose context does not come back is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import now
from coldframe.runtime.replica.launch import WorkerProcess

__all__ = ["THAW_S", "Order", "Thaws"]

Order = Callable[[str, Mapping[str, Any], Callable[[dict[str, Any]], None]], None]
"""See `Memories.order`."""

THAW_S = 30.0
"""How long a context may take to come back, in seconds: it waits for the one of the memory service,
and for those of other clones."""


class Thaws:
    """Those of one replica.

    Args:
        order: Has them come back.
        failed: Called with the name of a clone whose context does not, and why.
    """

    def __init__(self, order: Order, failed: Callable[[str, ColdframeError], None]) -> None:
        self._order = order
        self._failed = failed
        self._since: dict[str, int] = {}
        self._begun = set[str]()

    def begin(self, worker: WorkerProcess, device: str) -> None:
        """A clone has run its hooks; where it was frozen on a GPU its context is to follow.

        Args:
            worker: The clone. It may be told of twice: by its own word and as a process that is
                there, in either order.
            device: The GPU that it is for.
        """
        manifest = None if worker.cloner is None else worker.cloner.manifest
        gpu = None if manifest is None else manifest.get("gpu")
        if gpu is None:
            return
        name, pid = worker.name, worker.child.pid
        if not worker.imported or not pid or name in self._begun:
            return  # what is still missing follows
        self._begun.add(name)
        self._since[name] = now()
        order = {"type": "restore", "name": name, "pid": pid}
        frozen = {"bytes": gpu["context_bytes"], "uuids": dict(gpu["gpus"])}
        self._order(device, order | frozen, partial(self._answered, name))

    def forget(self, name: str) -> None:
        """A worker is gone."""
        self._since.pop(name, None)
        self._begun.discard(name)

    def tick(self) -> None:
        """Gives up on contexts that take too long; to be called about once a second."""
        late = now() - int(THAW_S * 1e9)
        for name in [name for name, since in self._since.items() if since < late]:
            del self._since[name]
            self._failed(
                name,
                SnapshotError(
                    "a clone's context was not back in time",
                    where=name,
                    expected=f"within {THAW_S:g} s",
                ),
            )

    def _answered(self, name: str, body: dict[str, Any]) -> None:
        if self._since.pop(name, None) is not None and body["error"] is not None:
            self._failed(name, ColdframeError.from_wire(body["error"]))
