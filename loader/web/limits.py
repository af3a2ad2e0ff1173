"""How patient the reader of ranges is, and how much it does at once."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Patience and concurrency.

    Attributes:
        patience_s: A request without any progress for so long is given up. Progress is a byte of
            the body: a slow link is no reason to end a load.
        connect_s: For a connection to stand, TLS included, for each address of the host.
        stall_s: An answer of which no byte comes for so long has broken off.
        backoff_s: The pause before the second attempt, at most; it doubles with each further one.
            The pause itself is random, from nothing up to that: clients that failed together must
            not come back together.
        longest_backoff_s: Where the doubling ends. A server's `Retry-After` may ask for more.
        redirects: Times that a request may be sent elsewhere, or signed anew, without progress.
        connections: Ranges that are read at once, at most. A store gives some 90 MB/s to each, so
            a fast link needs many; how many of them are used is measured (`concurrency`).
        first_connections: And at the start, before it is known what the path can carry.
        hedge_after_s: A range that takes less is never asked for a second time.
        hedge_factor: Nor one that takes less than so many times its peers' median.
        hedge_share: What is asked for twice is at most this share of what has been read (and at
            first 32 MiB).
        hedges: Ranges that are asked for twice at the same time, each with a buffer of its own of
            32 MiB at most. With 0, there are none.
    """

    patience_s: float = 60.0
    connect_s: float = 10.0
    stall_s: float = 10.0
    backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    redirects: int = 10
    connections: int = 96
    first_connections: int = 8
    hedge_after_s: float = 0.5
    hedge_factor: float = 3.0
    hedge_share: float = 0.05
    hedges: int = 2
