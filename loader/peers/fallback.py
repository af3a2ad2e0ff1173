"""The place behind the peers, opened beside the asking, headers alone.

Its fingerprint says which peers have the same checkpoint, and it is read where none has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, SourceError
from coldframe.loader.loads.chain import Opened, Places, first_that_opens
from coldframe.loader.peers.node import Root, hashed
from coldframe.loader.sources.base import Origin
from coldframe.loader.web.pool import cancelled_error

__all__ = ["Fallback", "root_of"]


class Fallback:
    """The first place behind the peers that opens, opened in a thread of its own.

    Args:
        places: What makes them. Those behind the first that opens stay untouched.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._opened: Opened | None = None
        self._error: ColdframeError | None = None
        self._taken = False
        self._opening: Origin | None = None
        self._closed = False
        self._over = threading.Event()
        threading.Thread(target=self._run, name="peer-probe", daemon=True).start()

    @property
    def root(self) -> Root | None:
        """Its place and versions, where they tell more than a seal does."""
        return None if self._opened is None else root_of(self._opened)

    def wait(self, timeout: float) -> Opened | None:
        """What was opened; None where nothing was, or not yet."""
        self._over.wait(timeout)
        return self._opened

    def take(self) -> Opened:
        """What was opened, for whoever closes it.

        Raises:
            ColdframeError: Nothing was.
        """
        self._over.wait()
        if self._opened is None:
            assert self._error is not None
            raise self._error
        self._taken = True
        return self._opened

    def close(self) -> None:
        """Closes what nobody has taken, and ends what still waits for a network."""
        self._closed = True
        if not self._over.is_set():
            if self._opening is not None:
                self._opening.close()
        elif self._opened is not None and not self._taken:
            self._opened.origin.close()

    def _run(self) -> None:
        try:
            self._opened = first_that_opens(map(self._noting, self._places), [])
        except ColdframeError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - who waits must hear of it
            self._error = SourceError("the place behind the peers broke", got=repr(error))
        self._over.set()

    def _noting(self, make: Callable[[], Origin | Opened]) -> Callable[[], Origin | Opened]:
        def noted() -> Origin | Opened:
            if self._closed:
                raise cancelled_error()
            made = make()
            self._opening = made.origin if isinstance(made, Opened) else made
            return made

        return noted


def root_of(opened: Opened) -> Root | None:
    """Where a checkpoint is at first, for those who load it from a peer.

    None where that tells nothing: a seal knows better, a local file's times differ from machine to
    machine, and some servers tell no versions.
    """
    checkpoint = opened.checkpoint
    versions = [shard.version for shard in checkpoint.shards]
    if checkpoint.seal is not None or opened.origin.path is not None or not all(versions):
        return None
    return Root(hashed(opened.origin.uri), hashed(*versions))
