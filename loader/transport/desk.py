"""The memory service's desks for KV that travels: which ways there are, for both directions.

Messages in:  `transfer` (from the owner: the ways, and where to listen).
Messages out: `gives_at`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.transport.givedesk import GiveDesk
from coldframe.loader.transport.registry import check_names
from coldframe.loader.transport.takedesk import TakeDesk

if TYPE_CHECKING:
    from coldframe.loader.transport.nixl import NixlAgent

__all__ = ["TransferDesk"]


class TransferDesk:
    """Gives and takes; all calls come from the service's loop.

    Args:
        reactor: The loop.
        reporter: Told why nothing can be given where that was asked for.
        kv: Has the blocks.
        device: Where they are.
        path: Of the socket that workers, and memory services of this machine, connect to.
    """

    def __init__(
        self,
        reactor: Reactor,
        reporter: Reporter,
        kv: KvDesk,
        device: Callable[[], Device],
        path: str,
    ) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._kv = kv
        self._device = device
        self.give = GiveDesk(reactor, kv, device, path)
        self.take = TakeDesk(reactor, kv, device)

    def close(self) -> None:
        """Breaks off what is under way, and waits until nobody looks at the arena."""
        self.give.close()
        self.take.close()
        if self.take.agent is not None:
            self.take.agent.close()

    def gone(self, connection: Connection) -> None:
        """A connection has ended."""
        self.give.gone(connection)
        self.take.gone(connection)

    def on_transfer(
        self,
        connection: Connection,
        listen: str | None,
        advertise: str | None,
        transports: list[str],
        keyed: bool,
    ) -> None:
        """The owner says which ways there are, and where to listen for those who come."""
        connection.require_owner("says how KV travels, and once")
        if self.give.listens:
            raise ReplicaError("KV travels already", where=connection.key)
        try:
            names = check_names(transports, "transports")
            self.give.names = self.take.names = names
            self.take.keyed = keyed
            if "nixl" in names:
                self.take.agent = self._open_agent()
            if listen is not None and set(names) - {"shared"}:
                address = self.give.listen(listen, advertise, self.take.agent)
                self._reactor.send(connection, {"type": "gives_at", "address": address})
        except ColdframeError as error:
            self._reporter.fail(error)

    def _open_agent(self) -> NixlAgent:
        from coldframe.loader.transport.nixl import NixlAgent, nixl_package

        if nixl_package() is None:
            raise PlatformError(
                "KV cannot go by NIXL here",
                where="nixl",
                expected="nixl_cu12 or nixl_cu13",
                got="neither is installed",
                hint="Install it: pip install 'coldframe[nixl]'.",
            )
        return NixlAgent(self._kv.existing_arena, self._device)
