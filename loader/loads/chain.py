"""Sources one after the other: where one fails, the next goes on.

A place that fails before it gave a byte hands over to the next as if it had never been asked.
After a fault in the middle only what is not in yet is fetched from the next, which must hold the
same checkpoint: names, sizes and headers of all shards, the config, and the seal if there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import (
    ColdframeError,
    SourceChanged,
    SourceCorrupt,
    SourceError,
)
from coldframe.loader.sources.base import SEALED, Origin, Source

__all__ = ["ChainSource", "Opened", "Places", "first_that_opens"]

Places = Iterator[Callable[[], "Origin | Opened"]]
"""What makes each of several places, or opens it, in the order in which they are tried."""

OpenSource = Callable[["Opened"], Source]


class Opened(NamedTuple):
    """A place and the checkpoint that was found there."""

    origin: Origin
    checkpoint: Checkpoint


def first_that_opens(origins: Places, failures: list[ColdframeError]) -> Opened:
    """The first place that has a sound checkpoint.

    Args:
        origins: What makes the places, in the order in which they are tried; one call each.
            Those behind the place that is returned stay untouched.
        failures: Gets the errors of those before it.

    Raises:
        ColdframeError: The error of the last place, when none has one; its hint names the others.
    """
    for make in origins:
        origin: Origin | None = None
        try:
            made = make()
            if isinstance(made, Opened):
                return made
            origin = made
            return Opened(origin, Checkpoint.open(origin))
        except ColdframeError as error:
            if origin is not None:
                origin.close()
            failures.append(error)
    last = failures[-1]
    for before in failures[:-1]:
        last.hint += f" Tried before it: {type(before).__name__}, {before.what} in {before.where}."
    raise last


class ChainSource:
    """The source of one place, and those of others behind it.

    Args:
        opened: The place that is read first.
        later: What makes the others, in their order.
        open_source: Makes a place's source.
        on_change: Called with the URI of the place that goes on and the error that ended the one
            before it.
        sealed: Whether each byte is held against a seal. Without, nothing can go on from a place
            that changed while it was read: what it gave before may be of either version.
    """

    def __init__(
        self,
        opened: Opened,
        later: Places,
        open_source: OpenSource,
        on_change: Callable[[str, ColdframeError], None],
        *,
        sealed: bool,
    ) -> None:
        self._checkpoint = opened.checkpoint
        self._later = later
        self._open_source = open_source
        self._on_change = on_change
        self._changing = threading.Lock()
        self._current = open_source(opened)
        self._origins: list[Origin] = []
        self._sources = [self._current]
        self._opening: Origin | None = None
        self._tainted: Source | None = None
        self._taint: SourceError | None = None
        self._aborted = False
        self._sealed = sealed
        self._givers: set[Source] = set()

    @property
    def readers(self) -> int | None:
        return self._current.readers

    @property
    def chunk(self) -> int | None:
        return self._current.chunk

    @property
    def note(self) -> str:
        return self._current.note

    @property
    def verified(self) -> str | None:
        if len(self._sources) == 1:
            return self._current.verified
        # Checksums of a whole object say nothing where another gave a part of it; a seal does.
        found = {source.verified for source in self._sources}
        return found.pop() if found == {SEALED} else None

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        while True:
            source = self._current
            try:
                source.read_into(shard, offset, parts)
                self._givers.add(source)
                if source is not self._tainted:
                    return
                # It was found to have changed while this came from it: again, from the next.
                self._check_replaced(source)
            except SourceError as error:
                self._go_on(source, error)

    def _check_replaced(self, tainted: Source) -> None:
        """Raises where no other place has stepped in for one that has changed.

        It raises what the change was seen by: the first who says that it is over is believed.
        """
        with self._changing:
            if self._current is tainted:
                assert self._taint is not None
                raise self._taint

    def _go_on(self, failed: Source, error: SourceError) -> None:
        """Takes the next place, unless another thread has done so.

        Raises:
            SourceError: The one given: there is none that could go on.
        """
        with self._changing:
            if self._current is not failed:
                return
            mixed = isinstance(error, SourceChanged | SourceCorrupt) and not self._sealed
            if mixed:
                # Before the look at what was given: see `read_into`.
                self._taint, self._tainted = error, failed
            if self._aborted or (mixed and self._givers):
                raise error
            for make in self._later:
                origin: Origin | None = None
                try:
                    made = make()
                    place = made.origin if isinstance(made, Opened) else made
                    origin = self._opening = place
                    if self._aborted:
                        raise error
                    opened = made if isinstance(made, Opened) else None
                    opened = opened or Opened(place, Checkpoint.open(place))
                    self._check_same(opened.checkpoint)
                    source = self._open_source(opened)
                except ColdframeError as refused:
                    if origin is not None:
                        origin.close()
                    if self._aborted:
                        raise error from None
                    error.hint += f" {type(refused).__name__}: {refused.what} in {refused.where}."
                    continue
                self._opening = None
                self._origins.append(place)
                self._sources.append(source)
                self._current = source
                self._on_change(place.uri, error)
                return
            raise error

    def _check_same(self, found: Checkpoint) -> None:
        if not self._checkpoint.agrees_with(found):
            raise SourceChanged(
                "this place holds another checkpoint than the one that is being loaded",
                where=found.path,
                expected=f"what is in {self._checkpoint.path}",
                got="another config, or other shards",
                hint="Copy the same files to all sources.",
            )

    def finish(self) -> None:
        self._current.finish()
        for source in self._givers - {self._current}:
            # Of a place that failed, checksums over all of it will never be complete. That its
            # files have not changed is to be seen still; a seal tells more.
            if not self._sealed and source.verified is None:
                source.finish()

    def abort(self) -> None:
        self._aborted = True
        # A place that is being opened would be waited for.
        opening = self._opening
        if opening is not None:
            opening.close()
        with self._changing:
            sources = list(self._sources)
        for source in sources:
            source.abort()

    def close(self) -> None:
        for source in self._sources:
            source.close()
        for origin in self._origins:
            origin.close()
