"""Folders and files of a store: opened without following a link, checked for who may write them.

What comes back out of them is run, or given to a driver: so nobody but their owner, us or root, may
have put it there. What is written gets another name first, and its own once it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from coldframe.loader.errors import SnapshotError

__all__ = [
    "NEW",
    "READ",
    "TEMPORARY",
    "check_safe",
    "discard",
    "failed",
    "is_safe",
    "open_folder",
    "temporary_name",
    "write_file",
]

TEMPORARY = ".writing-"
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHER = "Name another directory for images, or mend this one."


def open_folder(path: str, within: int | None, strict: bool) -> int:
    """Opens a folder by its last name in `within`, or by its path; with `strict`, checks it.

    Raises:
        SnapshotError: It is a link, or others can write it.
        OSError: It cannot be opened.
    """
    name = path if within is None else os.path.basename(path)
    try:
        fd = os.open(name, _FOLDER, dir_fd=within)
    except NotADirectoryError:
        status = os.stat(name, dir_fd=within, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            raise SnapshotError(
                "a store and its folders may not be symbolic links",
                where=path,
                expected="a directory",
                got=stat.filemode(status.st_mode),
                hint="Name the directory itself that images are to be kept in.",
            ) from None
        raise
    try:
        if strict:
            check_safe(os.fstat(fd), path, "a directory")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_safe(status: os.stat_result) -> bool:
    """Whether only we and root can write something."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS_WRITE


def check_safe(status: os.stat_result, path: str, kind: str) -> None:
    """That only we and root can write something.

    Raises:
        SnapshotError: Others can.
    """
    if not is_safe(status):
        raise SnapshotError(
            "others could put images there, and what is in them would be run",
            where=path,
            expected=f"{kind} that only its owner, you or root, may write",
            got=f"{stat.filemode(status.st_mode)} of user {status.st_uid}",
            hint=f"Run chmod go-w {path}; with a key, images can be read there as it is.",
        )


def temporary_name() -> str:
    """What a file is called while it is written; no two are called alike."""
    return f"{TEMPORARY}{os.getpid()}-{os.urandom(8).hex()}"


def discard(name: str, folder: int) -> None:
    """Removes a file, if it is there and may be."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def write_file(name: str, raw: bytes, folder: int) -> None:
    """Puts a file there whole, or not at all; it and its name are on the disk then.

    Raises:
        OSError: It cannot be; what had that name is there still.
    """
    temporary = temporary_name()
    try:
        with open(os.open(temporary, NEW, 0o600, dir_fd=folder), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        discard(temporary, folder)
        raise


def failed(what: str, path: str, error: OSError, needed: int | None = None) -> SnapshotError:
    """The error for one of the system's.

    Args:
        what: What could not be done.
        path: To what.
        error: Why.
        needed: The bytes that were to be written.
    """
    expected, got = None, error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and needed is not None:
        expected = f"room for {needed} bytes at most"
        with contextlib.suppress(OSError):
            about = os.statvfs(path if os.path.isdir(path) else os.path.dirname(path))
            got = f"{error.strerror}, {about.f_bavail * about.f_frsize} bytes free"
    return SnapshotError(what, where=path, expected=expected, got=got, hint=_OTHER)
