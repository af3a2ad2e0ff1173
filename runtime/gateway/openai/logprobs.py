"""Log-probabilities in OpenAI's two formats: columns for a completion, a list for a chat."""

from __future__ import annotations

import codecs
from typing import Any

from coldframe.runtime.gateway.api import Piece, TokenLogprob

__all__ = ["Columns", "chat_entry"]

_LEAST = -9999.0
"""OpenAI's figure for what is as good as impossible; JSON has no infinity."""


def chat_entry(piece: Piece) -> dict[str, Any] | None:
    """A chat's entry for a token: its text, bytes and log-probability, and those of the likeliest.

    A token may be half a character; then its text has a replacement character, and only `bytes`
    tells what it is.
    """
    if piece.logprob is None:
        return None
    return {**_token(piece.logprob), "top_logprobs": [_token(top) for top in piece.top]}


class Columns:
    """A completion's log-probabilities: one list for each of the tokens' properties.

    `text_offset` is where a token's text begins in the answer's, in characters. A token that goes
    on with a character begins where that character does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def entry(self, piece: Piece) -> dict[str, Any] | None:
        """The columns of one token, each a list of one; of tokens in order."""
        token = piece.logprob
        if token is None:
            return None
        offset = self._offset
        self._offset += len(self._decoder.decode(token.text))
        text = _text(token)
        top: dict[str, float] = {}
        for other in piece.top:
            # Several tokens may have the same text; the likeliest comes first.
            top.setdefault(_text(other), _finite(other.logprob))
        top[text] = _finite(token.logprob)
        return {
            "tokens": [text],
            "token_logprobs": [top[text]],
            "top_logprobs": [top],
            "text_offset": [offset],
        }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": _text(token),
        "logprob": _finite(token.logprob),
        "bytes": list(token.text),
    }


def _text(token: TokenLogprob) -> str:
    return token.text.decode(errors="replace")


def _finite(logprob: float) -> float:
    # Also where it is no number at all.
    return logprob if logprob > _LEAST else _LEAST
