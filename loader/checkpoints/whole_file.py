"""Writes a small file whole, or not at all, whoever else writes it at the same time.

The bytes go to a file of a name that nobody can guess beside it, are on the disk before that takes
the place of the old one, and the folder is after that. Of several writers, be they on other
machines that mount the same volume, the last one stays. A link that lies at the name is replaced
and not followed.
"""

from __future__ import annotations

import contextlib
import os
import secrets

__all__ = ["write_whole"]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_whole(path: str, data: bytes, mode: int = 0o600) -> None:
    """Puts bytes into a file.

    Args:
        path: Where.
        data: What it is to hold.
        mode: Whose it is to be, less the process's umask.

    Raises:
        OSError: It cannot be; what was there is there still.
    """
    folder, name = os.path.split(path)
    fresh = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.new")
    fd = os.open(fresh, _NEW, mode)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    # Not every file system lets a folder be synced; the file is whole there in any case.
    with contextlib.suppress(OSError):
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
