"""How much the gateway takes from a client, how fast that must come, and from how many at once."""

from __future__ import annotations

import resource
from dataclasses import dataclass

__all__ = ["HttpLimits", "connection_limit"]

_MOST_CONNECTIONS = 8192
_RESERVED_FDS = 64


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Patience and room, for each connection.

    Attributes:
        head_bytes: Of a request's line and headers together.
        headers: How many of them.
        target_bytes: Of the path and query.
        head_s: For a whole head, from the connection or from its first byte on one that is reused.
        keep_alive_s: How long a connection may lie idle between two requests. Load balancers keep
            theirs for 60 s and send the next request without asking; a server that closes first
            loses it, and its client sees a 502. So longer than they: let them close. (Google's
            external load balancer keeps its for 600 s.)
        body_s: What a client has for a body beyond what `rate` gives it; see `bodies.read_json`.
        stall_s: And between two parts of it.
        write_s: A client that takes less than `rate` of an answer for so long is dropped. Also
            after which the kernel gives up one whose machine does not acknowledge any more.
        rate: Bytes per second, at least, either way.
        linger_s: How long a refused client is listened to, so that it can read why.
        linger_bytes: And how much is heard of it.
        connections: At once, at most.
    """

    head_bytes: int = 32 << 10
    headers: int = 100
    target_bytes: int = 8 << 10
    head_s: float = 10.0
    keep_alive_s: float = 75.0
    body_s: float = 30.0
    stall_s: float = 10.0
    write_s: float = 30.0
    rate: int = 16 << 10
    linger_s: float = 2.0
    linger_bytes: int = 64 << 20
    connections: int = 1024


def connection_limit(most: int = _MOST_CONNECTIONS, reserved: int = _RESERVED_FDS) -> int:
    """Raises this process's limit of open files as far as it goes, and shares it out.

    A connection above the limit is told so. Without one, `accept` fails for want of a file
    descriptor, and clients wait for an answer that never comes.

    Args:
        most: Connections that are wanted, at most.
        reserved: Descriptors for everything else, also for those that are being refused.

    Returns:
        How many connections there may be at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + reserved
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A hard limit of 2**30 is common in containers; there is no need for as many.
        raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return most
    # Of very few, a quarter: as many again are being refused, and the rest is for everything else.
    return max(1, min(most, max(soft - reserved, soft // 4)))
