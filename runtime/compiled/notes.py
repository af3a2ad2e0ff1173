"""What is said of decode steps that are not compiled: why, to whom, and what helps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coldframe.loader.timeline import Span

__all__ = ["EAGERLY", "could_be_compiled", "eager_notice"]

EAGERLY = "decode steps are computed eagerly: "
"""What the note of a worker's span begins with, where the code that it came with is of no use."""
_FOR_NOW = (
    "not compiled: nobody waits",
    "not compiled: that takes",
    "the compiler was ended",
)
"""What `Compiling` says where it is for want of time or memory."""


def could_be_compiled(order: dict[str, Any]) -> bool:
    """Whether there is no code only because nobody waited, or time or memory ran out.

    Args:
        order: See `Compiling.order`.
    """
    return order["folder"] is None and order["why"].startswith(_FOR_NOW)


def eager_notice(spans: Iterable[Span], model: str, threads: int) -> str | None:
    """What to tell who has got an answer without the compiled steps of its image; None if nothing.

    Args:
        spans: Of the replica's workers.
        model: Its name, as it was given.
        threads: That its workers compute with.
    """
    notes = (span.note for span in spans if span.name == "graph_restore")
    why = next((note for note in notes if note and note.startswith(EAGERLY)), None)
    if why is not None and "compiled for threads " in why:
        why += f"; `coldframe snapshot create {model} --threads {threads}` makes an image for that"
    return why
