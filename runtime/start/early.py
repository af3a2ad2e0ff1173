"""The very first step of a cold start: processes that need nothing from the command line.

The memory service, and where there are images the process that restores them. What to load and
what to restore follows over their sockets. So their interpreters start while the front still reads
its arguments. The imports here are few for that reason.
"""

from __future__ import annotations

import os
import socket
from time import monotonic_ns

from coldframe.loader.process import Child, make_run_dir, remove_run_dir, spawn_python
from coldframe.runtime.start.environment import without_secrets
from coldframe.runtime.start.guess import is_set, said
from coldframe.snapshot.places import default_store, expanded, images_are_there
from coldframe.snapshot.restorer_process import RestorerProcess

__all__ = [
    "GatewayProcess",
    "MemoryProcess",
    "PeersProcess",
    "likely_gateway",
    "likely_peers",
    "likely_restorer",
]

_MAIN = (
    "from coldframe.loader.memory_service.service import main; "
    "from coldframe.snapshot.contexts import open_contexts; "
    "main(3, sys.argv[1], int(sys.argv[2]), first_ns, open_contexts)"
)
_GATEWAY = "from coldframe.runtime.gateway.process import main; main(3, int(sys.argv[1]), first_ns)"
_PEERS = "from coldframe.runtime.integrations.dynamo.peers import main; main(3, int(sys.argv[1]))"
_STORES = ("ETCD_", "NATS_")
_OF_THE_WORKER = frozenset(["DYN_SYSTEM_ENABLED", "DYN_SYSTEM_PORT", "DYN_TCP_RPC_PORT"])
"""Ports of Dynamo's that the worker itself is to listen on."""


class MemoryProcess:
    """A memory service that has not been told yet what to load.

    Args:
        parent: Where the run directory is made; None chooses.

    Raises:
        PlatformError: The process or the run directory cannot be made.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.started_ns = monotonic_ns()
        self.run_dir, self.lock = make_run_dir(parent)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.child: Child = spawn_python(
                _MAIN,
                [self.run_dir, str(self.started_ns)],
                theirs.fileno(),
                dict(os.environ),
                site_packages=False,
            )
        except BaseException:
            ours.close()
            remove_run_dir(self.run_dir)
            os.close(self.lock)
            raise
        finally:
            theirs.close()
        self.socket = ours
        self.spawned_ns = monotonic_ns()


class GatewayProcess:
    """A gateway that has not been told yet where it listens and what it serves.

    Args:
        dynamo: Whether it may be one that registers with Dynamo: what opens etcd or NATS is not
            kept from it then.

    Raises:
        PlatformError: It cannot be started.
    """

    def __init__(self, *, dynamo: bool = False) -> None:
        self.started_ns = monotonic_ns()
        environment = without_secrets()
        if dynamo:
            environment |= _opens_stores()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.child: Child = spawn_python(
                _GATEWAY, [str(self.started_ns)], theirs.fileno(), environment
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.socket = ours
        self.spawned_ns = monotonic_ns()


class PeersProcess:
    """What finds peers in Dynamo's discovery, not told yet of which model.

    It gets what opens that, as a gateway that registers there does, and no other secret.

    Raises:
        PlatformError: It cannot be started.
    """

    def __init__(self) -> None:
        told = without_secrets() | _opens_stores()
        environment = {name: value for name, value in told.items() if name not in _OF_THE_WORKER}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.child: Child = spawn_python(
                _PEERS, [str(os.getpid())], theirs.fileno(), environment
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.socket = ours


def likely_gateway(command: str, arguments: list[str]) -> GatewayProcess:
    """One that may open Dynamo's discovery where it looks as if it were to: a guess.

    Args:
        command: Its name; of a worker's alone.
        arguments: The command's, as they are.

    Raises:
        PlatformError: It cannot be started.
    """
    return GatewayProcess(dynamo=command == "worker" and is_set(arguments, "--dynamo"))


def likely_peers(arguments: list[str]) -> PeersProcess | None:
    """One where it looks as if it were wanted, likewise a guess.

    Args:
        arguments: The command's, as they are.

    Raises:
        PlatformError: It cannot be started.
    """
    place = said(arguments, "--peers-from") or ""
    return PeersProcess() if place.partition(":")[0] == "dynamo" else None


def likely_restorer(arguments: list[str]) -> RestorerProcess | None:
    """One where it looks as if it were wanted: a guess, since nothing has been parsed yet.

    Args:
        arguments: The command's, as they are.

    Raises:
        PlatformError: It cannot be started.
    """
    mode = said(arguments, "--snapshot") or "auto"
    store = said(arguments, "--snapshot-store") or default_store()
    if mode == "off":
        return None
    if mode not in ("auto", "require"):
        store = mode
    store = expanded(store)
    return RestorerProcess(store=store) if images_are_there(store) else None


def _opens_stores() -> dict[str, str]:
    """The variables that Dynamo opens etcd or NATS with, passwords among them."""
    return {name: value for name, value in os.environ.items() if name.startswith(_STORES)}
