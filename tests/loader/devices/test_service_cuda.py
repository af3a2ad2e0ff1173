"""A memory service whose weights are on an emulated GPU, and its clients, in one process.

So that the test has the GPU in its hands. Each client has contexts and mappings of its own.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.arena import WEIGHTS_BASE
from coldframe.loader.devices import Device, open_device
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.errors import ColdframeError, DeviceFull, DeviceLost
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.memory_service import service as service_module
from coldframe.loader.memory_service import weightsdesk
from coldframe.loader.memory_service.contextdesk import OpenContexts
from coldframe.loader.memory_service.service import SOCKET_NAME, MemoryService
from coldframe.loader.process import make_run_dir, remove_run_dir
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel, Message
from tests.loader.devices.emulator import Emulator
from tests.loader.web.test_peer_loading import node
from tests.loader.weights import arena_tensors, layered, reference

PATIENCE_S = 60.0
ROOMY = 64 << 30


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.001)


class Worker:
    """A client, that does what a worker's main thread does, when the test wants it."""

    def __init__(self, emulator: Emulator, path: str, name: str, ordinal: int = 0) -> None:
        self.device = CudaDevice(ordinal, emulator)
        self.client = MemoryClient(Channel.connect(path), name, device=self.device)

    def tensors(self) -> dict[str, bytes]:
        """What it sees of the weights, once they are in."""
        plan, weights, _ = self.client.wait_arenas()
        until(lambda: self.client.complete)
        memory = (ctypes.c_char * plan.arena_bytes).from_address(weights.address)
        return arena_tensors(plan, memoryview(memory).cast("B"))

    def let_go(self) -> None:
        """Lets go of the weights, as it is asked to."""
        until(lambda: self.client.is_to_let_go)
        self.client.let_go()

    def close(self) -> None:
        self.client.close()
        self.device.close()


class Served:
    """The service in a thread, with this test as its owner."""

    def __init__(
        self,
        emulator: Emulator,
        base: Path,
        model: Path,
        ordinal: int = 0,
        open_contexts: OpenContexts | None = None,
        **load: Any,
    ) -> None:
        self.emulator = emulator
        self.model = model
        self.ordinal = ordinal
        self.run_dir, self.lock = make_run_dir(str(base))
        self.owner, theirs = Channel.pair()
        self.service = MemoryService(theirs, self.run_dir, Recorder("memory"), open_contexts)
        self.workers: list[Worker] = []
        load = {"model": str(model), "device": f"cuda:{ordinal}", **load}
        self.owner.send({"type": "load", **load})
        self.owner.send({"type": "kv", "blocks": 4, "block_bytes": 1000, "lease_s": 30.0})
        self.thread = threading.Thread(target=self._run, name="cuda-service", daemon=True)
        self.thread.start()
        self.expect("listening")

    @property
    def path(self) -> str:
        return f"{self.run_dir}/{SOCKET_NAME}"

    def _run(self) -> None:
        try:
            self.service.run()
        finally:
            self.service.close()

    def expect(self, *kinds: str) -> Message:
        while (message := self.owner.recv(timeout=PATIENCE_S)) is not None:
            if message.kind in kinds:
                return message
        raise AssertionError(f"the service ended without {kinds}")

    def order(self, what: str) -> None:
        self.owner.send({"type": what})

    def hear(self, what: str) -> ColdframeError | None:
        """What the service says of an order: nothing, or why it was not met."""
        error: dict[str, Any] | None = self.expect(what).body["error"]
        return None if error is None else ColdframeError.from_wire(error)

    def worker(self) -> Worker:
        made = Worker(self.emulator, self.path, f"w{len(self.workers)}", self.ordinal)
        self.workers.append(made)
        return made

    def close(self) -> None:
        self.emulator.go.set()
        for worker in self.workers:
            worker.close()
        self.owner.close()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        remove_run_dir(self.run_dir)


