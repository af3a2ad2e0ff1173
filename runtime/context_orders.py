"""ContextOrders of workers that leave their GPUs and come back: asked of the memory services.

Only a process with a context of its own can have another's moved, and the memory service of a GPU
is one that stays. It answers each order once (`loader/contextdesk.py`); if it dies first, the
replica does not go on anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ContextOrders"]

Then = Callable[[dict[str, Any]], None]
"""Takes an answer: `error`, as it travels, or null; `seconds`, and of a checkpoint `bytes` and
`uuids`, what there is to be said when it is restored."""


class ContextOrders:
    """The orders of one replica.

    Args:
        send: Sends a message to the memory service of a device.
    """

    def __init__(self, send: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._send = send
        self._waiting: dict[tuple[str, str], Then] = {}

    def checkpoint(self, device: str, name: str, pid: int, then: Then) -> None:
        """Has a process's context leave its GPU; it has let go of all memory of others.

        Args:
            device: The GPU.
            name: The process's, like no other's.
            pid: Its number here.
            then: Gets the answer.
        """
        self._waiting["checkpointed", name] = then
        self._send(device, {"type": "checkpoint", "name": name, "pid": pid})

    def restore(
        self, device: str, name: str, pid: int, nbytes: int, uuids: Mapping[str, str], then: Then
    ) -> None:
        """Has it come back, and the process go on.

        Args:
            device: The GPU that it comes to.
            name: As in `checkpoint`.
            pid: Likewise.
            nbytes: What was said of it then, as `bytes`.
            uuids: And that.
            then: Gets the answer.
        """
        self._waiting["restored", name] = then
        order = {"type": "restore", "name": name, "pid": pid}
        self._send(device, {**order, "bytes": nbytes, "uuids": dict(uuids)})

    def heard(self, body: dict[str, Any]) -> None:
        """A memory service has answered."""
        then = self._waiting.pop((body["type"], body["name"]), None)
        if then is not None:
            then(body)
