"""The least that reads through an address: one request at a time, and what it makes of refusals."""

from __future__ import annotations

import http.client
from dataclasses import dataclass

from coldframe.loader.web.address import Address, Again, Refusal, Target

__all__ = ["Answer", "ask", "refusal", "send"]


@dataclass(frozen=True)
class Answer:
    """What came in the end, and all that was said on the way."""

    status: int
    headers: dict[str, str]
    body: bytes
    target: Target
    agains: list[Again]


def send(target: Target) -> tuple[int, dict[str, str], bytes]:
    """One request over plain HTTP."""
    assert target.scheme == "http"
    connection = http.client.HTTPConnection(target.host, target.port, timeout=10)
    try:
        connection.request("GET", target.path, headers=dict(target.headers))
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(address: Address, name: str, headers: dict[str, str] | None = None) -> Answer:
    """A file, over as many requests as the address wants; a pause is not made but noted."""
    agains: list[Again] = []
    while True:
        target = address.target(name, headers or {})
        status, found, body = send(target)
        if status in (200, 206):
            if hasattr(address, "accepted"):
                address.accepted(target, found)
            return Answer(status, found, body, target, agains)
        assert len(agains) < 20, agains
        agains.append(address.refused(refusal(address, target, status, found, body, name)))


def refusal(
    address: Address,
    target: Target,
    status: int,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    name: str = "config.json",
) -> Refusal:
    """What the reader makes of an answer with this status."""
    what = f"{address.uri_of(name)}, bytes 0-99"
    return Refusal(status, "", headers or {}, body, target, what)
