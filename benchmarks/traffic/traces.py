"""Traces: who asked when, for how much.

A trace is a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, such as the Azure
LLM inference traces (https://github.com/Azure/AzurePublicDataset, CC-BY-4.0; Patel et al.,
"Splitwise", ISCA 2024).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from coldframe.loader.errors import RequestError

__all__ = ["Arrival", "read_trace"]


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
    """The arrivals of a trace, in their order.

    Raises:
        RequestError: It is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (
                    # Seven digits behind the point are one too many for datetime.
                    datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                    int(row["ContextTokens"]),
                    int(row["GeneratedTokens"]),
                )
                for row in csv.DictReader(file)
            ]
        rows.sort()
        first = rows[0][0]
        return [Arrival(at - first, context, made) for at, context, made in rows]
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise RequestError(
            "this is no trace",
            where=path,
            expected="a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens",
            got=f"{type(error).__name__}: {error}",
        ) from error
