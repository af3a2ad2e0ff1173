"""The memory service's desk for weights: the load, and who is told how far it is.

Messages in:  `load` (from the owner), `hello` (from workers).
Messages out: `device`, `files`, `plan` (board and segments), `stage`, `loaded`, `kept`, and
`failed` by way of the reporter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from coldframe.loader.devices import open_device
from coldframe.loader.devices.base import Device
from coldframe.loader.errors import ColdframeError, DeviceError, ReplicaError
from coldframe.loader.loads.base import AnyLoad, LoadEvents
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.movable import MovableWeights
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.parkdesk import ParkDesk
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.memory_service.settledesk import SettleDesk
from coldframe.loader.timeline import Recorder

__all__ = ["WeightsDesk"]

_OPENING_S = 0.2


class WeightsDesk:
    """Has the one load of this service; see `AnyLoad`.

    Args:
        reactor: The loop.
        reporter: Tells the owner.
        recorder: Gets the spans of the load.
        run_dir: The replica's private directory.
        kv: Told of the weights that KV is made with.
        park: Told when they are in.
        settle: Likewise.

    Attributes:
        device: Where weights and KV are; the CPU before a load says so.
        load: The load, once it has been asked for.
    """

    def __init__(
        self,
        reactor: Reactor,
        reporter: Reporter,
        recorder: Recorder,
        run_dir: str,
        *,
        kv: KvDesk,
        park: ParkDesk,
        settle: SettleDesk,
    ) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._recorder = recorder
        self._run_dir = run_dir
        self._kv = kv
        self._park = park
        self._settle = settle
        self.device: Device = open_device("cpu")
        self.load: AnyLoad | None = None
        self._opening: threading.Thread | None = None
        self._began_s = 0.0
        self._processor_s: float | None = None
        """Processor time that the load has taken, once it has ended."""
        self._ready: list[int] = []
        self._planned = False

    def close(self, *, device_is_used: bool) -> None:
        """Ends the load, and lets the device go unless somebody is at it still."""
        if self.load is None or self._opening is None:
            return
        self._opening.join(_OPENING_S)
        # One that is still being opened is left to the end of the process.
        if not self._opening.is_alive():
            self.load.close()
            if not device_is_used:
                self.device.close()

    @property
    def bytes_done(self) -> int:
        """Bytes of weights that are in."""
        return self.load.board.progress.done if self.load is not None and self._planned else 0

    def facts(self) -> dict[str, Any]:
        """What the owner is told of a load that has ended well."""
        assert self.load is not None
        weights = self.load.weights
        return {
            "mode": weights.mode,
            "why": weights.why,
            "verified": weights.verified,
            "peers_at": self.load.peers_at,
            "processor_s": self._processor_s,
        }

    def check_proven(self) -> None:
        """Says so where the weights are known to be the right ones by now."""
        if self.load is not None and self._reporter.failure is None and self.load.proven:
            self._kv.weights_are_proven()

    # -- messages --------------------------------------------------------------------------------

    def on_load(self, client: Connection, **options: Any) -> None:
        client.require_owner("loads, and once")
        if self.load is not None:
            raise ReplicaError("there is a load already", where=client.key)
        wanted = LoadOptions.from_wire(options)
        self._began_s = time.process_time()
        try:
            self.device = open_device(wanted.device)
        except DeviceError as error:
            self._reporter.fail(error)
            return
        # What it takes to bring it up goes on beside opening the checkpoint and the first reads.
        self.device.start(lambda: self._reactor.post(self._device_up))
        self.load = self._make(wanted)
        self._opening = threading.Thread(
            target=self._run, args=(self.load,), name="load", daemon=True
        )
        self._opening.start()

    def on_hello(self, client: Connection, name: str) -> None:
        if client.attached or client is self._reactor.owner:
            raise ReplicaError("a worker says hello, and once", where=client.key, got=name)
        client.name = name
        client.attached = True
        if self._planned:
            self._send_plan(client, away=not self._park.came(client))
        for stage in self._ready if self._park.ready is None else list(self._park.ready):
            self._reactor.send(client, {"type": "stage", "stage": stage})
        self._kv.greet(client)
        if self._reporter.failure is not None:
            failed = {"type": "failed", "error": self._reporter.failure.to_wire()}
            self._reactor.send(client, failed)

    # -- the load, in a thread -------------------------------------------------------------------

    def _make(self, options: LoadOptions) -> AnyLoad:
        def soon(do: Callable[..., None]) -> Callable[..., None]:
            return lambda *given: self._reactor.post(lambda: do(*given))

        events = LoadEvents(
            on_files=soon(self._files_now),
            on_plan=soon(self._planned_now),
            on_stage=soon(self._stage_now),
            on_end=soon(self._ended_now),
            on_kept=soon(self._kept_now),
        )
        if options.beside is not None:
            from coldframe.loader.loads.beside import LoadBeside

            return LoadBeside(options.beside, self.device, self._recorder, events)
        files_dir = os.path.join(self._run_dir, "model")
        return Load(options, self.device, self._recorder, events, files_dir=files_dir)

    def _run(self, load: AnyLoad) -> None:
        try:
            load.run()
        except ColdframeError as error:
            failure = error
            self._reactor.post(lambda: self._ended_now(failure))
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            broken = ReplicaError("the load broke", got=repr(error))
            self._reactor.post(lambda: self._ended_now(broken))

    # -- how it goes, in the loop ----------------------------------------------------------------

    def _device_up(self) -> None:
        """The device is up, or will not be; who waits for it need not wait for the load as well."""
        try:
            found = self.device.report()
        except ColdframeError as error:
            self._reporter.fail(error)
        else:
            self._reactor.send(self._reactor.owner, {"type": "device", **asdict(found)})

    def _files_now(self, path: str) -> None:
        assert self.load is not None
        body = {"type": "files", "path": path, "local": self.load.local}
        self._reactor.send(self._reactor.owner, body)

    def _planned_now(self) -> None:
        assert self.load is not None
        self._planned = True
        self._kv.model_is(self.load.identity)
        self._kv.weights_lie()
        for worker in self._reactor.workers:
            self._send_plan(worker)
        self._send_plan(self._reactor.owner)

    def _stage_now(self, stage: int) -> None:
        self._ready.append(stage)
        for worker in self._reactor.workers:
            self._reactor.send(worker, {"type": "stage", "stage": stage})

    def _ended_now(self, error: ColdframeError | None) -> None:
        assert self.load is not None
        self.load.landed()
        if error is not None:
            self._reporter.fail(error)
            return
        weights = self.load.weights
        self._park.loaded(weights.parked, len(weights.plan.stages))
        if self._processor_s is None:
            self._processor_s = time.process_time() - self._began_s
        self._reporter.tell({"type": "loaded", **self.facts()})
        self.check_proven()
        if isinstance(weights, MovableWeights):
            self._settle.loaded(weights)

    def _kept_now(self, why: str | None) -> None:
        self._reactor.send(self._reactor.owner, {"type": "kept", "why": why})

    def _send_plan(self, client: Connection, *, away: bool = False) -> None:
        assert self.load is not None
        load, weights = self.load, self.load.weights
        plan = weights.plan
        body = {"type": "plan", "mode": weights.mode, "weights_bytes": plan.weights_bytes}
        if not client.attached:  # the owner watches, and maps nothing
            body["fingerprint"] = plan.fingerprint
            if not load.local:  # where the headers are out of its reach
                body["tensors"] = [[p.name, p.dtype, p.shape] for p in plan.placements.values()]
            self._reactor.send(client, body, (load.board.fd,))
            return
        body |= {"plan": plan.to_wire(), "away": away}
        self._reactor.send(client, body, (load.board.fd,))
        if not away:
            self._reactor.send_segments(client, "segments", weights.segments)
