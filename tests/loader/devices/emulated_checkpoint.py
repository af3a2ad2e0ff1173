"""The emulated driver's calls that take a process's context off the GPU, and what they work on.

A *record* on a page at one address of every process that has an emulated driver says where its
context is and what there is of it. The page is the process's own memory, so that it goes wherever
the process goes: into a fork, into an image and out of it again. Another process, the helper, reads
and writes it through `/proc/PID/mem`.

As on a real driver, who is not RUNNING makes no call: each waits until it is let go on. A process
that has memory of others mapped, or a handle of it, cannot be checkpointed.

A *ledger*, a folder that a test names, has a file for each process with a record, by which what
their contexts take of a device is known to all of them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cuda.bindings import driver as real

__all__ = [
    "CHECKPOINTED",
    "FAILED",
    "LOCKED",
    "RUNNING",
    "EmulatedCheckpoints",
    "Record",
    "peek",
    "poke",
    "used_by_others",
]

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
ADDRESS = 0x4F00_0000_0000
_SIZE = 4096
_MAGIC = 0x6C64_7261_6D75_6563
_LAYOUT = struct.Struct("<8Q16s")
"""Magic, state, calls under way, shared memory, own bytes, contexts, bytes of each, device, UUID"""
_STATE, _CALLS, _REST, _PLACE, _DEVICE = 8, 16, 24, 48, 56
_PRIVATE, _FIXED_NOREPLACE = 0x02 | 0x20, 0x100000
_POLL_S = 0.0005

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_counting = threading.Lock()


class Record:
    """What a process's record says.

    Args:
        state: Where its context is.
        calls: How many calls it is in.
        shared: How many handles and mappings it has of memory that others may have, too.
        own: Bytes of memory that nobody else can have.
        contexts: How many contexts it has.
        context_bytes: What each takes of the device.
        device: On which.
        uuid: The GPU that this is.
    """

    def __init__(self, raw: bytes) -> None:
        magic, *numbers, self.uuid = _LAYOUT.unpack(raw)
        if magic != _MAGIC:
            raise ValueError("no record")
        self.state, self.calls, self.shared, self.own = numbers[:4]
        self.contexts, self.context_bytes, self.device = numbers[4:]

    @property
    def nbytes(self) -> int:
        """What a checkpoint of it holds."""
        return self.contexts * self.context_bytes + self.own

    @property
    def on_device(self) -> int:
        """What of that is on the device at the moment."""
        return self.nbytes if self.state in (RUNNING, LOCKED) else 0


def peek(pid: int) -> Record | None:
    """The record of a process; None where it has none, or is gone."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(ADDRESS)
            return Record(memory.read(_LAYOUT.size))
    except (OSError, ValueError, struct.error):
        return None


