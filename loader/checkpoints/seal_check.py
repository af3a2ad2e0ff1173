"""Whether a load's bytes are held against the checkpoint's seal, and what is said where not."""

from __future__ import annotations

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.seal import Seal
from coldframe.loader.sources.base import Source

__all__ = ["SealCheck"]


class SealCheck:
    """The seal of the checkpoint that is being loaded.

    Args:
        seal: Its seal, or None.
        wanted: Whether the bytes are to be held against one.
    """

    def __init__(self, seal: Seal | None, *, wanted: bool) -> None:
        self._seal = seal
        self._wanted = wanted

    @property
    def seal(self) -> Seal | None:
        """What the bytes are held against; None where nothing is."""
        return self._seal if self._wanted else None

    @property
    def unverified(self) -> str:
        """Why nothing vouches for the bytes, or not yet."""
        if not self._wanted:
            return "unverified, as asked"
        if self._seal is None:
            return "unverified: the checkpoint is not sealed (coldframe seal MODEL)"
        return "to be verified behind the first token"

    def checked(self, source: Source, checkpoint: Checkpoint) -> Source:
        """A source that holds what it gives against the seal, where there is one.

        Args:
            source: Of one place.
            checkpoint: As it was opened there. Of two places that hold the same, one may have no
                seal.
        """
        if self.seal is None:
            return source
        from coldframe.loader.checkpoints.verify import VerifiedSource

        return VerifiedSource(source, checkpoint.seal or self.seal, checkpoint)
