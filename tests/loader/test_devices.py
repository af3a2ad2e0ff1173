from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from coldframe.loader.arena import HUGE_PAGE, Reservation, Segment
from coldframe.loader.devices import open_device
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.errors import ArenaError, DeviceError


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        open_device("abacus")


@pytest.mark.parametrize("now", [False, True])
def test_memory_is_zero_shared_and_as_large_as_asked(now: bool) -> None:
    device = open_device("cpu")
    arena = device.arena("test", 5 * HUGE_PAGE + 1, now=now)
    (segment,) = arena.segments
    assert arena.size == arena.grown == segment.length == 5 * HUGE_PAGE + mmap.PAGESIZE
    assert segment.writable is not now
    other = device.mapping(arena.size)
    assert isinstance(other, Reservation)
    other.attach(arena.segments)
    view = arena.view(0, arena.size)
    assert view is not None
    assert bytes(view[:100]) == bytes(100)
    view[5 * HUGE_PAGE] = 7
    assert other.view()[5 * HUGE_PAGE] == 7
    arena.write(3, memoryview(bytearray(b"abc")))
    data = memoryview(bytearray(4))
    arena.read(2, data)
    assert bytes(data) == b"\0abc"
    other.detach()
    other.attach(arena.segments)
    assert bytes(other.view(3, 3)) == b"abc"
    other.close()
    arena.close()


def test_what_is_discarded_is_zero_again_and_stays_mapped() -> None:
    arena = open_device("cpu").arena("kv", 4 * HUGE_PAGE, now=False)
    other = Reservation(arena.size)
    other.attach(arena.segments)
    other.view()[HUGE_PAGE] = 1
    assert not arena.discard()
    assert other.view()[HUGE_PAGE] == 0
    other.view()[HUGE_PAGE] = 2
    view = arena.view(HUGE_PAGE, 1)
    assert view is not None
    assert view[0] == 2
    with pytest.raises(ArenaError, match="cannot grow"):
        arena.grow(1)
    other.close()
    arena.close()


def test_more_than_there_is_is_refused() -> None:
    device = open_device("cpu")
    with pytest.raises(DeviceError, match="not enough memory for the weights"):
        device.arena("weights", device.available() * 2, now=True)


def test_huge_memory_really_lies_in_huge_pages() -> None:
    found = allocate_huge("test", 3 * HUGE_PAGE)
    if found is None:  # neither reserved pages nor the right to mount: the memfd is tested above
        assert os.geteuid() != 0 or not Path("/proc/meminfo").read_text().count("ShmemHugePages")
        return
    fd, how = found
    arena = Reservation(3 * HUGE_PAGE)
    assert arena.address % HUGE_PAGE == 0
    arena.attach([Segment(fd, 0, 3 * HUGE_PAGE, 0, True)])
    arena.view()[0] = 1
    arena.view()[2 * HUGE_PAGE] = 1
    huge = {"hugetlb": "Shared_Hugetlb:", "tmpfs": "ShmemPmdMapped:"}[how]
    assert _mapped_kb(arena.address, huge) >= 2 * HUGE_PAGE // 1024
    arena.close()
    os.close(fd)
    assert not [
        line for line in Path("/proc/self/mounts").read_text().splitlines() if "huge=" in line
    ]


def _mapped_kb(address: int, field: str) -> int:
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            here = int(words[0].split("-")[0], 16) == address
        elif here and words[0] == field:
            return int(words[1])
    return 0
