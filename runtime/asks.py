"""What is asked of a model, held while no replica can answer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.router import Listener, TokenEvent

__all__ = ["Ask", "Probe"]


class _Keeper(Protocol):
    def answered(self, name: str) -> None: ...

    def given_up(self, name: str, error: ColdframeError) -> None: ...


@dataclass(slots=True)
class Ask:
    """A request, and its place with the replica that there is.

    Args:
        keeper: Told when it is done, and when it has failed.
        name: The keeper's, for it.
        params: What is asked for.
        listener: Who asked.
        prompt: The prompt as text, or
        prompt_ids: as token ids.
        add_special: Whether the tokenizer puts its own tokens around the text.
    """

    keeper: _Keeper
    name: str
    params: SamplingParams
    listener: Listener
    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    add_special: bool
    request: str | None = field(default=None, init=False)
    """Its id with the replica; None while it is held."""
    tokens: int = field(default=0, init=False)
    deaths: int = field(default=0, init=False)

    def on_token(self, event: TokenEvent) -> None:
        self.tokens += 1
        if event.finish is not None:
            self.keeper.answered(self.name)
        self.listener.on_token(event)

    def on_error(self, error: ColdframeError) -> None:
        self.keeper.given_up(self.name, error)


class Probe:
    """Who asks for the first token where no client does."""

    def __init__(self) -> None:
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: ColdframeError) -> None:
        self.error = error
