"""Pieces of an answer as Dynamo's front end takes them: token ids, which it makes text of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.runtime.gateway.api import Piece, TokenLogprob

__all__ = ["Chunk", "Counts", "cancelled", "chunk_of"]

Chunk = dict[str, Any]


class Counts:
    """What an answer is charged with.

    Args:
        prompt_tokens: Of the prompt.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = 0
        self._cached_tokens = 0

    def add(self, piece: Piece) -> None:
        """A token has come."""
        self._answer_tokens += 1
        if piece.choice == 0:
            self._cached_tokens += piece.cached_tokens

    def usage(self) -> Mapping[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": self._prompt_tokens + self._answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def chunk_of(piece: Piece, counts: Counts) -> Chunk:
    """The chunk that a piece is.

    Args:
        piece: The piece.
        counts: Of its answer; gets this one.
    """
    counts.add(piece)
    chunk: Chunk = {"token_ids": [piece.token], "index": piece.choice}
    if piece.logprob is not None:
        chunk["log_probs"] = [piece.logprob.logprob]
        chunk["top_logprobs"] = [[_top(rank, entry) for rank, entry in enumerate(piece.top, 1)]]
    if piece.finish is not None:
        chunk["finish_reason"] = piece.finish
        chunk["completion_usage"] = counts.usage()
    return chunk


def cancelled(counts: Counts) -> Chunk:
    """The last chunk of an answer that nobody waits for any more."""
    return {
        "token_ids": [],
        "index": 0,
        "finish_reason": "cancelled",
        "completion_usage": counts.usage(),
    }


def _top(rank: int, entry: TokenLogprob) -> Mapping[str, Any]:
    return {
        "rank": rank,
        "token_id": entry.token,
        "token": entry.text.decode("utf-8", "replace"),
        "logprob": entry.logprob,
        "bytes": list(entry.text),
    }
