"""A store in a directory.

Who writes holds a shared lock (flock) on it from its first object until its manifest is there; it
ends with the process. Only under an exclusive lock, and so while nobody writes, is removed what no
manifest names: what a dead process has left, and the objects of images that were removed. What is
not called as a store calls its files is not ours, and stays.

The folders are opened once for each operation, checked by their descriptors, and used through
these: a path may lead elsewhere a moment later.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from coldframe.loader.errors import ImageDamaged, SnapshotError
from coldframe.snapshot.backend import (
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    OBJECTS,
    Document,
    Usage,
    image_of,
    is_digest,
    named_in,
)
from coldframe.snapshot.image_files import StoredObject
from coldframe.snapshot.manifest import is_image_id
from coldframe.snapshot.packing import Bundle, write_object
from coldframe.snapshot.safe_folder import (
    NEW,
    READ,
    TEMPORARY,
    check_safe,
    discard,
    failed,
    is_safe,
    open_folder,
    temporary_name,
    write_file,
)

__all__ = ["DirectoryBackend"]

_GONE = "Remove the image; a new one is made in its place."


class _Folders(NamedTuple):
    """The descriptors of a store's two folders, and the path of the store for messages."""

    root: str
    objects: int
    manifests: int

    def path(self, folder: str, name: str = "") -> str:
        return os.path.join(self.root, folder, name)


