"""Where a load's checkpoint comes from: peers, the places that were named, or the cache.

The places are tried in their order, peers before all of them. What opens first is read, those
behind it stand by (`chain`). Where the cache has what opened, that is read instead; and it steps in
where nothing can be reached.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from coldframe.loader.errors import ColdframeError, SourceCorrupt, SourceUnreachable
from coldframe.loader.loads.chain import Opened, Places, first_that_opens
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.sources.base import Origin
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import origins_of
from coldframe.loader.throttle import Throttle

# What only some loads need is imported by those.
if TYPE_CHECKING:
    from coldframe.loader.disk_cache.keeping import Keeping
    from coldframe.loader.peers.following import Following
    from coldframe.loader.peers.node import Node

__all__ = ["Resolver"]


class Resolver:
    """The places of one load, and the one that was found.

    Args:
        options: Which they are.
        throttle: A limit on what comes over a network.
        node: This replica among its peers, where it has any.
        served_at: `HOST:PORT` where it serves peers itself, or None.

    Attributes:
        why: Why it is not the first place that is read, where there were others.
        from_cache: Whether it is an entry of the cache that is read.
        keeping: The cache, where one is kept.
        peers: Those that may be read from, where there are any.

    Raises:
        RequestError: One of the places is none.
        PlatformError: The cache cannot be used.
    """

    def __init__(
        self,
        options: LoadOptions,
        throttle: Throttle | None,
        node: Node | None,
        served_at: str | None,
    ) -> None:
        self.why: str | None = None
        self.from_cache = False
        self.keeping: Keeping | None = None
        self.peers: Following | None = None
        self._origins: list[Origin] = []
        self._uris = [parse_location(place).uri for place in (options.model, *options.sources)]
        """All places, the model's first, as the cache knows them."""
        if options.cache is not None:
            from coldframe.loader.disk_cache.keeping import Keeping

            self.keeping = Keeping(options.cache, options.cache_bytes)
        self._places: Places = origins_of(
            [*options.sources, options.model],
            throttle,
            # An empty cache steps in for nobody.
            hurry_last=any(self.keeping.knows(uri) for uri in self._uris if self.keeping),
        )
        if node is not None and (options.peers or options.peers_from):
            from coldframe.loader.peers.joining import follow

            self.peers = follow(options, node, throttle, self._places, served_at)
            self._places = self.peers.places()

    @property
    def from_directory(self) -> bool:
        """Whether what is read lies in a directory, be it the cache's."""
        return bool(self._origins) and self._origins[-1].path is not None

    @property
    def local(self) -> bool:
        """Whether it lies in a directory of the user's, and not only in the cache.

        An entry of the cache that turns out bad is taken away, by us or by another process.
        """
        return self.from_directory and not self.from_cache

    def open(self) -> tuple[Opened, Places]:
        """The place to read first, and those behind it; the cache stands before a network.

        Raises:
            ColdframeError: There is no sound checkpoint anywhere.
        """
        places = self._places
        failures: list[ColdframeError] = []
        try:
            opened = first_that_opens(places, failures)
        except SourceUnreachable as error:
            found = (self.keeping.find_uri(uri) for uri in self._uris if self.keeping)
            kept = next((opened for opened in found if opened is not None), None)
            if kept is None:
                raise
            self.why = f"from the cache: {error.where}: {error.what}"
            self._take_from_cache(kept)
            return kept, places
        if self.peers is not None:
            self.why = self.peers.why
        elif failures:
            self.why = "; ".join(f"{error.where}: {error.what}" for error in failures)
        self._origins.append(opened.origin)
        if self.keeping is None or opened.origin.path is not None:
            return opened, places
        kept = self.keeping.find(opened.checkpoint)
        if kept is None:
            return opened, places
        self.why = "from the cache"
        if self.peers is not None:
            self.peers.ended()
        self._take_from_cache(kept)
        return kept, chain([lambda: opened.origin], places)

    def _take_from_cache(self, kept: Opened) -> None:
        self.from_cache = True
        self._origins.append(kept.origin)

    def distrusts(self, error: ColdframeError) -> bool:
        """Whether an error says that the entry of the cache that is read is corrupt."""
        return self.keeping is not None and self.from_cache and isinstance(error, SourceCorrupt)

    def discard(self, error: ColdframeError) -> None:
        """Takes that entry away, so that no start meets it again; nobody else may read it."""
        if self.keeping is not None and self.keeping.discard():
            error.hint = "It was in the cache, and is taken away: start again."

    def ended(self) -> None:
        """Nothing more is wanted from any peer."""
        if self.peers is not None:
            self.peers.ended()

    def stop(self) -> None:
        """Ends what waits for peers; `close` is to follow."""
        if self.peers is not None:
            self.peers.close()

    def close(self) -> None:
        """Closes the places, of which nothing is read any more."""
        for origin in self._origins:
            origin.close()
