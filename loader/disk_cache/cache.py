"""A cache on disk of what came over a network: whole, sealed checkpoint directories.

    DIR/<key>               an entry: a checkpoint like any other, complete
    DIR/new-<key>-<random>  one that is being written
    DIR/old-<key>-<random>  one that is being removed

The key says what is in it, not where it came from: another content is another entry, and the same
content from elsewhere is the same one. An entry comes and goes by a rename, so it is there as a
whole or not at all. Whoever writes, reads or removes a folder has it locked (`folder`). DIR
itself is locked while names change, for moments.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.disk_cache.folder import FORMAT, Folder, locked, size_of, touch, write_note
from coldframe.loader.errors import PlatformError

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.seal import Seal
    from coldframe.loader.disk_cache.writer import CacheWriter

__all__ = ["Cache", "Entry"]

_ENTRY = re.compile(r"[0-9a-f]{32}")
_OTHER = re.compile(r"(?:new|old)-[0-9a-f]{32}-[0-9a-f]{8}")


class Entry:
    """An entry in use: it is not removed before `close`, or the end of this process.

    Attributes:
        path: Its directory, a sealed checkpoint.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.path = folder.path

    def close(self) -> None:
        self._folder.close()


class Cache:
    """A directory with entries, shared by any number of processes.

    Args:
        path: The directory; made, for this user alone, where there is none.
        size: How many bytes all entries together may have.

    Raises:
        PlatformError: The directory cannot be made or written to.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = os.path.abspath(path)
        self.size = size
        self.why: str | None = None
        """Why `begin` has returned None."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it may not be written to")
        except OSError as error:
            raise PlatformError(
                "the cache's directory cannot be used",
                where=self.path,
                got=error.strerror,
                hint="Give --cache a directory that this user can write to.",
            ) from error

    def find(self, checkpoint: Checkpoint) -> Entry | None:
        """The entry with the content that a checkpoint has at its origin now, or None."""
        key = _key(checkpoint)
        folder = None if key is None else self._use(key)
        if folder is None:
            return None
        entry = Entry(folder)
        try:
            for shard in checkpoint.shards:
                if os.stat(shard.name, dir_fd=folder.fd).st_size != shard.size:
                    raise OSError(errno.EIO, "a file of another size")
            _mark(folder.fd, checkpoint.path)
        except OSError:  # somebody has laid hands on it
            self.discard(entry)
            return None
        return entry

    def find_uri(self, uri: str) -> Entry | None:
        """What was last found or written from a place, for when that cannot be reached; or None.

        Args:
            uri: As in `Checkpoint.path`.
        """
        mark = _mark_of(uri)
        seen: list[tuple[int, str]] = []
        for name in self._names(_ENTRY):
            with suppress(OSError):  # not seen there
                seen.append((os.stat(os.path.join(self.path, name, mark)).st_mtime_ns, name))
        for _, name in sorted(seen, reverse=True):
            folder = self._use(name)
            if folder is not None:
                return Entry(folder)
        return None

    def knows(self, uri: str) -> bool:
        """Whether there is an entry for `find_uri`, as it looks now."""
        mark = _mark_of(uri)
        return any(
            os.path.exists(os.path.join(self.path, name, mark)) for name in self._names(_ENTRY)
        )

    def discard(self, entry: Entry) -> None:
        """Takes away an entry that has turned out bad. Whoever has its files open keeps them."""
        name = os.path.basename(entry.path)
        try:
            with locked(self.path):
                # It may be another by now: the name is only a name, the descriptor is the folder.
                if os.path.samestat(os.stat(entry.path), os.fstat(entry._folder.fd)):
                    os.rename(entry.path, os.path.join(self.path, _other("old", name)))
        except OSError:  # it is gone, or stays for now
            return
        finally:
            entry.close()

    def begin(self, checkpoint: Checkpoint, seal: Seal | None = None) -> CacheWriter | None:
        """Starts to write an entry, and makes room for it.

        Args:
            checkpoint: What is being loaded.
            seal: Its own seal, where it has one.

        Returns:
            The writer, or None, and then `why` says why: another process is at it, the model is
            larger than the cache, or the disk has no room.
        """
        from coldframe.loader.disk_cache.writer import CacheWriter

        self.why = None
        old: list[Folder] = []
        try:
            made = self._make(checkpoint, old)
        except OSError as error:
            made = f"the cache cannot be written: {error.strerror}"
        if isinstance(made, str):
            self.why = made
            for folder in old:
                folder.close()
            return None
        return CacheWriter(self, made, checkpoint, seal, old)

    def _make(self, checkpoint: Checkpoint, old: list[Folder]) -> Folder | str:
        """A locked folder for a new entry, or why there is none; `old` gets what is to go."""
        key = _key(checkpoint)
        if key is None:
            return "its origin does not tell versions of a file apart"
        nbytes = sum(shard.size for shard in checkpoint.shards)
        with locked(self.path):
            if os.path.lexists(os.path.join(self.path, key)):
                return "it is in the cache already"
            self._sweep(old)
            if any(name.startswith(f"new-{key}-") for name in self._names(_OTHER)):
                return "another process is writing it to the cache"
            reason = self._make_room(nbytes, old, on_disk=nbytes)
            if reason is not None:
                return reason
            name = _other("new", key)
            os.mkdir(os.path.join(self.path, name), 0o700)
            folder = Folder.lock(self.path, name)
            if folder is None:
                return "the cache's directory does not stay as it is"
            try:
                # First of all, so that others know how much will be in it.
                write_note(folder.fd, checkpoint, nbytes)
                _mark(folder.fd, checkpoint.path)
            except OSError:
                folder.remove()
                raise
            return folder

    def publish(self, folder: Folder, old: list[Folder]) -> str | None:
        """Makes a folder that is complete the entry that it is to be.

        Args:
            folder: As `begin` has made it; its lock becomes a reader's.
            old: Gets what had to make room for it.

        Returns:
            None, or why it cannot be.

        Raises:
            OSError: It cannot be renamed.
        """
        with locked(self.path) as directory:
            self._sweep(old)
            # The small files were not counted before.
            reason = self._make_room(0, old, on_disk=0)
            if reason is None:
                folder.share()
                touch(folder.fd)
                folder.rename(folder.name.split("-")[1])
                os.fsync(directory)
            return reason

    def _make_room(self, nbytes: int, old: list[Folder], *, on_disk: int) -> str | None:
        """Takes away entries, those first that were not used for longest; DIR is locked.

        Args:
            nbytes: What is to come.
            old: What is to be removed already; gets what is to go besides.
            on_disk: How much of it is not on the disk yet.

        Returns:
            None, or why there is no room; then nothing was taken away.
        """
        if nbytes > self.size:
            return f"the model is larger than the cache: {nbytes:,} of {self.size:,} bytes"
        used = nbytes + sum(size_of(os.path.join(self.path, n)) for n in self._names(_OTHER, "new"))
        entries = []
        for name in self._names(_ENTRY):
            path = os.path.join(self.path, name)
            entries.append((os.stat(path).st_mtime_ns, name))
            used += size_of(path)
        status = os.statvfs(self.path)
        free = status.f_bavail * status.f_frsize + sum(folder.nbytes for folder in old)
        chosen: list[Folder] = []
        for _, name in sorted(entries):
            if used <= self.size and free >= on_disk:
                break
            folder = Folder.lock(self.path, name)
            if folder is not None:  # else it is in use
                chosen.append(folder)
                used -= folder.nbytes
                free += folder.nbytes
        reason = None
        if used > self.size:
            reason = f"what is in use leaves no room in a cache of {self.size:,} bytes"
        elif free < on_disk:
            reason = f"its disk has {free:,} bytes for {on_disk:,}"
        if reason is not None:
            for folder in chosen:
                folder.close()
            return reason
        for folder in chosen:
            old.append(folder)
            folder.rename(_other("old", folder.name))
        return None

    def _sweep(self, old: list[Folder]) -> None:
        """Finds what dead processes have left; DIR is locked."""
        for name in self._names(_OTHER):
            folder = Folder.lock(self.path, name)
            if folder is None:
                continue
            old.append(folder)
            if name.startswith("new-"):
                folder.rename(_other("old", name.split("-")[1]))

    def _names(self, kind: re.Pattern[str], prefix: str = "") -> list[str]:
        names = os.listdir(self.path)
        return [name for name in names if name.startswith(prefix) and kind.fullmatch(name)]

    def _use(self, name: str) -> Folder | None:
        """An entry, locked against removal and marked as used now."""
        folder = Folder.lock(self.path, name, shared=True)
        if folder is not None:
            with suppress(OSError):  # then it keeps its age
                touch(folder.fd)
        return folder


def _key(checkpoint: Checkpoint) -> str | None:
    """What is in a checkpoint, as a name; None where versions of its files cannot be told apart."""
    shards = [[shard.name, shard.size, shard.version] for shard in checkpoint.shards]
    if not all(shard.version for shard in checkpoint.shards):
        return None
    content = json.dumps([FORMAT, checkpoint.fingerprint, shards], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _other(kind: str, name: str) -> str:
    return f"{kind}-{name}-{os.urandom(4).hex()}"


def _mark_of(uri: str) -> str:
    return f"uri-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def _mark(folder: int, uri: str) -> None:
    """Notes in an entry that a place has its content now."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(_mark_of(uri), flags, 0o600, dir_fd=folder)
    try:
        touch(fd)
    finally:
        os.close(fd)
