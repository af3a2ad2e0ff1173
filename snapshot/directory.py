"""A store in a directory.

Who writes holds a shared lock (flock) on it from its first object until its manifest is there; it
ends with the process. Only under an exclusive lock, and so while nobody writes, is removed what no
manifest names: what a dead process has left, and the objects of images that were removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.backend import (
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    OBJECTS,
    Document,
    Usage,
    image_of,
    named_in,
)
from coldframe.snapshot.image_files import StoredObject
from coldframe.snapshot.packing import Bundle, write_object

__all__ = ["DirectoryBackend"]

_TEMPORARY = ".writing-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_GONE = "Remove the image; a new one is made in its place."
_OTHER = "Name another directory for images, or mend this one."


class DirectoryBackend:
    """Images in a directory.

    Args:
        root: Its path; it need not be there.
    """

    run_bytes = 1
    threads = 1

    def __init__(self, root: str) -> None:
        self.uri = os.path.abspath(root)
        self._objects = os.path.join(self.uri, OBJECTS)
        self._manifests = os.path.join(self.uri, MANIFESTS)

    def check(self) -> None:
        for path in (self.uri, self._objects, self._manifests):
            try:
                status = os.stat(path)
            except OSError:
                continue  # not there yet, or `documents` will say why not
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise SnapshotError(
                    "others could put images there, and what is in them would be run",
                    where=path,
                    expected="a directory that only its owner, you or root, may write",
                    got=f"{stat.filemode(status.st_mode)} of user {status.st_uid}",
                    hint=f"Run chmod 700 {path}, or sign images with a key.",
                )

    def documents(self) -> list[Document]:
        try:
            names = os.listdir(self._manifests)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _failed("the store cannot be read", self._manifests, error) from error
        found = []
        for name in names:
            image = image_of(name)
            if image is not None:
                found.append(_document(image, os.path.join(self._manifests, name)))
        return [document for document in found if document is not None]

    @contextlib.contextmanager
    def reader(self) -> Iterator[_Reader]:
        reader = _Reader(self._objects)
        try:
            yield reader
        finally:
            reader.close()

    def path_of(self, item: StoredObject) -> str | None:
        path = os.path.join(self._objects, item.digest)
        try:
            status = os.lstat(path)
        except OSError:
            return None
        whole = stat.S_ISREG(status.st_mode) and status.st_size == item.stored_bytes
        return path if whole else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[_Writer]:
        try:
            os.makedirs(self.uri, 0o700, exist_ok=True)
            for folder in (self._objects, self._manifests):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
            lock = os.open(self._objects, _FOLDER)
        except OSError as error:
            raise _failed("the store cannot be made", self.uri, error) from error
        try:
            self._sweep_alone(lock)
            with contextlib.suppress(OSError):  # without locks nothing is removed either
                fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                yield _Writer(self._objects, self._manifests)
            except BaseException:
                self._sweep_alone(lock)
                raise
        finally:
            os.close(lock)

    def withdraw(self, image: str) -> bool:
        path = os.path.join(self._manifests, f"{image}.json")
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _failed("the image cannot be removed", path, error) from error
        return True

    def sweep(self) -> None:
        with contextlib.suppress(OSError):
            lock = os.open(self._objects, _FOLDER)
            try:
                self._sweep_alone(lock)
            finally:
                os.close(lock)

    def touch(self, image: str) -> None:
        now = time.time_ns()  # by itself the kernel would take the time of its last tick
        with contextlib.suppress(OSError):  # a store that may only be read is as good
            os.utime(os.path.join(self._manifests, f"{image}.json"), ns=(now, now))

    def usage(self) -> Usage:
        try:
            about = os.statvfs(self.uri)
            with os.scandir(self._objects) as items:
                nbytes = sum(item.stat(follow_symlinks=False).st_size for item in items)
        except FileNotFoundError:
            return Usage(0, 0, None)
        except OSError as error:
            raise _failed("the store cannot be read", self.uri, error) from error
        return Usage(len(self.documents()), nbytes, about.f_bavail * about.f_frsize)

    def _sweep_alone(self, lock: int) -> None:
        """Removes what no manifest names, if nobody else is writing; ends the lock."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        try:
            documents = self.documents()
            if any(document.raw is None for document in documents):
                return  # nobody knows what those name
            named = set().union(*(named_in(document.raw) for document in documents))
            for folder in (self._objects, self._manifests):
                for name in os.listdir(folder):
                    left = folder == self._objects and name not in named
                    if left or name.startswith(_TEMPORARY):
                        os.unlink(os.path.join(folder, name))
        except (OSError, SnapshotError):
            pass  # what could not be removed now may be another time
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


