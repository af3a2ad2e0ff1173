"""The memory service: the small process that owns the arenas and outlives the workers.

It streams the weights, tells who is attached when a stage is in, and keeps the ledger of KV
blocks. Its one owner, at the other end of the inherited socket, says what to load; when the
owner ends, so does the service, and removes the run directory behind both.

What there is to do is done at its desks, each of which says what messages it takes and sends:

    weightsdesk         the load, and who is told how far it is
    settledesk          weights that move while they are in use
    parkdesk            weights that leave while the replica rests, and come back
    kvdesk              KV blocks
    contextdesk         workers' contexts, frozen and thawed
    transport.desk      KV that goes to other replicas and comes from them

Messages in, beside those:  `usage` (from the owner), `bring` (from workers).
Messages out, likewise:     `listening`, `usage`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import ReplicaError
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.contextdesk import ContextDesk, OpenContexts
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.parkdesk import ParkDesk
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.memory_service.settledesk import SettleDesk
from coldframe.loader.memory_service.weightsdesk import WeightsDesk
from coldframe.loader.process import collect_garbage, remove_run_dir
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel, Message

# What only those need whose KV travels.
if TYPE_CHECKING:
    from coldframe.loader.transport.desk import TransferDesk

__all__ = ["MemoryService", "SOCKET_NAME", "main"]

SOCKET_NAME = "memory.sock"
_OF_TRANSFERS = ("transfer", "offer", "lend", "lent_back")


class MemoryService:
    """The desks, and the loop that they share.

    Args:
        owner: The channel to the process that started it.
        run_dir: The replica's private directory; the listening socket is made there.
        recorder: Holds the spans of the start so far.
        open_contexts: Makes what freezes contexts; None where that is not to be had.
    """

    def __init__(
        self,
        owner: Channel,
        run_dir: str,
        recorder: Recorder,
        open_contexts: OpenContexts | None = None,
    ) -> None:
        self._socket = os.path.join(run_dir, SOCKET_NAME)
        self._recorder = recorder
        self._reactor = reactor = Reactor(owner, on_message=self._handle, on_gone=self._gone)
        self._reporter = reporter = Reporter(reactor, recorder)
        self._kv = KvDesk(reactor, reporter, self._device)
        self._park = ParkDesk(reactor, reporter, recorder)
        self._settle = SettleDesk(
            *(reactor, reporter, recorder),
            facts=lambda: self._weights.facts(),
            check_proven=lambda: self._weights.check_proven(),
        )
        self._weights = WeightsDesk(
            *(reactor, reporter, recorder, run_dir),
            kv=self._kv,
            park=self._park,
            settle=self._settle,
        )
        self._contexts = ContextDesk(reactor, reporter, self._device, recorder, open_contexts)
        self._transfers: TransferDesk | None = None

    def _device(self) -> Device:
        return self._weights.device

    def run(self) -> None:
        """Serves until the owner is gone."""
        # Before any lease is taken: unhandled, the signal would end this process.
        signal.signal(signal.SIGIO, lambda *_: self._reactor.post(self._settle.check_lease))
        # The first message is on its way already: load first, listen while it starts.
        self._reactor.receive(self._reactor.owner)
        if self._reactor.running:
            self._listen()
        collect_garbage()
        self._reactor.run(each_round=self._kv.tell_changes, each_second=self._tick)

    def close(self) -> None:
        device_is_used = not self._contexts.close()
        if self._transfers is not None:
            self._transfers.close()
        self._kv.close()
        self._park.close()
        self._weights.close(device_is_used=device_is_used)
        self._reactor.close()

    def _listen(self) -> None:
        start = now()
        self._reactor.listen(self._socket)
        self._recorder.add("listen", start)
        self._reactor.send(self._reactor.owner, {"type": "listening"})
        # Idle until a load comes: what it will need takes some milliseconds to import.
        import hashlib  # noqa: F401

    def _tick(self) -> None:
        self._settle.check_lease()
        self._kv.tick()
        if self._transfers is not None:
            self._transfers.give.tick()

    def _gone(self, client: Connection) -> None:
        if self._transfers is not None:
            self._transfers.gone(client)
        self._kv.gone(client)
        self._park.gone(client)
        self._settle.gone()

    # -- messages --------------------------------------------------------------------------------

    def _handle(self, client: Connection, message: Message) -> None:
        name = f"on_{message.kind}"
        for desk in self._desks(message.kind):
            handler = getattr(desk, name, None)
            if handler is not None:
                body = {key: value for key, value in message.body.items() if key != "type"}
                handler(client, **body)
                return
        raise ReplicaError("unknown message", where=client.key, got=message.kind)

    def _desks(self, kind: str) -> Iterator[object]:
        """Who may know what to do with a kind of message, in the order in which they are asked."""
        yield from (self, self._weights, self._kv, self._park, self._settle, self._contexts)
        if kind in _OF_TRANSFERS:
            transfers = self._open_transfers()
            yield from (transfers, transfers.give)

    def _open_transfers(self) -> TransferDesk:
        if self._transfers is None:
            from coldframe.loader.transport.desk import TransferDesk

            self._transfers = TransferDesk(
                self._reactor, self._reporter, self._kv, self._device, self._socket
            )
        return self._transfers

    def on_usage(self, client: Connection) -> None:
        """What is asked for when somebody looks at the replica's metrics."""
        client.require_owner("asks what is in use")
        kv = {f"kv_{name}": count for name, count in asdict(self._kv.usage()).items()}
        kv |= self._kv.store_usage().to_wire()
        if self._transfers is not None:
            kv |= self._transfers.take.usage.to_wire()
        used = {"type": "usage", **kv, "bytes_done": self._weights.bytes_done}
        self._reactor.send(client, used)

    def on_bring(self, client: Connection, ticket: Any = None, **wanted: Any) -> None:
        """KV of a request, from another replica or from another device of this one."""
        if ticket is not None:
            self._open_transfers().take.bring(client, ticket, **wanted)
            return
        from coldframe.loader.loads.beside import LoadBeside

        if not isinstance(self._weights.load, LoadBeside):
            raise ReplicaError("there is no other device to bring KV from", where=client.key)
        self._kv.bring(client, self._weights.load.bring, **wanted)


def main(
    owner_fd: int,
    run_dir: str,
    spawned_ns: int,
    first_ns: int,
    open_contexts: OpenContexts | None = None,
) -> None:
    """The process's entry.

    Args:
        owner_fd: The inherited end of the owner's socket pair.
        run_dir: The replica's private directory.
        spawned_ns: When the owner started this process (CLOCK_MONOTONIC).
        first_ns: When its first line of Python ran.
        open_contexts: See `MemoryService`.
    """
    recorder = Recorder("memory")
    recorder.add("interpreter", spawned_ns, first_ns)
    # The owner ends us by ending its socket, in its own time: a Ctrl-C is meant for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = MemoryService(Channel.from_fd(owner_fd), run_dir, recorder, open_contexts)
    recorder.add("imports", first_ns)
    try:
        service.run()
    finally:
        # First, since closing waits for reads, and those for a disk or a file server.
        remove_run_dir(run_dir)
        with contextlib.suppress(OSError):
            service.close()
