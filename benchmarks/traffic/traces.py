"""Traces: who asked when, for how much, and what is made of that for a replay.

A trace is a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, such as the Azure
LLM inference traces (https://github.com/Azure/AzurePublicDataset, CC-BY-4.0; Patel et al.,
"Splitwise", ISCA 2024). Such a trace is of one service. `split` makes one of several models of it,
`cut` takes a piece, `compressed` presses it into less time, `scaled` its lengths into a model's
context.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from coldframe.loader.errors import RequestError

__all__ = ["Arrival", "compressed", "cut", "read_trace", "scaled", "split", "token_scale"]

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Args:
        at_s: Since the first one.
        context: Tokens of its prompt.
        generated: Tokens of its answer.
    """

    at_s: float
    context: int
    generated: int


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals of a trace, in their order, whatever that of the rows is.

    Raises:
        RequestError: It is no such file, or a row says what cannot be.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (
                    _moment(row["TIMESTAMP"]),
                    _tokens(row["ContextTokens"]),
                    _tokens(row["GeneratedTokens"]),
                )
                for row in csv.DictReader(file)
            ]
        rows.sort()
        first = rows[0][0]
        return [Arrival(at - first, context, made) for at, context, made in rows]
    except (OSError, KeyError, ValueError, TypeError, IndexError, csv.Error) as error:
        raise RequestError(
            "this is no trace",
            where=path,
            expected="a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens",
            got=f"{type(error).__name__}: {error}",
        ) from error


def split(arrivals: Sequence[Arrival], models: int, skew: float = 0.0) -> list[int]:
    """Which of so many models each arrival asks: its place in the trace and its lengths, hashed.

    The same arrivals are split alike everywhere and always (BLAKE2b, no seed of the process).

    Args:
        arrivals: A trace's.
        models: How many there are.
        skew: How much more the first ones are asked: the share of model k is proportional to
            1 / (k + 1) ** skew (Zipf's law); 0 for all alike.

    Returns:
        For each arrival the number of its model, from 0.

    Raises:
        RequestError: There are no models, or the skew is none.
    """
    if models < 1:
        raise RequestError("there must be one model at least", where="--models", got=models)
    if not 0 <= skew < math.inf:
        raise RequestError("this is no skew", where="--skew", expected="0 or more", got=skew)
    shares = [(k + 1) ** -skew for k in range(models)]
    total = sum(shares)
    bounds = [bound / total for bound in accumulate(shares)]
    found = []
    for number, arrival in enumerate(arrivals):
        text = f"{number},{arrival.context},{arrival.generated}".encode()
        drawn = int.from_bytes(blake2b(text, digest_size=_HASH_BYTES).digest()) / 256**_HASH_BYTES
        # The last bound is 1 but for rounding.
        found.append(next((k for k, bound in enumerate(bounds) if drawn < bound), models - 1))
    return found


def cut(
    arrivals: Sequence[Arrival], from_s: float = 0.0, for_s: float | None = None
) -> list[Arrival]:
    """A piece of a trace, with its own beginning.

    Args:
        arrivals: In their order.
        from_s: Where it begins, in seconds of the trace; that is 0 of the piece.
        for_s: How long it is; None for all that is left.

    Raises:
        RequestError: Nobody asks in that piece, or it is none.
    """
    until_s = math.inf if for_s is None else from_s + for_s
    if not 0 <= from_s < math.inf or not from_s < until_s:
        raise RequestError(
            "this is no piece of a trace",
            where="--from, --for",
            expected="0 or more seconds, and more than 0",
            got=f"{from_s}, {for_s}",
        )
    found = [replace(a, at_s=a.at_s - from_s) for a in arrivals if from_s <= a.at_s < until_s]
    if not found:
        last = arrivals[-1].at_s if arrivals else 0.0
        raise RequestError(
            "nobody asks in this piece of the trace",
            where="--from, --for",
            expected=f"a piece of its {last:.3f} s",
            got=f"from {from_s} s, for {for_s} s",
        )
    return found


def compressed(arrivals: Sequence[Arrival], speed: float) -> list[Arrival]:
    """The same arrivals, so many times as fast.

    Raises:
        RequestError: This is no speed.
    """
    if not 0 < speed < math.inf:
        raise RequestError("this is no speed", where="--speed", expected="above 0", got=speed)
    return [replace(arrival, at_s=arrival.at_s / speed) for arrival in arrivals]


def token_scale(arrivals: Sequence[Arrival], context: int) -> float:
    """What lengths are multiplied by so that the longest of them fits a context, 1 at most."""
    longest = max(arrival.context + arrival.generated for arrival in arrivals)
    # Two tokens less: both parts are rounded, and each is one at least.
    return min(1.0, (context - 2) / max(1, longest))


def scaled(arrivals: Sequence[Arrival], scale: float) -> list[Arrival]:
    """The same arrivals, shorter: each length times `scale`, rounded, and 1 at least."""
    return [
        replace(
            arrival,
            context=max(1, round(arrival.context * scale)),
            generated=max(1, round(arrival.generated * scale)),
        )
        for arrival in arrivals
    ]


def _moment(text: str) -> float:
    # Seven digits behind the point are one too many for datetime.
    found = datetime.fromisoformat(text[:26])
    # Where no zone is named it is none that has a summer time in the middle of a trace.
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def _tokens(text: str) -> int:
    found = int(text)
    if found < 0:
        raise ValueError(f"{found} tokens")
    return found
