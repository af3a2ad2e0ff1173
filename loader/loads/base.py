"""What a load is to the memory service, wherever the bytes come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from coldframe.loader.errors import ColdframeError
from coldframe.loader.loads.weights import Weights
from coldframe.loader.memory_service.board import Board

__all__ = ["AnyLoad", "LoadEvents"]


@dataclass(frozen=True, slots=True)
class LoadEvents:
    """What is called while a load goes on, by threads of its own.

    Attributes:
        on_files: Called with the directory that has the model's small files, once they are there.
        on_plan: Called once plan, segments and board stand, before the first stage is ready.
        on_stage: Called with each stage's index when its bytes are in.
        on_end: Called at the end, with the error that ended it early or None.
        on_kept: Called when the cache has all of it, with None, or with why it has not.
    """

    on_files: Callable[[str], None]
    on_plan: Callable[[], None]
    on_stage: Callable[[int], None]
    on_end: Callable[[ColdframeError | None], None]
    on_kept: Callable[[str | None], None] = lambda why: None


class AnyLoad(Protocol):
    """A checkpoint on its way into an arena."""

    @property
    def weights(self) -> Weights:
        """Where they lie; from `LoadEvents.on_plan` on."""
        ...

    @property
    def board(self) -> Board:
        """How far it is; likewise."""
        ...

    @property
    def local(self) -> bool:
        """Whether the checkpoint lies in a directory of the user's, and not only in the cache."""
        ...

    @property
    def identity(self) -> str | None:
        """What tells these weights from all others, for what is kept beyond this replica.

        None where nothing does. Known once there is a plan.
        """
        ...

    @property
    def proven(self) -> bool:
        """Whether the weights, being in, are known to be those that `identity` names."""
        ...

    @property
    def peers_at(self) -> str | None:
        """Where peers are served, `HOST:PORT`; None where they are not."""
        ...

    def run(self) -> None:
        """Opens, plans and starts the stream; returns while that goes on.

        Raises:
            ColdframeError: The checkpoint is bad, cannot be read or does not fit.
        """
        ...

    def landed(self) -> None:
        """Gives back what only the stream needed; to be called once it has ended."""
        ...

    def close(self) -> None:
        """Stops the stream and gives everything back."""
        ...