class _Writer:
    def __init__(self, objects: str, manifests: str) -> None:
        self._objects = objects
        self._manifests = manifests

    def add(self, bundle: Bundle, codec: str) -> StoredObject:
        temporary = os.path.join(self._objects, _temporary_name())
        try:
            fd = os.open(temporary, _NEW, 0o600)
            try:
                item = write_object(bundle, fd, codec)
                os.fsync(fd)
            finally:
                os.close(fd)
            path = os.path.join(self._objects, item.digest)
            if _holds(path, item):
                os.unlink(temporary)
            else:
                os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError):
                what = "an image cannot be written to the store"
                raise _failed(what, self._objects, error, bundle.size) from error
            raise
        return item

    def publish(self, image: str, raw: bytes) -> None:
        temporary = os.path.join(self._manifests, _temporary_name())
        path = os.path.join(self._manifests, f"{image}.json")
        try:
            _sync(self._objects)  # the objects' names, before anything names them
            with open(temporary, "xb", opener=_private) as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
            _sync(self._manifests)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            what = "a manifest cannot be written to the store"
            raise _failed(what, path, error, len(raw)) from error


class _Reader:
    """Opens each object once, and has the kernel read ahead."""

    def __init__(self, objects: str) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def read(self, item: StoredObject, offset: int, buffer: memoryview) -> None:
        path = os.path.join(self._objects, item.digest)
        try:
            with self._lock:
                fd = self._open.get(item.digest)
                if fd is None:
                    fd = self._open[item.digest] = os.open(path, _READ)
                    self._begin(fd, item, path)
            got = 0
            while got < buffer.nbytes:
                count = os.preadv(fd, [buffer[got:]], offset + got)
                if count == 0:
                    raise _wrong_size(path, item, offset + got)
                got += count
        except FileNotFoundError:
            raise SnapshotError(
                "a part of the image is missing", where=path, got="no such file", hint=_GONE
            ) from None
        except OSError as error:
            raise _failed("the image cannot be read", path, error) from error

    def _begin(self, fd: int, item: StoredObject, path: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError(
                "this is not a regular file", where=path, got=stat.filemode(status.st_mode)
            )
        if status.st_size != item.stored_bytes:
            raise _wrong_size(path, item, status.st_size)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


def _document(image: str, path: str) -> Document | None:
    try:
        fd = os.open(path, _READ)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
                return Document(image, None, "it is no small file", status.st_mtime)
            with open(fd, "rb", closefd=False) as file:
                return Document(image, file.read(), "", status.st_mtime)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None  # removed just now
    except OSError as error:
        return Document(image, None, error.strerror or str(error), 0.0)


def _holds(path: str, item: StoredObject) -> bool:
    """Whether an object is there already, and sound."""
    import hashlib

    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == item.digest
    except OSError:
        return False


def _temporary_name() -> str:
    return f"{_TEMPORARY}{os.getpid()}-{os.urandom(8).hex()}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sync(directory: str) -> None:
    fd = os.open(directory, _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _wrong_size(path: str, item: StoredObject, got: int) -> SnapshotError:
    return SnapshotError(
        "a part of the image has another size",
        where=path,
        expected=f"{item.stored_bytes} bytes",
        got=f"{got} bytes",
        hint=_GONE,
    )


def _failed(what: str, path: str, error: OSError, needed: int | None = None) -> SnapshotError:
    expected, got = None, error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and needed is not None:
        expected = f"room for {needed} bytes at most"
        with contextlib.suppress(OSError):
            about = os.statvfs(path if os.path.isdir(path) else os.path.dirname(path))
            got = f"{error.strerror}, {about.f_bavail * about.f_frsize} bytes free"
    return SnapshotError(what, where=path, expected=expected, got=got, hint=_OTHER)
