"""Every error that coldframe raises on purpose.

    ColdframeError
    ├── CheckpointError      what is in the checkpoint is wrong or unsupported
    │   └── UnsupportedModel   sound, but nothing that the native engine runs
    ├── SourceError          the bytes could not be had
    │   ├── SourceNotFound
    │   ├── SourceDenied
    │   │   └── SourceCredentials  there are none, or they are wrong or expired
    │   ├── SourceElsewhere    it is in another region
    │   ├── SourceChanged      changed, cut or replaced while it was read
    │   ├── SourceCorrupt      not the bytes that its seal or checksum vouches for
    │   ├── SourceProtocol     the other side does not answer as it should
    │   └── SourceUnreachable  timed out, broken off, no such host
    │       ├── SourceBusy       it answers that it has too much to do, again and again
    │       └── SourceUntrusted  its certificate is not one to trust
    ├── ArenaError           memory could not be reserved, mapped, granted or attached
    ├── SnapshotError        an image cannot be made, trusted or restored
    │   ├── NoImage            there is none that fits and is whole
    │   ├── ImageDamaged       its bytes are not those that were stored
    │   └── GraphRefused       a captured graph cannot be kept, or not be made again here
    ├── DeviceError          the device is missing, too small or lost
    │   ├── NoDevice           there is none, or nothing to reach it with
    │   ├── DeviceFull         it has not that much memory left
    │   ├── DeviceLost         it broke: nothing of this process works on it any more
    │   ├── AnotherDevice      a context is to be restored on another GPU than it fits
    │   ├── NoCheckpoint       contexts cannot be checkpointed here
    │   └── ContextPoisoned    a process's context is neither here nor there: kill the process
    ├── RequestError         this request cannot be served; the replica goes on
    ├── TransferError        KV could not be brought from another replica: compute it again
    │   ├── TransferRefused    the sender has no such KV any more, or it does not fit here
    │   ├── TransferDenied     the two do not have the same secret
    │   └── TransferBroken     the sender cannot be reached, or was lost on the way
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
    "SourceCredentials",
    "SourceElsewhere",
    "SourceChanged",
    "SourceCorrupt",
    "SourceProtocol",
    "SourceUnreachable",
    "SourceBusy",
    "SourceUntrusted",
    "ArenaError",
    "SnapshotError",
    "NoImage",
    "ImageDamaged",
    "GraphRefused",
    "DeviceError",
    "NoDevice",
    "DeviceFull",
    "DeviceLost",
    "AnotherDevice",
    "NoCheckpoint",
    "ContextPoisoned",
    "RequestError",
    "TransferError",
    "TransferRefused",
    "TransferDenied",
    "TransferBroken",
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
        hint: What the reader can do about it; each kind has one of its own for where none is given.
    """

    default_hint = "Start again; if it happens again, report it with what is on standard error."

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
        self.hint = self.default_hint if hint is None else hint
        self.retry_after_s: float | None = None
        """When it is worth trying again, in seconds, where whoever raised it knows."""

    def __str__(self) -> str:
        parts = [self.what]
        if self.where is not None:
            parts.append(f"in {self.where}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        text = ", ".join(parts)
        return f"{text}. {self.hint}"

    def to_wire(self) -> dict[str, Any]:
        """The error as JSON values, for a message to another process."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "hint": self.hint,
            **({} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}),
        }

    @staticmethod
    def from_wire(data: dict[str, Any]) -> ColdframeError:
        """The error that another process sent; an unknown type becomes a plain ColdframeError."""
        kind = _BY_NAME.get(str(data.get("error")), ColdframeError)
        error = kind(
            str(data.get("what")),
            where=data.get("where"),
            expected=data.get("expected"),
            got=data.get("got"),
            hint=data.get("hint"),
        )
        error.retry_after_s = data.get("retry_after_s")
        return error


class CheckpointError(ColdframeError):
    """What is in the checkpoint is wrong."""

    default_hint = "Download or save the model again."


class UnsupportedModel(CheckpointError):
    """A sound checkpoint that the native engine does not run."""

    default_hint = (
        "The engine runs dense Llama, Mistral, Qwen2 and Qwen3 models; vLLM may serve this one "
        "(--decode vllm)."
    )


class SourceError(ColdframeError):
    """The bytes could not be had."""

    default_hint = "Check the disk and the mount, then start again."


class SourceNotFound(SourceError):
    """There is nothing at that path or URI."""

    default_hint = "Check the path."


class SourceDenied(SourceError):
    """It is there, but may not be read."""

    default_hint = "Check its permissions."


class SourceCredentials(SourceDenied):
    """There are no credentials, or they are wrong or have expired."""

    default_hint = "Give credentials that are valid now, then start again."


class SourceElsewhere(SourceError):
    """It is in another region than the one that was asked."""

    default_hint = "Name the region that the error names, for example in AWS_REGION."


class SourceChanged(SourceError):
    """It changed, shrank or was replaced while it was read."""

    default_hint = "Let nothing write to a checkpoint that is in use, then start again."


class SourceCorrupt(SourceError):
    """The bytes are not those that their seal or checksum vouches for."""

    default_hint = "Write the file there again from a good copy."


class SourceProtocol(SourceError):
    """The other side does not answer as its protocol says."""

    default_hint = "Ask whoever runs that server or the proxy before it; ranges must work."


class SourceUnreachable(SourceError):
    """The other side cannot be reached or stopped answering."""

    default_hint = "Check the disk or the network that the weights come from."


class SourceBusy(SourceUnreachable):
    """The other side has too much to do, and said so until patience ended."""

    default_hint = "Start again later, or load fewer replicas at once."


class SourceUntrusted(SourceUnreachable):
    """The other side's certificate is not one to trust."""

    default_hint = "Set SSL_CERT_FILE to the certificate of the authority that signed it."


class ArenaError(ColdframeError):
    """Memory could not be reserved, mapped, granted or attached."""


class SnapshotError(ColdframeError):
    """A process image cannot be made, trusted or restored."""


class NoImage(SnapshotError):
    """There is no image of this model that fits this machine and is whole."""

    default_hint = "Make one with `coldframe snapshot create`."


class ImageDamaged(SnapshotError):
    """What a store has of an image is not what was stored."""

    default_hint = "Remove the image, and make it again."


class GraphRefused(SnapshotError):
    """A captured graph cannot be kept, or cannot be made again in this process."""

    default_hint = "Nothing is lost: the graph is captured where it is needed."


class DeviceError(ColdframeError):
    """The device is missing, too small or lost."""

    default_hint = "Free memory, raise the container's limit or take a smaller model."


class NoDevice(DeviceError):
    """There is no such device, or no driver to reach it with."""

    default_hint = "Run on a machine with a GPU and its driver, or take the CPU."


class DeviceFull(DeviceError):
    """The device has not that much memory left."""


class DeviceLost(DeviceError):
    """The device broke, so that nothing of this process works on it any more."""

    default_hint = "The replica must start again; the kernel's log has the cause (dmesg, Xid)."


class AnotherDevice(DeviceError):
    """A context was checkpointed on GPUs that are not those which are here."""

    default_hint = "Start the worker fresh, or restore it on GPUs of the same kind and number."


class NoCheckpoint(DeviceError):
    """Contexts cannot be checkpointed here: the driver, the GPU or the rights do not allow it."""

    default_hint = "Update the driver and cuda-bindings; until then contexts stay where they are."


class ContextPoisoned(DeviceError):
    """What is left of a process's context is of no use, and neither is the process."""

    default_hint = "Kill the process and start another; nothing else helps."


class RequestError(ColdframeError):
    """This request cannot be served; the replica goes on."""

    default_hint = "Change the request."


class TransferError(ColdframeError):
    """KV of a request could not be brought from another replica."""

    default_hint = "Nothing is lost: the request is computed again."


class TransferRefused(TransferError):
    """The sender has no such KV any more, or it is not what the receiver could use."""


class TransferDenied(TransferError):
    """Sender and receiver do not have the same secret."""

    default_hint = "Give both the same file in COLDFRAME_KV_SECRET_FILE."


class TransferBroken(TransferError):
    """The sender cannot be reached, or was lost on the way."""


class ReplicaError(ColdframeError):
    """A process of the replica died or stalled."""


class MemoryServiceGone(ReplicaError):
    """The connection to the memory service has ended: the service is dead, or about to be."""

    default_hint = "The replica must start again."


class PlatformError(ColdframeError):
    """The machine lacks what is needed."""

    default_hint = "Mend that, then start again."


def _family(root: type[ColdframeError]) -> dict[str, type[ColdframeError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_family(child))
    return found


_BY_NAME = _family(ColdframeError)
