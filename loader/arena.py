"""Arenas: shared memory at one reserved address, mapped by every process that needs it.

A reservation is address space without memory behind it. Segments are mapped over it, each a
stretch of a descriptor: anonymous shared memory, or a weight file itself. As the address is
the same in every process, before and after a snapshot is restored, pointers into it stay true.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import ArenaError

__all__ = [
    "HUGE_PAGE",
    "KV_BASE",
    "PAGE",
    "SCRATCH_BASE",
    "WEIGHTS_BASE",
    "Reservation",
    "Segment",
    "round_up",
]

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20

# Far from where Linux puts heaps (low, above the program) and libraries (below the top of the
# 47-bit half), with 16 TiB each.
WEIGHTS_BASE = 0x2000_0000_0000
KV_BASE = 0x3000_0000_0000
SCRATCH_BASE = 0x4000_0000_0000
"""Where a worker keeps what is its own and has an address that others may know of."""

_MAP_FIXED_NOREPLACE = 0x100000
_MAP_FIXED = 0x10
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a descriptor and its place in an arena.

    Args:
        fd: What is mapped.
        fd_offset: Where in it the stretch starts; a multiple of the page size.
        length: Bytes; the mapping is rounded up to whole pages.
        offset: Where in the arena it lies; a multiple of the page size.
        writable: Whether those who attach may write.
    """

    fd: int
    fd_offset: int
    length: int
    offset: int
    writable: bool

    def to_wire(self) -> list[Any]:
        """Everything but the descriptor, which travels beside the message."""
        return [self.fd_offset, self.length, self.offset, self.writable]

    @classmethod
    def from_wire(cls, fd: int, data: list[Any]) -> Segment:
        return cls(fd, *data)


class Reservation:
    """A range of addresses in this process, with the segments mapped into it.

    Args:
        size: Bytes; rounded up to whole pages.
        base: The wanted address; None leaves it to the kernel.
        exact: Whether another address than `base` is an error. A process whose pointers are
            frozen in a snapshot needs that; a fresh one works at any address.

    Raises:
        ArenaError: The address is taken, or there is no address space left.
    """

    def __init__(self, size: int, base: int | None = None, *, exact: bool = False) -> None:
        self.size = max(round_up(size, PAGE), PAGE)
        # Whole huge pages, at a multiple of them: only so can huge pages be mapped into it.
        self._span = round_up(self.size, HUGE_PAGE)
        address = None
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        if base is not None:
            address = _mmap(base, self._span, _PROT_NONE, flags | _MAP_FIXED_NOREPLACE, -1, 0)
            # A kernel before 4.17 takes the address as a hint.
            if address is not None and address != base:
                _libc().munmap(address, self._span)
                address = None
            if address is None and exact:
                raise ArenaError(
                    "the arena's address is taken in this process",
                    where=f"{self.size} bytes at {base:#x}",
                    hint="Start the worker fresh instead of from a snapshot.",
                )
        if address is None:
            address = self._reserve_anywhere(flags)
        if address is None:
            raise ArenaError(
                "no address space is left for an arena",
                expected=f"{self.size} bytes",
                got=os.strerror(ctypes.get_errno()),
                hint="Raise the limit on address space (ulimit -v).",
            )
        self.address = address

    def _reserve_anywhere(self, flags: int) -> int | None:
        found = _mmap(None, self._span + HUGE_PAGE, _PROT_NONE, flags, -1, 0)
        if found is None:
            return None
        address = round_up(found, HUGE_PAGE)
        before, after = address - found, found + HUGE_PAGE - address
        for start, length in ((found, before), (address + self._span, after)):
            if length:
                _libc().munmap(start, length)
        return address

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Where this is, as DLPack says it: kDLCPU."""
        return (1, 0)

    def attach(self, segments: Sequence[Segment]) -> None:
        """Maps segments at their places.

        Mapping over a mapping replaces it in one step: a thread that reads there meanwhile gets
        the bytes of the one or of the other.

        Raises:
            ArenaError: A segment lies outside the reservation or cannot be mapped.
        """
        for segment in segments:
            end = segment.offset + segment.length
            if segment.offset < 0 or segment.offset % PAGE or segment.length < 1 or end > self.size:
                raise ArenaError(
                    "a segment does not fit its arena",
                    where=f"offset {segment.offset}, {segment.length} bytes",
                    expected=f"whole pages within {self.size} bytes",
                )
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if segment.writable else 0)
            mapped = _mmap(
                self.address + segment.offset,
                segment.length,
                protection,
                mmap.MAP_SHARED | _MAP_FIXED,
                segment.fd,
                segment.fd_offset,
            )
            if mapped is None:
                raise ArenaError(
                    "a segment cannot be mapped",
                    where=f"offset {segment.offset}, {segment.length} bytes",
                    got=os.strerror(ctypes.get_errno()),
                )

    def detach(self) -> None:
        """Lets all segments go and keeps the addresses, for `attach`. Nobody may look at them.

        Raises:
            ArenaError: The kernel refuses.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        if _mmap(self.address, self.size, _PROT_NONE, flags, -1, 0) is None:
            raise ArenaError(
                "an arena cannot be unmapped",
                where=f"{self.size} bytes at {self.address:#x}",
                got=os.strerror(ctypes.get_errno()),
            )

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """The bytes at an offset. Python sees them as writable; the mapping's access decides."""
        count = self.size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ArenaError(
                "a view reaches beyond its arena",
                where=f"offset {offset}, {count} bytes",
                expected=f"at most {self.size} bytes",
            )
        buffer = (ctypes.c_char * count).from_address(self.address + offset)
        return memoryview(buffer).cast("B")

    def populate(self, offset: int, length: int) -> None:
        """Enters pages that are in memory into this process's page table, in one call.

        Touched one after the other instead, each few of them would be a fault of their own: 5
        times as slow. Where the kernel cannot (before 5.14), or where the file has been cut,
        nothing happens; the first touch tells.
        """
        begin = offset // PAGE * PAGE
        end = min(round_up(offset + length, PAGE), self.size)
        _libc().madvise(self.address + begin, end - begin, _MADV_POPULATE_READ)

    def fault_in(self, offset: int, length: int) -> bool:
        """Has the kernel find memory for a stretch, before anybody writes to it.

        Returns:
            Whether it could: a kernel before 5.14 cannot.
        """
        begin = offset // PAGE * PAGE
        end = min(round_up(offset + length, PAGE), self.size)
        result = _libc().madvise(self.address + begin, end - begin, _MADV_POPULATE_WRITE)
        return int(result) == 0

    def close(self) -> None:
        """Unmaps everything. Views taken before must not be touched again."""
        if self.address:
            _libc().munmap(self.address, self._span)
            self.address = 0


_LIBC: ctypes.CDLL | None = None


def _libc() -> ctypes.CDLL:
    global _LIBC
    if _LIBC is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        )
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        _LIBC = libc
    return _LIBC


def _mmap(
    address: int | None, size: int, protection: int, flags: int, fd: int, offset: int
) -> int | None:
    result = _libc().mmap(address, size, protection, flags, fd, offset)
    return None if result == _FAILED else int(result)
