"""What a prefill worker says to a decode worker of the first token: `kv_transfer_params`.

The prefill worker has drawn it, and the client is to have that one, with its log-probability, and
answers are to go on as if one worker had made them: with the same seed. Beside it stands what the
transport of KV has to say; where there is nothing, or it leads nowhere, the decode worker computes
the prompt again, and the answer is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Piece, TokenLogprob

__all__ = ["FirstToken", "first_token_of"]

_KEY = "coldframe_first_token"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of an answer.

    Args:
        piece: As it came; its `finish` is that of the whole answer, where it ends with it.
        seed: It was drawn with.
        prompt_tokens: The length of the prompt that it follows.
    """

    piece: Piece
    seed: int
    prompt_tokens: int

    def to_params(self) -> dict[str, Any]:
        """Its part of `kv_transfer_params`, as JSON values."""
        piece = self.piece
        return {
            _KEY: {
                "version": _VERSION,
                "token": piece.token,
                "finish": piece.finish,
                "seed": self.seed,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": piece.cached_tokens,
                "logprob": None if piece.logprob is None else _to_wire(piece.logprob),
                "top": [_to_wire(entry) for entry in piece.top],
            }
        }


def first_token_of(request: Mapping[str, Any]) -> FirstToken | None:
    """The first token that a request comes with from a prefill worker of ours.

    Args:
        request: Dynamo's.

    Returns:
        None where it comes from none, or the token follows another prompt: what has been migrated
        is longer by the tokens that the client has.

    Raises:
        ApiError: It is of another version, or cannot be understood.
    """
    told: Any = request
    for name in ("prefill_result", "disaggregated_params", "kv_transfer_params", _KEY):
        told = told.get(name) if isinstance(told, Mapping) else None
    if told is None:
        return None
    try:
        if told["version"] != _VERSION:
            raise ValueError(f"version {told['version']!r}")
        found = FirstToken(_piece(told), _number(told["seed"]), _number(told["prompt_tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ApiError(
            400,
            f"The first token from the prefill worker cannot be understood: {error!r}. "
            "Run one version of coldframe on both sides.",
            param=f"kv_transfer_params.{_KEY}",
            code="invalid_value",
        ) from None
    return found if found.prompt_tokens == len(request["token_ids"]) else None


def _piece(told: Mapping[str, Any]) -> Piece:
    logprob, finish = told["logprob"], told["finish"]
    if finish not in (None, "stop", "length"):
        raise ValueError(f"finish {finish!r}")
    return Piece(
        0,
        _number(told["token"]),
        "",
        finish,
        _number(told["prompt_tokens"]),
        None if logprob is None else _from_wire(logprob),
        tuple(_from_wire(entry) for entry in told["top"]),
        _number(told["cached_tokens"]),
    )


def _to_wire(entry: TokenLogprob) -> list[Any]:
    return [entry.token, entry.logprob, entry.text.decode("latin-1")]


def _from_wire(entry: Any) -> TokenLogprob:
    token, logprob, text = entry
    return TokenLogprob(_number(token), float(logprob), text.encode("latin-1"))


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a whole number was expected")
    return value