class DirectoryBackend:
    """Images in a directory.

    Args:
        root: Its path; it need not be there.
    """

    run_bytes = 1
    threads = 1

    def __init__(self, root: str) -> None:
        self.uri = os.path.abspath(root)

    def documents(self, *, strict: bool) -> list[Document]:
        with self._opened(strict=strict) as folders:
            if folders is None:
                return []
            try:
                return _documents(folders, strict)
            except OSError as error:
                where = folders.path(MANIFESTS)
                raise failed("the store cannot be read", where, error) from error

    @contextlib.contextmanager
    def reader(self, *, strict: bool) -> Iterator[_Reader]:
        with self._opened(strict=strict) as folders:
            if folders is None:
                raise _missing(os.path.join(self.uri, OBJECTS))
            reader = _Reader(folders, strict)
            try:
                yield reader
            finally:
                reader.close()

    def direct(self) -> contextlib.AbstractContextManager[_Reader]:
        return self.reader(strict=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[_Writer]:
        with self._made() as folders:
            self._sweep_alone(folders)
            with contextlib.suppress(OSError):  # without locks nothing is removed either
                fcntl.flock(folders.objects, fcntl.LOCK_SH)
            try:
                yield _Writer(folders)
            except BaseException:
                self._sweep_alone(folders)
                raise

    def check_writable(self) -> None:
        with self._made() as folders:
            for name, fd in ((OBJECTS, folders.objects), (MANIFESTS, folders.manifests)):
                temporary = temporary_name()
                try:
                    os.close(os.open(temporary, NEW, 0o600, dir_fd=fd))
                    os.unlink(temporary, dir_fd=fd)
                except OSError as error:
                    where = folders.path(name)
                    raise failed("the store cannot be written", where, error) from error

    def withdraw(self, image: str) -> bool:
        if not is_image_id(image):
            return False
        name = f"{image}.json"
        with self._opened(strict=True) as folders:
            if folders is None:
                return False
            try:
                os.unlink(name, dir_fd=folders.manifests)
            except FileNotFoundError:
                return False
            except OSError as error:
                where = folders.path(MANIFESTS, name)
                raise failed("the image cannot be removed", where, error) from error
        return True

    def sweep(self) -> None:
        with self._opened(strict=True) as folders:
            if folders is not None:
                self._sweep_alone(folders)

    def touch(self, image: str) -> None:
        now = time.time_ns()  # by itself the kernel would take the time of its last tick
        # A store that may only be read is as good.
        with contextlib.suppress(OSError, SnapshotError), self._opened(strict=True) as folders:
            if folders is not None and is_image_id(image):
                manifests, name = folders.manifests, f"{image}.json"
                os.utime(name, ns=(now, now), dir_fd=manifests, follow_symlinks=False)

    def usage(self) -> Usage:
        with self._opened(strict=False) as folders:
            if folders is None:
                return Usage(0, 0, None)
            try:
                about = os.fstatvfs(folders.objects)
                with os.scandir(folders.objects) as items:
                    nbytes = sum(
                        item.stat(follow_symlinks=False).st_size
                        for item in items
                        if _is_ours(item.name)
                    )
                images = sum(image_of(name) is not None for name in os.listdir(folders.manifests))
            except OSError as error:
                raise failed("the store cannot be read", self.uri, error) from error
        return Usage(images, nbytes, about.f_bavail * about.f_frsize)

    @contextlib.contextmanager
    def _opened(self, *, strict: bool) -> Iterator[_Folders | None]:
        """The store's folders; None where there is no store yet."""
        with contextlib.ExitStack() as stack:
            folders = None
            try:
                folders = self._open(stack, strict=strict, make=False)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise failed("the store cannot be read", self.uri, error) from error
            yield folders

    @contextlib.contextmanager
    def _made(self) -> Iterator[_Folders]:
        """The store's folders, to write in; they are made where there are none."""
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self.uri, 0o700, exist_ok=True)
                folders = self._open(stack, strict=True, make=True)
            except OSError as error:
                raise failed("the store cannot be made", self.uri, error) from error
            yield folders

    def _open(self, stack: contextlib.ExitStack, *, strict: bool, make: bool) -> _Folders:
        root = open_folder(self.uri, None, strict)
        stack.callback(os.close, root)
        opened = []
        for name in (OBJECTS, MANIFESTS):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=root)
            opened.append(open_folder(os.path.join(self.uri, name), root, strict))
            stack.callback(os.close, opened[-1])
        return _Folders(self.uri, *opened)

    def _sweep_alone(self, folders: _Folders) -> None:
        """Removes what no manifest names, if nobody else is writing; ends the lock."""
        try:
            fcntl.flock(folders.objects, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        try:
            documents = _documents(folders, strict=False)
            if any(document.raw is None for document in documents):
                return  # nobody knows what those name
            named = set().union(*(named_in(document.raw) for document in documents))
            for name in os.listdir(folders.objects):
                if _is_ours(name) and name not in named:
                    discard(name, folders.objects)
            for name in os.listdir(folders.manifests):
                if name.startswith(TEMPORARY):
                    discard(name, folders.manifests)
        except OSError:
            pass  # what could not be removed now may be another time
        finally:
            fcntl.flock(folders.objects, fcntl.LOCK_UN)


class _Writer:
    def __init__(self, folders: _Folders) -> None:
        self._folders = folders

    def add(self, bundle: Bundle, codec: str) -> StoredObject:
        objects, temporary = self._folders.objects, temporary_name()
        try:
            fd = os.open(temporary, NEW, 0o600, dir_fd=objects)
            try:
                item = write_object(bundle, fd, codec)
                os.fsync(fd)
            finally:
                os.close(fd)
            if _holds(objects, item):
                os.unlink(temporary, dir_fd=objects)
            else:
                os.replace(temporary, item.digest, src_dir_fd=objects, dst_dir_fd=objects)
        except BaseException as error:
            discard(temporary, objects)
            if isinstance(error, OSError):
                what, where = "an image cannot be written to the store", self._folders.path(OBJECTS)
                raise failed(what, where, error, bundle.size) from error
            raise
        return item

    def publish(self, image: str, raw: bytes) -> None:
        try:
            os.fsync(self._folders.objects)  # the objects' names, before anything names them
            write_file(f"{image}.json", raw, self._folders.manifests)
        except OSError as error:
            what, where = "a manifest cannot be written to the store", self._folders.path(MANIFESTS)
            raise failed(what, where, error, len(raw)) from error


class _Reader:
    """Opens each object once, and has the kernel read ahead."""

    def __init__(self, folders: _Folders, strict: bool) -> None:
        self._folders = folders
        self._strict = strict
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._lasting: str | None = None
        if strict:
            self._lasting = _lasting_path(folders.objects, folders.path(OBJECTS))

    def read(self, item: StoredObject, offset: int, buffer: memoryview) -> None:
        path = self._folders.path(OBJECTS, item.digest)
        try:
            with self._lock:
                fd = self._open.get(item.digest)
                if fd is None:
                    fd = os.open(item.digest, READ, dir_fd=self._folders.objects)
                    self._open[item.digest] = fd
                    self._begin(fd, item, path)
            got = 0
            while got < buffer.nbytes:
                count = os.preadv(fd, [buffer[got:]], offset + got)
                if count == 0:
                    raise _wrong_size(path, item, offset + got)
                got += count
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise failed("the image cannot be read", path, error) from error

    def path_of(self, item: StoredObject) -> str | None:
        if self._lasting is None:
            return None
        try:
            status = os.stat(item.digest, dir_fd=self._folders.objects, follow_symlinks=False)
        except OSError:
            return None
        whole = stat.S_ISREG(status.st_mode) and status.st_size == item.stored_bytes
        return os.path.join(self._lasting, item.digest) if whole and is_safe(status) else None

    def _begin(self, fd: int, item: StoredObject, path: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError(
                "this is not a regular file", where=path, got=stat.filemode(status.st_mode)
            )
        if self._strict:
            check_safe(status, path, "a file")
        if status.st_size != item.stored_bytes:
            raise _wrong_size(path, item, status.st_size)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


def _lasting_path(fd: int, path: str) -> str | None:
    """The path of an open folder, if nobody else can make it lead elsewhere.

    In a folder with the sticky bit others can rename only what is theirs.
    """
    real = os.path.realpath(path)
    try:
        if not os.path.samestat(os.stat(real), os.fstat(fd)):
            return None
        above = real
        while above != os.path.dirname(above):
            above = os.path.dirname(above)
            status = os.lstat(above)
            fixed = status.st_uid in (0, os.geteuid()) and status.st_mode & stat.S_ISVTX
            if not (fixed or is_safe(status)):
                return None
    except OSError:
        return None
    return real


def _documents(folders: _Folders, strict: bool) -> list[Document]:
    found = []
    for name in os.listdir(folders.manifests):
        image = image_of(name)
        if image is not None:
            found.append(_document(image, name, folders, strict))
    return [document for document in found if document is not None]


def _document(image: str, name: str, folders: _Folders, strict: bool) -> Document | None:
    try:
        fd = os.open(name, READ, dir_fd=folders.manifests)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
                return Document(image, None, "it is no small file", status.st_mtime)
            if strict and not is_safe(status):
                return Document(image, None, "others could have written it", status.st_mtime)
            with open(fd, "rb", closefd=False) as file:
                return Document(image, file.read(), "", status.st_mtime)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None  # removed just now
    except OSError as error:
        return Document(image, None, error.strerror or str(error), 0.0)


def _holds(objects: int, item: StoredObject) -> bool:
    """Whether an object is there already, sound, and safe from others."""
    import hashlib

    try:
        with open(os.open(item.digest, READ, dir_fd=objects), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not is_safe(status):
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == item.digest
    except OSError:
        return False


def _is_ours(name: str) -> bool:
    """Whether something among the objects is called as a store calls what it writes there."""
    return is_digest(name) or name.startswith(TEMPORARY)


def _missing(path: str) -> ImageDamaged:
    return ImageDamaged(
        "a part of the image is missing", where=path, got="no such file", hint=_GONE
    )


def _wrong_size(path: str, item: StoredObject, got: int) -> SnapshotError:
    return ImageDamaged(
        "a part of the image has another size",
        where=path,
        expected=f"{item.stored_bytes} bytes",
        got=f"{got} bytes",
        hint=_GONE,
    )
