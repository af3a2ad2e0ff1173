"""How a worker is known to Dynamo, without Dynamo: what the command line says, and its defaults.

The names and the variables are Dynamo's own, so that what its operator sets for a worker of its
own engines is what this one goes by.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from coldframe.loader.errors import PlatformError, RequestError

__all__ = ["ROLES", "DynamoSettings", "Role", "check_installed"]

Role = Literal["aggregated", "prefill", "decode"]
ROLES: tuple[Role, ...] = get_args(Role)

_COMPONENTS: Mapping[Role, str] = {
    "aggregated": "backend",
    "prefill": "prefill",
    "decode": "backend",
}
_DISCOVERIES = ("kubernetes", "etcd", "file", "mem")
_REQUEST_PLANES = ("tcp", "nats")
_EVENT_PLANES = ("zmq", "nats")
_SUFFIX = "DYN_NAMESPACE_WORKER_SUFFIX"
"""Dynamo's operator sets it, another one for each generation of a graph's workers: front ends serve
all of them, and none pairs a prefill worker with a decode worker of another generation."""


@dataclass(frozen=True, slots=True)
class DynamoSettings:
    """What this worker is to Dynamo.

    Args:
        role: `aggregated` answers requests as a whole, `prefill` makes the first token of each,
            `decode` the others.
        namespace, component, endpoint: Where it is found: `namespace.component.endpoint`.
        suffix: Tells its generation of workers from others of that namespace: what is found is
            `namespace-suffix` then. None where it is empty.
        discovery: Where it registers: `kubernetes`, `etcd`, `file` or `mem`.
        request_plane: How requests come: `tcp` or `nats`.
        event_plane: How KV events go: `zmq` or `nats`; None for Dynamo's default.
        chat_template: A file with the operator's own, in place of the checkpoint's.
        most_running: Sequences that the workers get at once.
        grace_s: How long requests are taken still after it has left the discovery, in seconds:
            front ends hear of that a moment later.
    """

    role: Role = "aggregated"
    namespace: str = "dynamo"
    suffix: str = ""
    component: str = "backend"
    endpoint: str = "generate"
    discovery: str = "etcd"
    request_plane: str = "tcp"
    event_plane: str | None = None
    chat_template: str | None = None
    most_running: int = 32
    grace_s: float = 1.0

    @property
    def path(self) -> str:
        """Where it is found."""
        namespace = f"{self.namespace}-{self.suffix}" if self.suffix else self.namespace
        return f"{namespace}.{self.component}.{self.endpoint}"

    @classmethod
    def of(
        cls,
        role: Role,
        *,
        namespace: str | None = None,
        component: str | None = None,
        endpoint: str | None = None,
        discovery: str | None = None,
        request_plane: str | None = None,
        event_plane: str | None = None,
        environ: Mapping[str, str] | None = None,
        **more: Any,
    ) -> DynamoSettings:
        """What the flags say, and where they say nothing Dynamo's variables, and its defaults.

        Raises:
            RequestError: There is no such discovery or plane, or a name cannot be part of a path.
        """
        env = os.environ if environ is None else environ
        suffix = env.get(_SUFFIX)
        found = cls(
            role,
            _name("--namespace", namespace or env.get("DYN_NAMESPACE") or "dynamo"),
            _name(_SUFFIX, suffix) if suffix else "",
            _name("--component", component or env.get("DYN_COMPONENT") or _COMPONENTS[role]),
            _name("--endpoint", endpoint or env.get("DYN_ENDPOINT_NAME") or "generate"),
            discovery or env.get("DYN_DISCOVERY_BACKEND") or "etcd",
            request_plane or env.get("DYN_REQUEST_PLANE") or "tcp",
            event_plane or env.get("DYN_EVENT_PLANE") or None,
            **more,
        )
        _one_of("--discovery-backend", found.discovery, _DISCOVERIES)
        _one_of("--request-plane", found.request_plane, _REQUEST_PLANES)
        if found.event_plane is not None:
            _one_of("--event-plane", found.event_plane, _EVENT_PLANES)
        return found

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> DynamoSettings:
        return DynamoSettings(**data)


def check_installed() -> None:
    """Dynamo's runtime can be imported.

    Raises:
        PlatformError: It is not installed.
    """
    if importlib.util.find_spec("dynamo") is None or not importlib.util.find_spec("dynamo._core"):
        raise PlatformError(
            "a worker of Dynamo's needs its runtime",
            where="import dynamo",
            got="it is not installed",
            hint="Install it with `pip install 'coldframe[dynamo]'`.",
        )


def _name(flag: str, text: str) -> str:
    if not text or not all(c.isalnum() or c in "-_" for c in text):
        raise RequestError(
            "this cannot be part of an endpoint's path",
            where=flag,
            expected="letters, digits, - and _",
            got=text,
        )
    return text


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(
            "there is no such thing in Dynamo", where=flag, expected=", ".join(known), got=value
        )
