"""A checkpoint in a local directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coldframe.loader.errors import CheckpointError
from coldframe.loader.files import open_regular, pread_exactly, read_whole, source_error, version_of
from coldframe.loader.sources.location import MODEL_FORMS

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Shard
    from coldframe.loader.sources.file import FileSource

__all__ = ["DirectoryOrigin"]


class DirectoryOrigin:
    """The files of a directory.

    Args:
        path: The directory.
    """

    concurrency = 1

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def path(self) -> str:
        return self._path

    @property
    def uri(self) -> str:
        return self.path

    def check(self) -> None:
        try:
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:
            raise source_error(error, self.path, MODEL_FORMS) from None
        if not stat.S_ISDIR(mode):
            raise CheckpointError(
                "the model is not a directory",
                where=self.path,
                expected="a directory with config.json and safetensors",
                got="a file",
                hint="Give the directory that the file is in.",
            )

    def uri_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.uri_of(name))

    def read_small(self, name: str, limit: int) -> bytes:
        return read_whole(self.uri_of(name), limit)

    def open_shard(self, name: str) -> _OpenFile:
        return _OpenFile(self.uri_of(name))

    def open_source(self, shards: Sequence[Shard], *, sealed: bool = False) -> FileSource:
        from coldframe.loader.sources.file import FileSource

        return FileSource(shards)

    def close(self) -> None:
        return


class _OpenFile:
    def __init__(self, path: str) -> None:
        self.uri = path
        self._fd, status = open_regular(path)
        self.size = status.st_size
        self.version = version_of(status)

    def read(self, offset: int, length: int) -> bytes:
        return pread_exactly(self._fd, self.uri, length, offset)

    def close(self) -> None:
        os.close(self._fd)
