"""The sources of a load that copies: each place's own, verified, and the first one's kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coldframe.loader.checkpoints.seal_check import SealCheck
from coldframe.loader.loads.chain import Opened
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.file import FileSource

if TYPE_CHECKING:
    from coldframe.loader.disk_cache.keeping import Keeping

__all__ = ["SourceOpener"]


class SourceOpener:
    """Opens the sources of one load, as `ChainSource` asks for them.

    Args:
        seal: What the bytes are held against.
        files: Those of the first place, where they are open already. They are closed with its
            source.
        direct: Whether files are read past the page cache, where that goes.
        keeping: Where what comes over a network is kept, if anywhere.
        arena: See `Keeping.write_through`.
    """

    def __init__(
        self,
        seal: SealCheck,
        files: FileSource | None,
        *,
        direct: bool,
        keeping: Keeping | None,
        arena: Callable[[], memoryview | None],
    ) -> None:
        self._seal = seal
        self._files = files
        self._direct = direct
        self._keeping = keeping
        self._arena = arena
        self._is_first = True

    def open(self, opened: Opened) -> Source:
        """The source of a place.

        Raises:
            SourceError: It cannot be opened, or is not what was read there.
        """
        first, self._is_first = self._is_first, False
        source = self._seal.checked(self._plain(opened), opened.checkpoint)
        if self._keeping is None or opened.origin.path is not None or not first:
            return source
        # What comes from a place behind the first is not kept: unless sealed, nobody knows whether
        # it is what the first one has.
        return self._keeping.write_through(source, opened.checkpoint, self._arena)

    def _plain(self, opened: Opened) -> Source:
        shards = opened.checkpoint.shards
        if opened.origin.path is None:
            return opened.origin.open_source(shards, sealed=self._seal.seal is not None)
        files, self._files = self._files, None
        files = files or FileSource(shards)
        if self._direct:
            try:
                files.use_direct()
            except BaseException:
                files.close()
                raise
        return files