def poke(pid: int, state: int, place: tuple[int, bytes] | None = None) -> None:
    """Writes a process's state, and where its context is from now on."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        if place is not None:
            memory.seek(ADDRESS + _DEVICE)
            memory.write(struct.pack("<Q16s", *place))
        memory.seek(ADDRESS + _STATE)
        memory.write(struct.pack("<Q", state))


def used_by_others(ledger: Path | None, device: int = 0) -> int:
    """What all other processes of a ledger have on a device that only they can have."""
    if ledger is None or not ledger.is_dir():
        return 0
    pids = {pid for path in ledger.iterdir() if (pid := _number_here(path)) is not None}
    found = (peek(pid) for pid in pids if pid != os.getpid())
    return sum(r.on_device for r in found if r is not None and r.device == device)


def _number_here(entry: Path) -> int | None:
    """What a process of a ledger is numbered here, which may not be what it is to itself."""
    namespace = entry.read_text()
    if namespace in ("", os.readlink("/proc/self/ns/pid")):
        return int(entry.name)
    for process in Path("/proc").iterdir():
        with suppress(OSError, StopIteration):
            if process.name.isdigit() and os.readlink(process / "ns/pid") == namespace:
                status = (process / "status").read_text().splitlines()
                numbers = next(line for line in status if line.startswith("NSpid:"))
                if numbers.split()[-1] == entry.name:
                    return int(process.name)
    return None


def _own() -> None:
    """Has this process a record, if it has none yet."""
    taken = _libc.mmap(ADDRESS, _SIZE, 3, _PRIVATE | _FIXED_NOREPLACE, -1, 0)
    if taken == ADDRESS:
        ctypes.memmove(ADDRESS, struct.pack("<Q", _MAGIC), 8)


def _number(offset: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(ADDRESS + offset)


class EmulatedCheckpoints:
    """The part of the emulator that this module's docstring is about.

    Attributes:
        context_bytes: What a context takes of its device.
        ledger: The folder by which processes know of one another; None where there is but this.
        uuids: Of each device.
        dies_at: A call under which this process ends, and the how many-th it is.
        slow_s: What a checkpoint, and a restore, take in seconds.
    """

    devices: int

    def _begin_checkpoints(self, context_bytes: int, ledger: str | None) -> None:
        self.context_bytes = context_bytes
        self.ledger = None if ledger is None else Path(ledger)
        self.uuids = [bytes([0xE0, n, *range(14)]) for n in range(self.devices)]
        self.dies_at: tuple[str, int] | None = None
        self.slow_s = 0.0
        self._registered_as: int | None = None

    # -- every call of the driver ----------------------------------------------------------------

    @contextmanager
    def going(self) -> Iterator[None]:
        """Around each call: waits for a process that is stopped to be let go on."""
        _own()
        while True:
            with _counting:
                _number(_CALLS).value += 1
                if _number(_STATE).value == RUNNING:
                    break
                _number(_CALLS).value -= 1
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            with _counting:
                _number(_CALLS).value -= 1

    def note(self, shared: int, own: int, contexts: int) -> None:
        """Writes down what this process has, after each call; see `Record`."""
        ctypes.memmove(ADDRESS + _REST, struct.pack("<3Q", shared, own, contexts), 24)
        pid = os.getpid()
        if contexts and self.ledger is not None and self._registered_as != pid:
            self._registered_as = pid
            self._enter(pid)

    def _enter(self, pid: int) -> None:
        if self.ledger is not None:
            self.ledger.mkdir(parents=True, exist_ok=True)
            (self.ledger / str(pid)).write_text(os.readlink("/proc/self/ns/pid"))

    def _context_is_on(self, device: int) -> None:
        """Writes down where this process's context is, and what it takes."""
        place = struct.pack("<2Q16s", self.context_bytes, device, self.uuids[device])
        ctypes.memmove(ADDRESS + _PLACE, place, len(place))

    def contexts_on(self, device: int) -> int:
        """What contexts take of a device, and others' own memory, as far as they are known."""
        own = peek(os.getpid())
        taken = 0 if own is None or own.device != device else own.contexts * own.context_bytes
        return taken + used_by_others(self.ledger, device)

    # -- the calls -------------------------------------------------------------------------------

    def cuDeviceGetUuid(self, dev):
        def call() -> Any:
            found = real.CUuuid()
            ctypes.memmove(found.getPtr(), self.uuids[int(dev)], 16)
            return found

        return self._do("cuDeviceGetUuid", call)

    def cuCheckpointProcessGetState(self, pid):
        def call() -> Any:
            return real.CUprocessState(self._record(pid).state)

        return self._do("cuCheckpointProcessGetState", call)

    def cuCheckpointProcessLock(self, pid, args):
        def call() -> Callable[[], None]:
            self._expect(pid, RUNNING)
            limit_ms = 0 if args is None else int(args.timeoutMs)
            poke(pid, LOCKED)
            return lambda: self._wait_for_calls(pid, limit_ms / 1000)

        return self._after("cuCheckpointProcessLock", call)

    def _wait_for_calls(self, pid: int, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while self._record(pid).calls:
            if limit_s and time.monotonic() > deadline:
                poke(pid, RUNNING)
                self._refuse("CUDA_ERROR_NOT_READY")
            time.sleep(_POLL_S)

    def cuCheckpointProcessCheckpoint(self, pid, args):
        time.sleep(self.slow_s)

        def call() -> None:
            self._require_none(args)
            record = self._expect(pid, LOCKED)
            if record.shared:
                self._refuse("CUDA_ERROR_NOT_SUPPORTED")
            poke(pid, CHECKPOINTED)

        return self._do("cuCheckpointProcessCheckpoint", call)

    def cuCheckpointProcessRestore(self, pid, args):
        time.sleep(self.slow_s)

        def call() -> None:
            record = self._expect(pid, CHECKPOINTED)
            uuid = record.uuid
            if args is not None:
                pairs = list(args.gpuPairs)[: args.gpuPairsCount]
                moves = {bytes(pair.oldUuid.bytes): bytes(pair.newUuid.bytes) for pair in pairs}
                if len(moves) != self.devices or uuid not in moves:
                    self._refuse("CUDA_ERROR_INVALID_VALUE")
                uuid = moves[uuid]
            if uuid not in self.uuids:
                poke(pid, FAILED)
                self._refuse("CUDA_ERROR_INVALID_DEVICE")
            device = self.uuids.index(uuid)
            if self._free_on(device) < record.nbytes:
                poke(pid, FAILED)
                self._refuse("CUDA_ERROR_OUT_OF_MEMORY")
            self._enter(pid)
            poke(pid, LOCKED, (device, uuid))

        return self._do("cuCheckpointProcessRestore", call)

    def cuCheckpointProcessUnlock(self, pid, args):
        def call() -> None:
            self._require_none(args)
            self._expect(pid, LOCKED)
            poke(pid, RUNNING)

        return self._do("cuCheckpointProcessUnlock", call)

    def _expect(self, pid: int, state: int) -> Record:
        record = self._record(pid)
        if record.state != state:
            self._refuse("CUDA_ERROR_ILLEGAL_STATE")
        return record

    def _record(self, pid: int) -> Record:
        record = peek(pid)
        if record is None:
            self._refuse("CUDA_ERROR_INVALID_VALUE")
        assert record is not None
        return record

    def _require_none(self, args: Any) -> None:
        if args is not None:
            self._refuse("CUDA_ERROR_INVALID_VALUE")
