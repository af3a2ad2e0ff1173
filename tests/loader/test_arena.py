from __future__ import annotations

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.arena import PAGE, WEIGHTS_BASE, Reservation, Segment, round_up
from coldframe.loader.errors import ArenaError

BASE = 0x2800_0000_0000


@pytest.fixture
def fd() -> Iterator[int]:
    """Three pages of shared memory: of 1, of 2 and of 3."""
    memory = os.memfd_create("test")
    for value in (1, 2, 3):
        os.write(memory, bytes([value]) * PAGE)
    yield memory
    os.close(memory)


def child(code: str, *fds: int) -> subprocess.CompletedProcess[str]:
    prologue = "from coldframe.loader.arena import *\nimport os, sys\n"
    return subprocess.run(
        [sys.executable, "-c", prologue + code, *map(str, fds)],
        capture_output=True,
        text=True,
        pass_fds=fds,
        timeout=30,
    )


def mapping_of(address: int) -> str:
    """This process's mapping at an address, as the kernel describes it, or nothing."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, _, rest = line.partition("-")
            if int(start, 16) <= address < int(rest.split()[0], 16):
                return rest.strip()
    return ""


def test_segments_lie_where_they_should(fd: int) -> None:
    arena = Reservation(4 * PAGE)
    arena.attach([Segment(fd, 2 * PAGE, PAGE, 0, False), Segment(fd, 0, 2 * PAGE, PAGE, True)])
    assert bytes(arena.view(0, 3 * PAGE)) == b"\3" * PAGE + b"\1" * PAGE + b"\2" * PAGE
    arena.view(PAGE, 1)[0] = 9
    assert os.pread(fd, 2, 0) == b"\x09\x01"
    assert arena.view(PAGE, 1).format == "B"
    assert len(arena.view()) == 4 * PAGE
    assert len(arena.view(PAGE)) == 3 * PAGE
    assert len(arena.view(4 * PAGE, 0)) == 0
    arena.close()


def test_a_reservation_is_of_whole_pages_and_takes_no_memory() -> None:
    for size, pages in ((0, 1), (1, 1), (PAGE, 1), (PAGE + 1, 2)):
        arena = Reservation(size)
        assert arena.size == pages * PAGE
        arena.close()
    arena = Reservation(8 << 40)
    assert "---p" in mapping_of(arena.address)
    arena.close()


def test_two_processes_have_it_at_one_address(fd: int) -> None:
    code = (
        "fd = int(sys.argv[1])\n"
        f"arena = Reservation(3 * PAGE, {BASE}, exact=True)\n"
        "arena.attach([Segment(fd, 0, 3 * PAGE, 0, True)])\n"
        "assert bytes(arena.view(PAGE, 2)) == b'\\2\\2'\n"
        "arena.view()[5] = 77\n"
        "print(arena.address)\n"
    )
    arena = Reservation(3 * PAGE, BASE, exact=True)
    arena.attach([Segment(fd, 0, 3 * PAGE, 0, False)])
    done = child(code, fd)
    assert done.stdout == f"{BASE}\n", done.stderr
    assert arena.address == BASE
    assert arena.view()[5] == 77
    arena.close()


def test_a_fresh_process_gets_the_usual_address() -> None:
    done = child("print(Reservation(16 << 30, WEIGHTS_BASE, exact=True).address)")
    assert done.stdout == f"{WEIGHTS_BASE}\n", done.stderr


def test_an_address_that_is_taken(fd: int) -> None:
    first = Reservation(4 * PAGE, BASE, exact=True)
    first.attach([Segment(fd, 0, PAGE, 0, False)])
    # The new range begins before the old one and reaches into it.
    with pytest.raises(ArenaError, match="address is taken") as caught:
        Reservation(4 * PAGE, BASE - 2 * PAGE, exact=True)
    assert caught.value.where == f"{4 * PAGE} bytes at {BASE - 2 * PAGE:#x}"
    assert caught.value.hint
    other = Reservation(4 * PAGE, BASE)
    assert other.address != BASE
    assert first.view()[0] == 1  # nothing was mapped over it
    other.close()
    first.close()
    again = Reservation(PAGE, BASE, exact=True)
    again.close()


def test_closing_unmaps(fd: int) -> None:
    arena = Reservation(2 * PAGE)
    arena.attach([Segment(fd, 0, PAGE, 0, False)])
    address = arena.address
    assert mapping_of(address)
    arena.close()
    arena.close()
    assert not mapping_of(address)


@pytest.mark.parametrize("what", ["a read-only segment", "a reservation"])
def test_writing_where_one_may_not_kills(what: str, fd: int) -> None:
    attach = "arena.attach([Segment(int(sys.argv[1]), 0, PAGE, 0, False)])\n"
    code = (
        "arena = Reservation(PAGE)\n"
        f"{attach if what == 'a read-only segment' else ''}"
        "print('alive', flush=True)\n"
        "arena.view()[0] = 1\n"
        "print('still', flush=True)\n"
    )
    done = child(code, fd)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_it_says_where_it_is() -> None:
    arena = Reservation(PAGE)
    assert arena.dlpack_device == (1, 0)
    arena.close()


def test_a_segment_of_a_descriptor_without_write_access_is_not_writable(fd: int) -> None:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    arena = Reservation(PAGE)
    with pytest.raises(ArenaError, match=r"cannot be mapped.*Permission denied"):
        arena.attach([Segment(reader, 0, PAGE, 0, True)])
    arena.attach([Segment(reader, 0, PAGE, 0, False)])
    os.close(reader)
    assert arena.view()[0] == 1  # the mapping outlives the descriptor
    arena.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, PAGE), (-PAGE, PAGE), (2 * PAGE, 1), (0, 2 * PAGE + 1), (PAGE, 2 * PAGE), (0, 0), (0, -1)],
)
def test_a_segment_that_does_not_fit(offset: int, length: int, fd: int) -> None:
    arena = Reservation(2 * PAGE)
    before = mapping_of(arena.address - PAGE)
    with pytest.raises(ArenaError, match="does not fit"):
        arena.attach([Segment(fd, 0, length, offset, True)])
    assert mapping_of(arena.address - PAGE) == before
    assert "---p" in mapping_of(arena.address)
    arena.close()


def test_a_segment_that_the_kernel_refuses(fd: int) -> None:
    arena = Reservation(2 * PAGE)
    with pytest.raises(ArenaError, match=r"cannot be mapped.*Invalid argument"):
        arena.attach([Segment(fd, 1, PAGE, 0, False)])
    with pytest.raises(ArenaError, match=r"cannot be mapped.*Bad file descriptor"):
        arena.attach([Segment(987_654, 0, PAGE, PAGE, False)])
    arena.close()


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, PAGE + 1), (PAGE, 1), (PAGE + 1, None)]
)
def test_a_view_beyond_the_arena(offset: int, length: int | None) -> None:
    arena = Reservation(PAGE)
    with pytest.raises(ArenaError, match="beyond its arena"):
        arena.view(offset, length)
    arena.close()


def test_a_mapping_is_replaced_under_readers_in_one_step() -> None:
    size = 4 << 20
    ours, theirs = os.memfd_create("ours"), os.memfd_create("theirs")
    for memory in (ours, theirs):
        os.ftruncate(memory, size)
        with mmap.mmap(memory, size) as area:
            area[:] = bytes(range(256)) * (size // 256)
    expected = hashlib.sha256(bytes(range(256)) * (size // 256)).digest()
    arena = Reservation(size)
    arena.attach([Segment(ours, 0, size, 0, False)])
    seen: list[bytes] = []

    def read() -> None:  # hashing lets go of the interpreter's lock
        seen.extend(hashlib.sha256(arena.view()).digest() for _ in range(10))

    reader = threading.Thread(target=read)
    reader.start()
    count = 0
    while reader.is_alive():
        memory = (theirs, ours)[count % 2]
        arena.attach([Segment(memory, 0, size, 0, False)])
        count += 1
    reader.join()
    assert count > 1
    assert set(seen) == {expected}
    arena.close()
    os.close(ours)
    os.close(theirs)


def test_without_address_space_there_is_a_typed_error() -> None:
    code = (
        "import resource\n"
        "from coldframe.loader.errors import ArenaError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "for base in (None, WEIGHTS_BASE):\n"
        "    try:\n"
        "        Reservation(64 << 30, base)\n"
        "    except ArenaError as error:\n"
        "        print(error)\n"
    )
    done = child(code)
    line = (
        "no address space is left for an arena, expected 68719476736 bytes, "
        "got Cannot allocate memory. Raise the limit on address space (ulimit -v).\n"
    )
    assert done.stdout == 2 * line, done.stderr


def test_a_segment_travels_without_its_descriptor() -> None:
    segment = Segment(5, PAGE, 100, 2 * PAGE, True)
    assert Segment.from_wire(5, segment.to_wire()) == segment


def test_rounding() -> None:
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_populated_pages_are_there_without_a_touch(tmp_path: Path) -> None:
    size = 64 * PAGE
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        reservation = Reservation(size)
        reservation.attach([Segment(file.fileno(), 0, size, 0, False)])
        assert resident(reservation.address) == 0
        reservation.populate(PAGE + 7, 40 * PAGE)
        assert resident(reservation.address) >= 40 * PAGE
        os.truncate(path, 0)
        reservation.populate(0, size)  # says nothing; the first touch would
        reservation.close()


def resident(address: int) -> int:
    """Bytes in this process's page table of the mapping that begins at an address."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{address:x}-") for line in lines)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))