def in_threads(patch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    """Has services that are made from now on run in threads, on an emulated GPU."""

    def device(name: str) -> Device:
        kind, _, ordinal = name.partition(":")
        return open_device(name) if kind == "cpu" else CudaDevice(int(ordinal), emulator)

    patch.setattr(weightsdesk, "open_device", device)
    patch.setattr(service_module.signal, "signal", lambda *_: None)  # no main thread's


@pytest.fixture
def served(
    emulator: Emulator,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    in_threads(monkeypatch, emulator)
    # Peers are served wherever a GPU's weights are at the moment.
    sharing = {"serve_peers": "127.0.0.1:0"}
    made = Served(emulator, tmp_path_factory.mktemp("r"), layered(tmp_path / "m"), **sharing)
    yield made
    made.close()


def test_weights_leave_the_gpu_and_come_back_to_the_same_workers(
    served: Served, emulator: Emulator
) -> None:
    served.expect("loaded")
    first, second = served.worker(), served.worker()
    expected = reference(served.model)
    assert first.tensors() == second.tensors() == expected
    weights = emulator.used
    for _ in range(2):
        served.order("park")
        first.let_go()
        assert emulator.used == weights  # the other has it still
        second.let_go()
        assert served.hear("parked") is None
        assert emulator.used < weights
        assert first.client.away
        assert not first.client.complete
        # Who comes meanwhile is up, and waits for the weights like the others.
        late = served.worker()
        late.client.wait_arenas()
        assert late.client.away
        emulator.hold()
        served.order("wake")
        until(lambda: not first.client.away)
        assert not first.client.is_ready(0)
        emulator.go.set()
        assert first.tensors() == second.tensors() == late.tensors() == expected
        assert first.client.weights is not None
        assert first.client.weights.address != WEIGHTS_BASE  # which the service has, in here
        told = served.expect("woken").body
        assert told["error"] is None
        assert "locked memory" in told["note"]
        assert emulator.used == weights
        late.close()
        served.workers.remove(late)


def test_peers_are_served_wherever_the_weights_are(served: Served, emulator: Emulator) -> None:
    host, _, port = served.expect("loaded").body["peers_at"].rpartition(":")
    where, expected = (host, int(port)), reference(served.model)

    def asked() -> dict[str, bytes]:
        with node(where) as peer:
            assert peer.finish() is None
            return peer.tensors()

    assert asked() == expected
    for order, what in (("park", "parked"), ("wake", "woken")):
        served.order(order)
        assert served.hear(what) is None
        copies = emulator.calls["cuMemcpyDtoHAsync"]
        assert asked() == expected
        assert emulator.calls["cuMemcpyDtoHAsync"] == copies  # it was all in host memory


def test_a_worker_that_dies_instead_of_letting_go(served: Served, emulator: Emulator) -> None:
    served.expect("loaded")
    worker = served.worker()
    worker.tensors()
    served.order("park")
    until(lambda: worker.client.is_to_let_go)
    worker.close()
    served.workers.remove(worker)
    assert served.hear("parked") is None
    served.order("wake")
    assert served.hear("woken") is None
    assert served.worker().tensors() == reference(served.model)


def test_others_have_the_memory_meanwhile(served: Served, emulator: Emulator) -> None:
    served.expect("loaded")
    worker = served.worker()
    worker.tensors()
    served.order("park")
    worker.let_go()
    assert served.hear("parked") is None
    device = CudaDevice(0, emulator)
    rival = DeviceArena(device.context, device.available(), writable=True)
    rival.grow(rival.size)
    served.order("wake")
    assert isinstance(served.hear("woken"), DeviceFull)
    assert worker.client.error is None
    rival.close()
    device.close()
    served.order("wake")
    assert served.hear("woken") is None
    assert worker.tensors() == reference(served.model)


def test_a_gpu_that_is_lost_on_the_way_back_is_told_to_all(
    served: Served, emulator: Emulator
) -> None:
    served.expect("loaded")
    worker = served.worker()
    worker.tensors()
    served.order("park")
    worker.let_go()
    assert served.hear("parked") is None
    emulator.fail_copy()
    served.order("wake")
    error = ColdframeError.from_wire(served.expect("failed").body["error"])
    assert isinstance(error, DeviceLost)
    until(lambda: isinstance(worker.client.error, DeviceLost))


def test_who_lets_go_unasked_is_shown_out(served: Served, emulator: Emulator) -> None:
    served.expect("loaded")
    worker, other = served.worker(), served.worker()
    worker.tensors()
    other.tensors()
    served.order("keep")
    worker.client._link.send({"type": "detached"})
    until(lambda: worker.client.error is not None)
    assert other.client.error is None
    served.order("park")
    other.let_go()
    assert served.hear("parked") is None


def test_blocks_of_a_worker_that_died_are_nobodys_for_a_while(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets end before the driver has stopped what it had queued on the GPU."""
    monkeypatch.setattr(DeviceArena, "lingers_s", 3600.0)
    first, second = served.worker(), served.worker()
    first.client.wait_arenas()
    second.client.wait_arenas()
    for request in ("r", "s"):
        served.owner.send({"type": "open", "request": request})
    until(lambda: first.client.assign("r", 0, 4) is not None)
    served.workers.remove(first)
    first.close()
    served.owner.send({"type": "release", "request": "r"})
    assert second.client.assign("s", 0, 1) is None
    desk = served.service._kv
    until(lambda: bool(desk._lingering))
    _, worker = desk._lingering[0]
    served.service._reactor.post(lambda: desk._lingering.__setitem__(0, (0.0, worker)))
    until(lambda: second.client.assign("s", 0, 1) is not None)
