"""Addresses of a GPU that a process keeps when it lets go of what is behind them, for later."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ArenaError
from coldframe.loader.memory_client import client as client_module
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
from tests.loader.devices.emulator import GRANULARITY, Emulator
from tests.loader.devices.test_service_cuda import Served, in_threads, until
from tests.loader.weights import arena_tensors, layered, reference

WEIGHTS, KV = 0x5100_0000_0000, 0x5200_0000_0000
"""Where they lie for the client: the service has its own in the same process."""
ROOM = 64 * GRANULARITY


class Kept:
    """A driver with addresses that are reserved, as a worker has them that is to be frozen."""

    def __init__(self, served: Served, size: int = ROOM) -> None:
        self.served = served
        self.emulator = Emulator()
        self.device = CudaDevice(0, self.emulator)
        self.reserved = [self.device.mapping(size, base, exact=True) for base in (WEIGHTS, KV)]

    def attach(self) -> MemoryClient:
        channel = Channel.connect(self.served.path)
        return MemoryClient(channel, "kept", reserved=self.reserved, device=self.device)

    def close(self) -> None:
        for reservation in self.reserved:
            reservation.close()
        self.device.close()
        assert self.emulator.left() == []


@pytest.fixture
def served(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setattr(client_module, "WEIGHTS_BASE", WEIGHTS)
    monkeypatch.setattr(client_module, "KV_BASE", KV)
    emulator = Emulator()
    in_threads(monkeypatch, emulator)
    made = Served(emulator, tmp_path_factory.mktemp("r"), layered(tmp_path / "m"))
    made.expect("loaded")
    yield made
    made.close()
    emulator.close()


def seen(client: MemoryClient) -> dict[str, bytes]:
    """What a client sees of the weights."""
    plan, weights, _ = client.wait_arenas()
    until(lambda: client.complete)
    memory = (ctypes.c_char * plan.arena_bytes).from_address(weights.address)
    return arena_tensors(plan, memoryview(memory).cast("B"))


def test_they_are_kept_and_taken_again(served: Served) -> None:
    kept, expected = Kept(served), reference(served.model)
    calls = kept.emulator.calls
    for _ in range(2):
        client = kept.attach()
        assert seen(client) == expected
        assert client.kv is not None
        assert (client.weights, client.kv.reservation) == tuple(kept.reserved)
        mapped = kept.emulator.used
        client.leave()
        assert kept.emulator.used < mapped
        # Nothing of others is left, but every address.
        assert [thing.split()[0] for thing in kept.emulator.left()] == [
            "reservation",
            "reservation",
            "context",
        ]
    assert (calls["cuMemAddressReserve"], calls["cuMemAddressFree"]) == (2, 0)
    kept.close()


def too_small(reservation: DeviceReservation, then: Callable[[], object] = lambda: None) -> None:
    """Has a reservation look as if it were of no use for what is wanted.

    Args:
        reservation: Which.
        then: Called when it is given up.
    """
    size, reservation.size = reservation.size, 1

    def close() -> None:
        reservation.size = size
        DeviceReservation.close(reservation)
        then()

    reservation.close = close  # type: ignore[method-assign]


def test_more_of_them_at_the_same_place(served: Served) -> None:
    kept = Kept(served)
    too_small(kept.reserved[0])
    client = kept.attach()
    assert seen(client) == reference(served.model)
    assert client.weights is not None
    assert client.weights.address == WEIGHTS
    assert client.weights is not kept.reserved[0]
    client.close()
    kept.close()


def test_an_address_that_cannot_be_had_again(served: Served) -> None:
    kept = Kept(served)
    # Somebody is faster, as a library may be that was loaded since.
    driver = kept.device.context.driver
    too_small(kept.reserved[0], lambda: driver.reserve(GRANULARITY, 0, WEIGHTS))
    client = kept.attach()
    with pytest.raises(ArenaError, match="the arena's address is taken"):
        client.wait_arenas()
    client.close()
    driver.free_addresses(WEIGHTS, GRANULARITY)
    kept.reserved.pop(0)
    kept.close()
