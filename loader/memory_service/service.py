"""The memory service: the small process that owns the arenas and outlives the workers.

It streams the weights, tells who is attached when a stage is in, and keeps the ledger of KV
blocks. Its one owner, at the other end of the inherited socket, says what to load; when the
owner ends, so does the service, and removes the run directory behind both.

Messages in:  `load`, `kv`, `settle`, `usage` (from the owner), `open`, `release` (from gateways),
`hello`, `assign`, `publish`, `claim`, `bring`, `drop`, `finish`, `renew`, `remapped` (from
workers); of weights at rest `keep`, `park`, `wake` (from the owner), `detached` (from workers), see
`parking`; of contexts `probe`, `checkpoint`, `restore` (from the owner), see `contextdesk`; of KV
that travels, `transport.desk`.
Messages out: `device`, `sized`, `files`, `plan` (board and segments), `kv`, `kv_grown`,
`kv_shrunk`, `kv_keys`, `stage`, `remap`, `relaid`, `failed`, `loaded`, `moved`, `kept`, `usage`,
`assigned`, `claimed`, `dropped`, `available`, `detach`, `attach`, `parked`, `woken`,
`checkpointed`, `restored`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import open_device
from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, DeviceError, ReplicaError
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.contextdesk import ContextDesk, OpenContexts
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.parkdesk import ParkDesk
from coldframe.loader.process import collect_garbage, remove_run_dir
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import MAX_FDS, Channel, Message

# What only those need whose KV travels.
if TYPE_CHECKING:
    from coldframe.loader.transport.desk import TransferDesk

__all__ = ["MemoryService", "SOCKET_NAME", "main"]

SOCKET_NAME = "memory.sock"
_TICK_S = 1.0
_SEND_TIMEOUT_S = 10
_OPENING_S = 0.2
_OF_TRANSFERS = ("transfer", "offer", "lend", "lent_back")


class MemoryService:
    """The service's state and its loop.

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
        self._recorder = recorder
        self._device: Device = open_device("cpu")
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._owner = Connection("owner", owner)
        self._clients: dict[int, Connection] = {}
        self._add(self._owner)
        self._next_key = 0
        self._run_dir = run_dir
        self._listener: socket.socket | None = None
        self._load: Load | None = None
        self._load_began_s = 0.0
        self._processor_s: float | None = None
        """Processor time that the load has taken, once it has ended."""
        self._load_ended = False
        self._ready: list[int] = []
        self._planned = False
        self._failure: ColdframeError | None = None
        self._wished: bool | None = None
        self._moving = False
        self._moved: Callable[[], None] | None = None
        self._kv = KvDesk(
            self._send,
            lambda: self._clients.values(),
            self._post,
            self._report,
            lambda sized: self._send(self._owner, {"type": "sized", **sized}),
        )
        self._park = ParkDesk(
            self._owner,
            self._send,
            self._send_segments,
            lambda: self._clients.values(),
            self._post,
            self._report,
            recorder,
        )
        self._contexts = ContextDesk(
            *(self._owner, self._send, self._post, self._hold, lambda: self._device),
            *(recorder, open_contexts),
        )
        self._transfers: TransferDesk | None = None
        self._running = True

    def run(self) -> None:
        """Serves until the owner is gone."""
        # Before any lease is taken: unhandled, the signal would end this process.
        signal.signal(signal.SIGIO, lambda *_: self._post(self._check_lease))
        # The first message is on its way already: load first, listen while it starts.
        self._receive(self._owner)
        if self._running:
            self._listen()
        collect_garbage()
        next_tick = time.monotonic() + _TICK_S
        while self._running:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                self._dispatch(key)
            self._kv.tell_changes()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                self._check_lease()
                self._kv.tick()
                if self._transfers is not None:
                    self._transfers.tick()

    def close(self) -> None:
        device_is_used = not self._contexts.close()
        if self._transfers is not None:
            self._transfers.close()
        self._kv.close()
        self._park.close()
        if self._load is not None:
            self._opening.join(_OPENING_S)
            # One that is still being opened is left to the end of the process.
            if not self._opening.is_alive():
                self._load.close()
                if not device_is_used:
                    self._device.close()
        if self._listener is not None:
            self._listener.close()
        for client in self._clients.values():
            client.close()

    # -- the loop --------------------------------------------------------------------------------

    def _listen(self) -> None:
        start = now()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.path.join(self._run_dir, SOCKET_NAME))
        listener.listen(64)
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, listener)
        self._recorder.add("listen", start)
        self._send(self._owner, {"type": "listening"})
        # Idle until a load comes: what it will need takes some milliseconds to import.
        import hashlib  # noqa: F401

    def _dispatch(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            os.eventfd_read(self._wakeup)
            while self._posted:
                self._posted.popleft()()
        elif isinstance(key.data, Connection):
            self._receive(key.data)
        else:
            sock, _ = key.data.accept()
            self._next_key += 1
            self._add(Connection(f"client-{self._next_key}", Channel(sock)))

    def _add(self, client: Connection) -> None:
        client.channel.set_send_timeout(_SEND_TIMEOUT_S)
        self._clients[client.channel.fileno()] = client
        self._selector.register(client.channel.fileno(), selectors.EVENT_READ, client)

    def _receive(self, client: Connection) -> None:
        messages, ended = client.channel.receive_ready()
        for fd in [fd for message in messages for fd in message.fds]:
            os.close(fd)  # nobody has any to send here
        try:
            for message in messages:
                # Once it is gone nothing may be booked on it any more: it would never come back.
                if not client.gone:
                    self._handle(client, message)
        except Exception as error:  # noqa: BLE001 - who talks nonsense harms only itself
            with contextlib.suppress(OSError):
                print(f"coldframe memory: {client.key} {client.name}: {error!r}", file=sys.stderr)
            ended = True
        if ended:
            self._remove(client)

    def _remove(self, client: Connection) -> None:
        fd = client.channel.fileno()
        if self._clients.pop(fd, None) is None:
            return
        client.gone = True
        self._selector.unregister(fd)
        client.close()
        if client is self._owner:
            self._running = False
        if self._transfers is not None:
            self._transfers.gone(client)
        self._kv.gone(client)
        self._park.gone(client)
        self._finish_move()

    def _send(self, client: Connection, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        try:
            client.send(body, fds)
        except ReplicaError:
            self._remove(client)

    def _hold(self, name: str, held: bool) -> None:
        """Holds back what is sent to a worker, or lets it go."""
        for client in [client for client in self._attached() if client.name == name]:
            try:
                client.hold() if held else client.release()
            except ReplicaError:
                self._remove(client)

    def _post(self, action: Callable[[], None]) -> None:
        """Runs an action in the loop; for threads and signal handlers."""
        self._posted.append(action)
        os.eventfd_write(self._wakeup, 1)

    def _handle(self, client: Connection, message: Message) -> None:
        handler = getattr(self, f"_on_{message.kind}", None)
        for desk in (self._kv, self._park, self._contexts):
            handler = handler or getattr(desk, f"on_{message.kind}", None)
        if handler is None and message.kind in _OF_TRANSFERS:
            handler = getattr(self._open_transfers(), f"on_{message.kind}")
        if handler is None:
            raise ReplicaError("unknown message", where=client.key, got=message.kind)
        body = {key: value for key, value in message.body.items() if key != "type"}
        handler(client, **body)

    # -- weights ---------------------------------------------------------------------------------

    def _on_load(self, client: Connection, **options: Any) -> None:
        if client is not self._owner or self._load is not None:
            raise ReplicaError("only the owner loads, and once", where=client.key)
        wanted = LoadOptions.from_wire(options)
        self._load_began_s = time.process_time()
        try:
            self._device = open_device(wanted.device)
        except DeviceError as error:
            self._report(error)
            return
        # What it takes to bring it up goes on beside opening the checkpoint and the first reads.
        self._device.start(lambda: self._post(self._device_up))
        kind = Load
        if wanted.beside is not None:
            from coldframe.loader.loads.beside import LoadBeside

            kind = LoadBeside
        self._load = kind(
            wanted,
            self._device,
            self._recorder,
            files_dir=os.path.join(self._run_dir, "model"),
            on_files=lambda path: self._post(lambda: self._files_now(path)),
            on_plan=lambda: self._post(self._planned_now),
            on_stage=lambda stage: self._post(lambda: self._stage_now(stage)),
            on_end=lambda error: self._post(lambda: self._ended_now(error)),
            on_kept=lambda why: self._post(lambda: self._kept_now(why)),
        )
        self._opening = threading.Thread(target=self._run_load, name="load", daemon=True)
        self._opening.start()

    def _device_up(self) -> None:
        """The device is up, or will not be; who waits for it need not wait for the load as well."""
        try:
            found = self._device.report()
        except ColdframeError as error:
            self._report(error)
        else:
            self._send(self._owner, {"type": "device", **asdict(found)})

    def _run_load(self) -> None:
        assert self._load is not None
        try:
            self._load.run()
        except ColdframeError as error:
            failure = error
            self._post(lambda: self._ended_now(failure))
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            broken = ReplicaError("the load broke", got=repr(error))
            self._post(lambda: self._ended_now(broken))

    def _files_now(self, path: str) -> None:
        assert self._load is not None
        self._send(self._owner, {"type": "files", "path": path, "local": self._load.local})

    def _planned_now(self) -> None:
        assert self._load is not None
        self._planned = True
        self._kv.model_is(self._load.identity)
        self._kv.weights_lie()
        for client in list(self._attached()):
            self._send_plan(client)
        self._send_plan(self._owner)

    def _stage_now(self, stage: int) -> None:
        self._ready.append(stage)
        for client in list(self._attached()):
            self._send(client, {"type": "stage", "stage": stage})

    def _ended_now(self, error: ColdframeError | None) -> None:
        self._load_ended = True
        if self._load is not None:
            self._load.landed()
            if error is None:
                self._park.loaded(self._load.parked, len(self._load.plan.stages))
        self._report(error)
        self._check_proven()
        self._check_lease()

    def _kept_now(self, why: str | None) -> None:
        self._send(self._owner, {"type": "kept", "why": why})

    def _report(self, error: ColdframeError | None) -> None:
        spans = [span.to_wire() for span in self._recorder.drain()]
        if error is None:
            assert self._load is not None
            if self._processor_s is None:
                self._processor_s = time.process_time() - self._load_began_s
            body: dict[str, Any] = {"type": "loaded", **self._facts(self._load)}
        else:
            self._failure = error
            body = {"type": "failed", "error": error.to_wire()}
            for client in list(self._attached()):
                self._send(client, body)
        self._send(self._owner, {**body, "spans": spans})

    def _check_proven(self) -> None:
        if self._load is not None and self._failure is None and self._load.proven:
            self._kv.weights_are_proven()

    def _facts(self, load: Load) -> dict[str, Any]:
        """What the owner is told of a load that has ended well."""
        return {
            "mode": load.mode,
            "why": load.why,
            "verified": load.verified,
            "peers_at": load.peers_at,
            "processor_s": self._processor_s,
        }

    def _attached(self) -> Iterator[Connection]:
        return (client for client in self._clients.values() if client.attached)

    def _send_plan(self, client: Connection, *, away: bool = False) -> None:
        assert self._load is not None
        load = self._load
        body = {"type": "plan", "mode": load.mode, "weights_bytes": load.plan.weights_bytes}
        if not client.attached:  # the owner watches, and maps nothing
            body["fingerprint"] = load.plan.fingerprint
            if not load.local:  # where the headers are out of its reach
                placements = load.plan.placements.values()
                body["tensors"] = [[p.name, p.dtype, p.shape] for p in placements]
            self._send(client, body, (load.board.fd,))
            return
        body |= {"plan": load.plan.to_wire(), "away": away}
        self._send(client, body, (load.board.fd,))
        if not away:
            self._send_segments(client, "segments", load.segments)

    def _send_segments(
        self,
        client: Connection,
        kind: str,
        segments: list[Segment],
        more: dict[str, Any] | None = None,
    ) -> None:
        for start in range(0, len(segments), MAX_FDS):
            some = segments[start : start + MAX_FDS]
            body = {
                **(more or {}),
                "type": kind,
                "segments": [segment.to_wire() for segment in some],
                "last": start + MAX_FDS >= len(segments),
            }
            self._send(client, body, tuple(segment.fd for segment in some))

    def _on_hello(self, client: Connection, name: str) -> None:
        if client.attached or client is self._owner:
            raise ReplicaError("a worker says hello, and once", where=client.key, got=name)
        client.name = name
        client.attached = True
        if self._planned:
            self._send_plan(client, away=not self._park.came(client))
        for stage in self._ready if self._park.ready is None else list(self._park.ready):
            self._send(client, {"type": "stage", "stage": stage})
        self._kv.greet(client)
        if self._failure is not None:
            self._send(client, {"type": "failed", "error": self._failure.to_wire()})

    # -- when somebody wants to write to a mapped file -------------------------------------------

    def _check_lease(self) -> None:
        load = self._load
        if load is None or not self._load_ended or self._failure is not None or self._moving:
            return
        if load.mode == "copied" or not load.writer_waits:
            return
        self._moving = True
        # A large model takes seconds to copy; requests go on meanwhile.
        threading.Thread(target=self._move_out, args=(load,), name="move", daemon=True).start()

    def _move_out(self, load: Load) -> None:
        try:
            segments = load.move_out()
        except ColdframeError as error:
            # The writer is held back still, as long as the kernel does that, or until the last
            # of those who have the files mapped is gone: they must not compute with new bytes.
            failure = error
            self._post(lambda: self._report(failure))
        else:
            self._post(lambda: self._moved_now(segments))

    def _moved_now(self, segments: list[Segment]) -> None:
        assert self._load is not None
        load = self._load
        load.adopt(segments)
        self._send_to_all("remap", {}, segments, load.let_go)

    def _on_settle(self, client: Connection, realign: bool) -> None:
        """The first token is out: now there is time for what would have delayed it.

        Badly aligned weights are laid out as kernels want them, where that is wished; a mapped
        file that could not be checked before it was used is held against its seal.
        """
        if client is not self._owner:
            raise ReplicaError("only the owner says when the first token is out", where=client.key)
        self._wished = realign
        self._settle()

    def _settle(self) -> None:
        """Does what was wished, unless the weights are on the way elsewhere: then, after that."""
        load, realign = self._load, self._wished
        if load is None or not self._load_ended or self._failure is not None or self._moving:
            return
        target = None
        if realign is None:
            return
        if realign and load.may_realign:
            target = self._realign
        elif load.must_verify:
            target = self._verify
        if target is not None:
            self._moving = True
            threading.Thread(target=target, args=(load,), name="settle", daemon=True).start()

    def _verify(self, load: Load) -> None:
        started = now()
        try:
            load.verify()
        except ColdframeError as error:
            failure = error
            self._post(lambda: self._report(failure))
        else:
            self._recorder.add("verify", started)
            self._post(self._verified_now)

    def _verified_now(self) -> None:
        assert self._load is not None
        self._moving = False
        spans = [span.to_wire() for span in self._recorder.drain()]
        self._send(self._owner, {"type": "moved", **self._facts(self._load), "spans": spans})
        self._check_proven()
        self._check_lease()
        self._settle()  # it may have been ended early

    def _realign(self, load: Load) -> None:
        started = now()
        try:
            plan, arena = load.realign()
        except DeviceError:
            self._post(self._not_realigned)
        except ColdframeError as error:
            failure = error
            self._post(lambda: self._report(failure))
        else:
            self._recorder.add("realign", started)
            self._post(lambda: self._realigned_now(plan, arena))

    def _not_realigned(self) -> None:
        self._moving = False
        self._wished = False
        self._check_lease()
        self._settle()

    def _realigned_now(self, plan: Plan, arena: Arena) -> None:
        assert self._load is not None
        load = self._load
        load.adopt_layout(plan, arena)
        self._check_proven()
        self._send_to_all("relaid", {"plan": plan.to_wire()}, load.segments, load.retire)

    def _send_to_all(
        self,
        kind: str,
        body: dict[str, Any],
        segments: list[Segment],
        done: Callable[[], None],
    ) -> None:
        """Tells the workers where the weights are now; `done` once none uses the old place."""
        assert self._load is not None
        self._moved = done
        spans = [span.to_wire() for span in self._recorder.drain()]
        self._send(self._owner, {"type": "moved", **self._facts(self._load), "spans": spans})
        attached = list(self._attached())
        for client in attached:
            client.remapping = True
        for client in attached:
            self._send_segments(client, kind, segments, body)
        self._finish_move()

    def _on_remapped(self, client: Connection) -> None:
        client.remapping = False
        self._finish_move()

    def _finish_move(self) -> None:
        if self._moved is None or any(client.remapping for client in self._clients.values()):
            return
        done, self._moved, self._moving = self._moved, None, False
        done()
        self._settle()

    def _on_usage(self, client: Connection) -> None:
        """What is asked for when somebody looks at the replica's metrics."""
        if client is not self._owner:
            raise ReplicaError("only the owner asks what is in use", where=client.key)
        kv = {f"kv_{name}": count for name, count in asdict(self._kv.usage()).items()}
        kv |= self._kv.store_usage().to_wire()
        done = self._load.board.progress.done if self._load is not None and self._planned else 0
        self._send(self._owner, {"type": "usage", **kv, "bytes_done": done})

    def _on_discard(self, client: Connection) -> None:
        """The replica is parked: what can be had again, goes."""
        if client is not self._owner:
            raise ReplicaError("only the owner gives memory back", where=client.key)
        self._kv.discard()

    def _open_transfers(self) -> TransferDesk:
        if self._transfers is None:
            from coldframe.loader.transport.desk import TransferDesk

            self._transfers = TransferDesk(
                *(self._kv, self._send, self._post, self._report),
                lambda: self._device,
                os.path.join(self._run_dir, SOCKET_NAME),
            )
        return self._transfers

    def _on_bring(self, client: Connection, ticket: Any = None, **wanted: Any) -> None:
        if ticket is not None:
            self._open_transfers().bring(client, ticket, **wanted)
            return
        from coldframe.loader.loads.beside import LoadBeside

        if not isinstance(self._load, LoadBeside):
            raise ReplicaError("there is no other device to bring KV from", where=client.key)
        self._kv.bring(client, self._load.bring, **wanted)

    def _on_kv(self, client: Connection, **sizes: Any) -> None:
        if client is not self._owner:
            raise ReplicaError("only the owner sizes the KV", where=client.key)
        self._kv.open_arena(self._device, **sizes)


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
