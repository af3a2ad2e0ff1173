from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from coldframe.loader.arena import HUGE_PAGE, Reservation, Segment
from coldframe.loader.devices import open_device
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.errors import DeviceError


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        open_device("abacus")


@pytest.mark.parametrize("now", [False, True])
def test_memory_is_zero_shared_and_as_large_as_asked(now: bool) -> None:
    fd = open_device("cpu").allocate("test", 5 * HUGE_PAGE + 1, now=now)
    assert os.fstat(fd).st_size >= 5 * HUGE_PAGE + 1
    one, two = Reservation(6 * HUGE_PAGE), Reservation(6 * HUGE_PAGE)
    for arena in (one, two):
        arena.attach([Segment(fd, 0, 5 * HUGE_PAGE + mmap.PAGESIZE, 0, True)])
    assert bytes(one.view(0, 100)) == bytes(100)
    one.view()[5 * HUGE_PAGE] = 7
    assert two.view()[5 * HUGE_PAGE] == 7
    one.close()
    two.close()
    os.close(fd)


def test_more_than_there_is_is_refused() -> None:
    device = open_device("cpu")
    with pytest.raises(DeviceError, match="not enough memory for the weights"):
        device.allocate("weights", device.available() * 2, now=True)


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
