"""Small files of a model's directory, opened and read without surprises."""

from __future__ import annotations

import os
import stat

from coldframe.loader.errors import (
    CheckpointError,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceNotFound,
)

__all__ = ["open_regular", "pread_exactly", "read_whole", "source_error", "version_of"]


def read_whole(path: str, limit: int) -> bytes:
    """All of a file that has no reason to be larger than `limit` bytes."""
    fd, status = open_regular(path)
    try:
        if status.st_size > limit:
            raise CheckpointError(
                "the file is too large for what it should be",
                where=path,
                expected=f"at most {limit} bytes",
                got=f"{status.st_size} bytes",
                hint="Download or save the model again.",
            )
        return pread_exactly(fd, path, status.st_size, 0)
    finally:
        os.close(fd)


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a regular file; anything else is refused without waiting for it (a FIFO would hang)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise source_error(error, path, "The model is incomplete; download it again.") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(
            "this is not a regular file",
            where=path,
            expected="a regular file",
            got=stat.filemode(status.st_mode),
            hint="Put the file itself there.",
        )
    return fd, status


def pread_exactly(fd: int, path: str, length: int, offset: int) -> bytes:
    """Exactly `length` bytes; one call may return fewer."""
    parts: list[bytes] = []
    end = offset + length
    while offset < end:
        try:
            part = os.pread(fd, end - offset, offset)
        except OSError as error:
            raise source_error(error, path, "Check the disk or the mount.") from None
        if not part:
            raise SourceChanged(
                "the file shrank while it was read",
                where=path,
                expected=f"{end} bytes",
                got=f"{offset} bytes",
                hint="Start again once nothing writes to it.",
            )
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def source_error(error: OSError | ValueError, where: str, hint: str) -> SourceError:
    """The typed error for one of the operating system, or for a path that it cannot take."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceNotFound("there is no such file or directory", where=where, hint=hint)
    if isinstance(error, PermissionError):
        return SourceDenied(
            "it may not be read", where=where, got=error.strerror, hint="Check its permissions."
        )
    got = error.strerror if isinstance(error, OSError) else error
    return SourceError("it cannot be read", where=where, got=got, hint=hint)


def version_of(status: os.stat_result) -> str:
    """What changes when a local file is written, replaced or touched."""
    return f"{status.st_mtime_ns}-{status.st_ino}-{status.st_dev}"
