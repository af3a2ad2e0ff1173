"""A process with an emulated GPU whose context is to be frozen, and that does what a test says."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver, Memory
from tests.loader.devices.emulator import GRANULARITY, Emulator

__all__ = ["Target", "target"]


class Target:
    """The test's end of it.

    Args:
        pid: The process.
        control: Where it is told what to do.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control

    def ask(self, order: str) -> str:
        """Has it do something, and waits for the answer."""
        self.tell(order)
        return self.answer()

    def tell(self, order: str) -> None:
        self.control.sendall(order.encode())

    def answer(self) -> str:
        return self.control.recv(64).decode()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0


@contextmanager
def target(**emulated: Any) -> Iterator[Target]:
    """A process with a context on an emulated GPU; see `Emulator` for the arguments."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _follow(theirs, **emulated)
        except BaseException:  # noqa: BLE001 - it must not go on as the test
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(20)
    found = Target(pid, ours)
    try:
        assert found.answer() == "up"
        yield found
    finally:
        ours.close()
        if found.pid:
            found.kill()


def create(driver: Driver, *, shareable: bool) -> Memory:
    """Memory that others can have, or that they cannot."""
    kinds = driver.api.CUmemAllocationHandleType
    properties = driver.api.CUmemAllocationProp()
    properties.type = driver.api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    if shareable:
        properties.requestedHandleTypes = kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    memory: Memory = driver.call("none", "cuMemCreate", GRANULARITY, properties, 0)
    return memory


def _follow(control: socket.socket, **emulated: Any) -> None:
    emulator = Emulator(**emulated)
    driver = Driver.open(emulator)
    context = Context(driver, 0)
    context.bind()
    address = driver.reserve(GRANULARITY, GRANULARITY, 0)
    control.sendall(b"up")
    while order := control.recv(64).decode():
        if order in ("map", "map own"):
            memory = create(driver, shareable=order == "map")
            driver.map(address, GRANULARITY, memory)
            driver.release(memory)
        elif order == "unmap":
            driver.unmap(address, GRANULARITY)
        elif order == "call":
            driver.memory_info()
        elif order == "busy":
            with emulator.going():
                control.sendall(b"busy")
                order = control.recv(64).decode()
        control.sendall(order.encode())
