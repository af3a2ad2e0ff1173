"""What a start tells its clone before anything else: the message that wakes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import SnapshotError
from coldframe.loader.wire import Message
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.inherited import Inherited

__all__ = ["Ran", "Wake"]


@dataclass(frozen=True, slots=True)
class Ran:
    """When one hook ran, in this process's CLOCK_MONOTONIC."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Wake:
    """What a start tells its clone, before it tells it its role.

    Args:
        name: The clone's name in log and timeline.
        environment: Its environment, all of it.
        threads: How many threads it computes with.
        run_dir: The replica's run directory.
        started_ns: When the front asked for the clone, in the machine's own CLOCK_MONOTONIC
            (`loader.timeline.clock_shift_ns`).
        first_ns: When the clone ran its first instruction after the message, in its own clock.
        inherited: What it would have of the front, had that started it.
        identity: Whose process it becomes; None leaves it as it was restored.
        stderr: The descriptor that came with the message, for standard error and output.
        ran: When each hook ran.
    """

    name: str
    environment: dict[str, str]
    threads: int
    run_dir: str
    started_ns: int
    first_ns: int
    inherited: Inherited
    identity: Identity | None = None
    stderr: int | None = None
    ran: tuple[Ran, ...] = ()

    @staticmethod
    def message(
        name: str,
        environment: Mapping[str, str],
        threads: int,
        run_dir: str,
        started_ns: int,
        identity: Identity | None = None,
    ) -> dict[str, Any]:
        """The message that wakes a clone of this process's start.

        A descriptor for standard error may go beside it.
        """
        return {
            "type": "wake",
            "name": name,
            "environment": dict(environment),
            "threads": threads,
            "run_dir": run_dir,
            "started_ns": started_ns,
            "inherited": Inherited.here().to_wire(),
            "identity": None if identity is None else identity.to_wire(),
        }

    @staticmethod
    def from_message(message: Message, first_ns: int) -> Wake:
        """What a message says.

        Raises:
            SnapshotError: It is no `wake`, or not a whole one.
        """
        body = message.body
        if message.kind != "wake":
            raise _malformed("type", "wake", message.kind)
        for field, kind in _FIELDS.items():
            if type(body.get(field)) is not kind:
                raise _malformed(field, kind.__name__, repr(body.get(field)))
        for name, value in body["environment"].items():
            if type(value) is not str:
                raise _malformed(f"environment: {name}", "str", repr(value))
        if body["threads"] < 1:
            raise _malformed("threads", "at least 1", body["threads"])
        if len(message.fds) > 1:
            raise _malformed("descriptors", "at most 1", len(message.fds))
        identity = body.get("identity")
        return Wake(
            body["name"],
            body["environment"],
            body["threads"],
            body["run_dir"],
            body["started_ns"],
            first_ns,
            Inherited.from_wire(body.get("inherited")),
            None if identity is None else Identity.from_wire(identity),
            message.fds[0] if message.fds else None,
        )


_FIELDS = {"name": str, "environment": dict, "threads": int, "run_dir": str, "started_ns": int}


def _malformed(where: str, expected: object, got: object) -> SnapshotError:
    return SnapshotError(
        "a clone was woken with a message that it does not understand",
        where=where,
        expected=expected,
        got=got,
        hint="Front and image must be of the same version of coldframe; make the image again.",
    )
