"""What moves contexts asks of whoever has the workers; see `contexts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from coldframe.runtime.replica.launch import WorkerProcess

__all__ = ["ContextsOwner"]


class ContextsOwner(Protocol):
    """What has the workers, and knows their devices."""

    @property
    def workers(self) -> Mapping[str, WorkerProcess]:
        """All that there are, by name."""
        ...

    def device_of(self, role: str) -> str:
        """Where a role's workers compute."""
        ...

    def weights_left(self, role: str) -> bool:
        """Whether the weights have left the device of a role's workers."""
        ...

    def to_worker(self, worker: str, message: dict[str, Any]) -> None: ...

    def order(
        self, role: str, message: dict[str, Any], done: Callable[[dict[str, Any]], None]
    ) -> None:
        """Has the memory service of a role's workers move a context; `done` gets its answer."""
        ...

    def bury(self, worker: str, why: str) -> None:
        """Kills a worker, and starts another."""
        ...
