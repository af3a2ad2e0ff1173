"""The link's own limit: one locked buffer, copied by `cuMemcpyHtoDAsync` and nothing around it.

What the loader reaches is held against this, measured beside it in the same process.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from coldframe.loader.arena import HUGE_PAGE, PAGE, round_up
from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.buffers import Buffer, make_buffers
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Stream
from coldframe.loader.errors import DeviceError

__all__ = ["Bare", "bare", "fill", "fitting", "host_buffer", "move"]

_PATTERN = 1 << 20
_TIMES = 8


@dataclass(frozen=True, slots=True)
class Bare:
    """A locked host buffer and as much of the device's memory.

    Attributes:
        context: The device.
        buffer: The host's; full of bytes that do not compress.
        nbytes: Of either.
        arena: The device's.
        streams: Two queues.
    """

    context: Context
    buffer: Buffer
    nbytes: int
    arena: DeviceArena
    streams: tuple[Stream, Stream]

    def rate(self, streams: int = 1) -> float:
        """Copies everything once, in as many pieces as streams: bytes per second."""
        driver = self.context.driver
        piece = self.nbytes // streams
        started = time.perf_counter()
        for number in range(streams):
            begin = number * piece
            end = self.nbytes if number == streams - 1 else begin + piece
            driver.copy_in(
                self.arena.address + begin,
                self.buffer.address + begin,
                end - begin,
                self.streams[number],
            )
        for number in range(streams):
            driver.synchronize(self.streams[number])
        return self.nbytes / (time.perf_counter() - started)

    def out_rate(self) -> float:
        """The same the other way, which overwrites the buffer with what it has: bytes a second."""
        driver = self.context.driver
        started = time.perf_counter()
        driver.copy_out(self.buffer.address, self.arena.address, self.nbytes, self.streams[0])
        driver.synchronize(self.streams[0])
        return self.nbytes / (time.perf_counter() - started)

    def check(self) -> None:
        """Makes sure that the device has what the host has: its last bytes, fetched back.

        Raises:
            DeviceError: It has something else.
        """
        length = min(self.nbytes, _PATTERN)
        at = self.nbytes - length
        back = make_buffers(1, length)[0]
        driver = self.context.driver
        driver.copy_out(back.address, self.arena.address + at, length, self.streams[0])
        driver.synchronize(self.streams[0])
        if back.view != self.buffer.view[at : self.nbytes]:
            raise DeviceError("what was copied is not what has arrived", where=f"{length} bytes")


def fitting(nbytes: int, context: Context) -> int:
    """At most so many bytes, of which host and device both have room for several times."""
    room = min(memory_available(), context.available()) // _TIMES
    return min(nbytes, max(HUGE_PAGE, room // HUGE_PAGE * HUGE_PAGE))


def host_buffer(nbytes: int) -> Buffer:
    """Host memory with nobody's pages in it yet, in huge pages where they can be had."""
    return make_buffers(1, nbytes)[0]


def fill(buffer: Buffer, threads: int = 4) -> None:
    """Writes bytes everywhere that do not compress: zeros may travel faster."""
    pattern = os.urandom(min(_PATTERN, len(buffer.view)))
    source = ctypes.create_string_buffer(pattern, len(pattern))

    def part(begin: int) -> None:
        length = min(len(pattern), len(buffer.view) - begin)
        ctypes.memmove(buffer.address + begin, source, length)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, len(buffer.view), len(pattern))))


def move(to: int, source: int, nbytes: int) -> None:
    """Copies host memory; other threads run meanwhile."""
    ctypes.memmove(to, source, nbytes)


@contextmanager
def bare(context: Context, nbytes: int) -> Iterator[Bare]:
    """A locked, filled buffer, and the device's memory for it; all of it is given back.

    Raises:
        DeviceError: Host memory cannot be locked, or the device has not that much.
    """
    context.bind()
    driver = context.driver
    locked = round_up(nbytes, PAGE)
    buffer = host_buffer(locked)
    fill(buffer)
    arena = DeviceArena(context, nbytes, writable=True)
    try:
        arena.grow(arena.size)
        driver.register_host(buffer.address, locked)
        try:
            streams = driver.stream(), driver.stream()
            try:
                yield Bare(context, buffer, nbytes, arena, streams)
            finally:
                for stream in streams:
                    driver.destroy_stream(stream)
        finally:
            driver.unregister_host(buffer.address)
    finally:
        arena.close()
