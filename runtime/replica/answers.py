"""What whoever asks a replica hears: tokens one by one, or an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coldframe.loader.errors import ColdframeError

__all__ = ["Listener", "TokenEvent"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token for the client; see `coldframe.runtime.engine.sequence.Emission`."""

    index: int
    token: int
    text: str
    finish: str | None
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    prompt_tokens: int = 0
    spellings: tuple[bytes, ...] = ()
    cached_tokens: int = 0


class Listener(Protocol):
    """Who asked."""

    def on_token(self, event: TokenEvent) -> None: ...

    def on_error(self, error: ColdframeError) -> None: ...
