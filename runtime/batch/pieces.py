"""A token as the router gives it, as a piece of an answer."""

from __future__ import annotations

from coldframe.runtime.gateway.api import Piece, TokenLogprob
from coldframe.runtime.replica.answers import TokenEvent

__all__ = ["piece"]


def piece(choice: int, event: TokenEvent) -> Piece:
    """The piece that a token is.

    Args:
        choice: The index of its generation among those submitted together.
        event: The token.
    """
    own: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    if event.logprob is not None:
        spelled = iter(event.spellings)
        own = TokenLogprob(event.token, event.logprob, next(spelled))
        top = tuple(
            TokenLogprob(token, logprob, text)
            for (token, logprob), text in zip(event.top, spelled, strict=True)
        )
    return Piece(
        choice,
        event.token,
        event.text,
        event.finish,
        event.prompt_tokens,
        own,
        top,
        event.cached_tokens,
    )
