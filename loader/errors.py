"""Every error that coldframe raises on purpose.

    ColdframeError
    ├── CheckpointError      what is in the checkpoint is wrong or unsupported
    │   └── UnsupportedModel   sound, but nothing that the native engine runs
    ├── SourceError          the bytes could not be had
    │   ├── SourceNotFound
    │   ├── SourceDenied
    │   ├── SourceChanged      changed, cut or replaced while it was read
    │   └── SourceUnreachable  timed out, broken off, no such host
    ├── ArenaError           memory could not be reserved, mapped, granted or attached
    ├── SnapshotError        an image cannot be made, trusted or restored
    ├── DeviceError          the device is missing, too small or lost
    ├── RequestError         this request cannot be served; the replica goes on
    ├── ReplicaError         a process of the replica died or stalled
    └── PlatformError        the machine lacks what is needed

Each says what happened, where (path, URI, tensor, offset), what was expected, what was found,
and what to do about it. The parts are kept apart, so that they travel between processes
(`to_wire`, `from_wire`) and into an API's error body without being parsed out of a sentence.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ColdframeError",
    "CheckpointError",
    "UnsupportedModel",
    "SourceError",
    "SourceNotFound",
    "SourceDenied",
    "SourceChanged",
    "SourceUnreachable",
    "ArenaError",
    "SnapshotError",
    "DeviceError",
    "RequestError",
    "ReplicaError",
    "PlatformError",
]


class ColdframeError(Exception):
    """The root of the hierarchy.

    Args:
        what: What happened, as a clause without a full stop.
        where: The path, URI, tensor or offset that it happened to.
        expected: What should have been there.
        got: What was there.
        hint: What the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.what]
        if self.where is not None:
            parts.append(f"in {self.where}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        text = ", ".join(parts)
        return text if self.hint is None else f"{text}. {self.hint}"

    def to_wire(self) -> dict[str, Any]:
        """The error as JSON values, for a message to another process."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "hint": self.hint,
        }

    @staticmethod
    def from_wire(data: dict[str, Any]) -> ColdframeError:
        """The error that another process sent; an unknown type becomes a plain ColdframeError."""
        kind = _BY_NAME.get(str(data.get("error")), ColdframeError)
        return kind(
            str(data.get("what")),
            where=data.get("where"),
            expected=data.get("expected"),
            got=data.get("got"),
            hint=data.get("hint"),
        )


class CheckpointError(ColdframeError):
    """What is in the checkpoint is wrong."""


class UnsupportedModel(CheckpointError):
    """A sound checkpoint that the native engine does not run."""


class SourceError(ColdframeError):
    """The bytes could not be had."""


class SourceNotFound(SourceError):
    """There is nothing at that path or URI."""


class SourceDenied(SourceError):
    """It is there, but may not be read."""


class SourceChanged(SourceError):
    """It changed, shrank or was replaced while it was read."""


class SourceUnreachable(SourceError):
    """The other side cannot be reached or stopped answering."""


class ArenaError(ColdframeError):
    """Memory could not be reserved, mapped, granted or attached."""


class SnapshotError(ColdframeError):
    """A process image cannot be made, trusted or restored."""


class DeviceError(ColdframeError):
    """The device is missing, too small or lost."""


class RequestError(ColdframeError):
    """This request cannot be served; the replica goes on."""


class ReplicaError(ColdframeError):
    """A process of the replica died or stalled."""


class PlatformError(ColdframeError):
    """The machine lacks what is needed."""


def _family(root: type[ColdframeError]) -> dict[str, type[ColdframeError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_family(child))
    return found


_BY_NAME = _family(ColdframeError)
