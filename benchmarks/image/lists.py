"""What a lazy puller is told: the files of an image that a start opens, in the order of use.

- *Plain*: a path a line, absolute, else it is skipped. `nydusify convert --prefetch-patterns` and
  `nydus-image --prefetch-policy fs` read it from their standard input.
- *eStargz*: JSON objects one after the other, `{"path": ...}`, relative to the image's root: what
  `ctr-remote optimize --record-out` writes and `nerdctl image convert --estargz-record-in` reads,
  and `--zstdchunked-record-in` too. What a layer has not is skipped in it.
- *SOCI*: a JSON array of absolute paths, for `soci convert --prefetch-files-json`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldframe.loader.checkpoints.residency import cached_bytes

__all__ = ["FORMATS", "File", "cached", "drop_from_cache", "estargz", "kept", "plain", "soci"]

_NO_FILES = ("/proc/", "/sys/", "/dev/")


@dataclass(frozen=True, slots=True)
class File:
    """A file that a start has opened.

    Args:
        path: Where it is.
        size: Its bytes.
        at_s: When it was opened first, in seconds from the exec.
        read: Bytes of it that were in the page cache at the first token, the kernel's read-ahead
            among them; None where they may have been there before.
    """

    path: str
    size: int
    at_s: float
    read: int | None = None


def kept(
    opened: Mapping[str, int],
    started_ns: int,
    until_ns: int,
    than: float,
    left_out: Iterable[Path] = (),
) -> list[File]:
    """The files of an image among those that were opened.

    Args:
        opened: Paths, by when they were opened (CLOCK_MONOTONIC).
        started_ns: When the start began.
        until_ns: What was opened later is none of it.
        than: The file system's time at which the start began: what is newer was made by it.
        left_out: Folders that are no part of the image, such as the model's.
    """
    beyond = tuple(f"{os.path.realpath(folder)}/" for folder in left_out)
    found = []
    for path, at_ns in sorted(opened.items(), key=lambda item: item[1]):
        if at_ns > until_ns or path.startswith(_NO_FILES) or path.startswith(beyond):
            continue
        try:
            status = os.lstat(path)
        except OSError:  # removed since, or in a namespace that is gone
            continue
        if stat.S_ISREG(status.st_mode) and status.st_ctime <= than:
            found.append(File(path, status.st_size, (at_ns - started_ns) / 1e9))
    return found


def drop_from_cache(files: Iterable[File]) -> set[str]:
    """Drops files from the page cache, and returns the paths of those that have left it.

    One stays that somebody has mapped, or looks at just then.
    """
    gone = set()
    for file in files:
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if file.size and not cached_bytes(fd, 0, file.size):
                gone.add(file.path)
        finally:
            os.close(fd)
    return gone


def cached(path: str) -> int | None:
    """Bytes of a file that are in the page cache; None where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return cached_bytes(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def plain(paths: Sequence[str]) -> str:
    return "".join(f"{path}\n" for path in paths)


def estargz(paths: Sequence[str]) -> str:
    return "".join(json.dumps({"path": path.lstrip("/")}) + "\n" for path in paths)


def soci(paths: Sequence[str]) -> str:
    return json.dumps(list(paths), indent=1) + "\n"


FORMATS: dict[str, Callable[[Sequence[str]], str]] = {
    "plain": plain,
    "estargz": estargz,
    "soci": soci,
}
