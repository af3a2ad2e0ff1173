"""How fast disks are that bytes come from, each for a moment, past the page cache.

The model's directory is read where it lies. Where caches and images are kept a scratch file is
written and read again, of which nothing stays.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.errors import PlatformError
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.machine.probe import probe_cold
from coldframe.runtime.units import human_bytes

__all__ = ["cache_disk", "model_disk", "store_disk"]

_CHUNK = 4 << 20
_MOST = 64 << 20
_WRITE_S = 0.3
_READ_S = 0.2
_SLOW = 100e6
_LITTLE = 1 << 30
_FASTER = "Keep it on a local SSD: nothing beats the bytes."


def model_disk(case: Case) -> Finding:
    """Of the model's own directory."""
    assert case.model is not None
    place = parse_location(case.model)
    if not isinstance(place, Directory):
        return Finding("model_disk", "the model is not on a disk here", {"read_bytes_per_s": None})
    checkpoint = Checkpoint.open(place.path)
    rate = probe_cold(checkpoint, Plan.build(checkpoint, layout=Layout.FILE)).rate
    facts = {"directory": place.path, "read_bytes_per_s": rate}
    says = f"reads {human_bytes(rate)}/s from {place.path}"
    return Finding("model_disk", says, facts, remedy=_FASTER if rate < _SLOW else None)


def store_disk(case: Case) -> Finding:
    """Of the images'."""
    return _scratch("store_disk", case.store)


def cache_disk(case: Case) -> Finding:
    """Of weights that came over a network."""
    if case.cache is None:
        return Finding("cache_disk", "no --cache: weights that come over a network are not kept")
    return _scratch("cache_disk", case.cache)


def _scratch(name: str, directory: str) -> Finding:
    if "://" in directory:
        return Finding(name, f"{directory} is not on a disk here", {"directory": directory})
    # Where it is not there yet, it will be made where this is.
    base = Path(os.path.abspath(directory))
    while not base.is_dir():
        base = base.parent
    if not os.access(base, os.W_OK | os.X_OK):
        raise PlatformError(
            "nothing can be kept there",
            where=directory,
            got=f"{base} may not be written",
            hint="Name another directory (--snapshot-store, --cache), or mend its rights.",
        )
    status = os.statvfs(base)
    free = status.f_bavail * status.f_frsize
    facts: dict[str, Any] = {"directory": directory, "free": free}
    if free < 2 * _MOST:
        raise PlatformError(
            "the disk is full",
            where=directory,
            got=f"{human_bytes(free)} free",
            hint="Free some space: an image takes 100 to 200 MB.",
        )
    facts |= _rates(str(base))
    read = facts["read_bytes_per_s"]
    says = (
        f"reads {human_bytes(read)}/s and writes {human_bytes(facts['write_bytes_per_s'])}/s, "
        f"{human_bytes(free)} free in {directory}"
    )
    if not facts["direct"]:
        says += "; only by way of the page cache"
    remedy = "Free some space." if free < _LITTLE else _FASTER if read < _SLOW else None
    return Finding(name, says, facts, remedy=remedy)


def _rates(directory: str) -> dict[str, Any]:
    """What a scratch file is written and read at: bytes a second, to and from the disk."""
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix=".coldframe-doctor-") as scratch,
        mmap.mmap(-1, _CHUNK) as buffer,
    ):
        buffer.write(os.urandom(1 << 20) * (_CHUNK >> 20))
        started, done = time.monotonic(), 0
        while done < _MOST and (not done or time.monotonic() - started < _WRITE_S):
            done += os.write(scratch.fileno(), buffer)
            os.fdatasync(scratch.fileno())
        written = done / (time.monotonic() - started)
        fd, direct = _open(scratch.name)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            started, at = time.monotonic(), 0
            while at < done and (not at or time.monotonic() - started < _READ_S):
                at += os.preadv(fd, [buffer], at)
            read = at / (time.monotonic() - started)
        finally:
            os.close(fd)
    return {"write_bytes_per_s": written, "read_bytes_per_s": read, "direct": direct}


def _open(path: str) -> tuple[int, bool]:
    """A descriptor to read by, and whether that goes past the page cache."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
