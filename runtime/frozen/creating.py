"""An image for the next start, made when this replica is idle and started without one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.compiled.compiling import COMPILE_S
from coldframe.runtime.options import SnapshotOptions
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.signing import read_key
from coldframe.snapshot.store import Store, open_store

if TYPE_CHECKING:
    from coldframe.runtime.frozen.freezing import Freezing
    from coldframe.runtime.gateway.logs import Log
    from coldframe.runtime.replica.replica import Replica

__all__ = ["ImageInTheMaking", "NextImage", "image_for_next_time", "prune", "store_of"]

_QUIET_S = 1.0
"""How long nobody asks before an image is made for the next start, in seconds."""
_TOO_MANY = 2
"""So many starts without an image are enough."""
_LIMIT_S = 60.0
"""How long nobody minds that a replica which is idle does not end."""


def image_for_next_time(replica: Replica) -> dict[str, Any]:
    """Makes an image where one is wanted: the replica had none, and its options allow it.

    It is not tried where an image was there and could not be used: the next one would not fare
    better. Nor where there is no CRIU, which is no news to anybody.

    Args:
        replica: Its weights are in. It goes on serving meanwhile.

    Returns:
        `created`, the image's id, or `not_created`, the reason; nothing where none was wanted.
        `not_removed`, why images beyond the limits are still there.
    """
    if not _wanted(replica):
        return {}
    from coldframe.runtime.frozen.freezing import Freezing

    # Nothing of this may spoil what has been answered.
    try:
        # Somebody waits for the command to end: what is compiled already is taken.
        freezing = Freezing(replica, replica.options.snapshot, code=_code(replica, 0))
        freezing.follow(_LIMIT_S)
    except ColdframeError as error:
        return {"not_created": str(error)}
    return _outcome(freezing)


class ImageInTheMaking:
    """The same beside a replica that serves on: `step` is called whenever something has happened.

    Args:
        replica: Its weights are in, and it is idle.
        limit_s: How long compiling its decode step may take, in seconds; 0 takes what there is.
        better: Whether there is an image, and only one with compiled steps is wanted.
    """

    def __init__(self, replica: Replica, limit_s: int = COMPILE_S, *, better: bool = False) -> None:
        self.outcome: dict[str, Any] | None = None
        """What `image_for_next_time` returns, once that is known."""
        self._freezing: Freezing | None = None
        if not _wanted(replica, better=better):
            self.outcome = {}
            return
        from coldframe.runtime.frozen.freezing import Freezing

        self._late = time.monotonic() + _LIMIT_S
        try:
            self._freezing = Freezing(
                *(replica, replica.options.snapshot),
                code=_code(replica, limit_s),
                only_compiled=better,
            )
        except ColdframeError as error:
            self.outcome = {"not_created": str(error)}

    @property
    def compiling(self) -> bool:
        """Whether its decode step is compiled, before anything is frozen."""
        return self._freezing is not None and self._freezing.compiling

    def step(self) -> None:
        """Looks whether it is made, or takes too long."""
        freezing = self._freezing
        if self.outcome is not None or freezing is None:
            return
        freezing.look()
        if freezing.compiling:
            self._late = time.monotonic() + _LIMIT_S
        if time.monotonic() > self._late:
            freezing.close()
        if freezing.done:
            self.outcome = _outcome(freezing)

    def close(self) -> None:
        """Gives it up where it is not made."""
        if self._freezing is not None:
            self._freezing.close()


class NextImage:
    """Sees to an image for the next start, of one replica after the other.

    Args:
        log: Gets what became of it.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._image: ImageInTheMaking | None = None
        self._without = 0
        """Starts for which there was none, since one was made."""
        self._bettered = False
        """Whether a better one was begun: once is enough."""

    @property
    def making(self) -> bool:
        """Whether one is being made."""
        return self._image is not None and self._image.outcome is None

    @property
    def holds(self) -> bool:
        """Whether one is being made that will be there soon: the replica is not to rest yet.

        What takes minutes is compiled as long as nothing else is to be done.
        """
        return self._image is not None and self.making and not self._image.compiling

    @property
    def urgent(self) -> bool:
        """Whether it is not to be put off, nor left for another model's sake.

        Where models take turns, none is ever left alone for long enough. Such a one takes what is
        compiled already, and no longer than the freezing.
        """
        return self._without >= _TOO_MANY

    def started(self, replica: Replica) -> None:
        """A replica has become warm from zero."""
        self._without += replica.wants_image and replica.options.snapshot.create

    def step(self, replica: Replica, quiet_s: float) -> None:
        """Begins, where it is time, and goes on.

        Args:
            replica: The one that there is, warm.
            quiet_s: For how long nobody has asked, in seconds.
        """
        if self._image is None:
            if quiet_s > _QUIET_S or self.urgent:
                self._begin(replica)
        elif self._image.outcome is None:
            self._image.step()
            if self._image.outcome:
                self._log.info("image for the next start", **self._image.outcome)
                if "created" in self._image.outcome:
                    self._without = 0

    def _begin(self, replica: Replica) -> None:
        better = not self._bettered and replica.wants_compiled_image
        self._bettered = self._bettered or better
        limit_s = 0 if self.urgent else COMPILE_S
        self._image = ImageInTheMaking(replica, limit_s, better=better)

    def rest(self) -> None:
        """The replica is about to rest: what is not made yet is given up, and tried again later."""
        if self.making:
            self.leave()

    def leave(self) -> None:
        """The replica is about to be ended."""
        if self._image is not None:
            self._image.close()
            self._image = None


def _code(replica: Replica, limit_s: int) -> int | None:
    return limit_s if replica.options.graphs else None


def _wanted(replica: Replica, *, better: bool = False) -> bool:
    if not replica.options.snapshot.create or not (replica.wants_image or better):
        return False
    if not replica.spec.native:  # an image holds native workers
        return False
    try:
        Criu.find()
    except ColdframeError:
        return False
    return True


def _outcome(freezing: Freezing) -> dict[str, Any]:
    if freezing.error is not None:
        return {"not_created": str(freezing.error)}
    try:
        prune(freezing.snapshot, str(freezing.image))
    except ColdframeError as error:
        return {"created": freezing.image, "not_removed": str(error)}
    return {"created": freezing.image}


def prune(snapshot: SnapshotOptions, keep: str) -> list[str]:
    """Removes images that are too old or too much: their ids.

    Args:
        snapshot: The store and its limits.
        keep: An image that stays.
    """
    return store_of(snapshot).prune(
        max_bytes=snapshot.max_bytes, max_age_s=snapshot.max_age_s, keep=frozenset({keep})
    )


def store_of(snapshot: SnapshotOptions) -> Store:
    """The store that options name.

    Raises:
        SnapshotError: It, or the key, cannot be used.
    """
    key = None if snapshot.key_file is None else read_key(snapshot.key_file)
    return open_store(snapshot.store, key=key)
