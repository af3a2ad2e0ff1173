"""What a node says to its peers before it takes a byte: how are you, and may I read from you?

Short questions over connections of their own, with little patience: whoever does not answer at once
is no peer to start from. The weights come by the range reader (`web.peer`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import (
    ColdframeError,
    SourceBusy,
    SourceChanged,
    SourceCredentials,
    SourceError,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.peers.http import (
    AVOID_HEADER,
    CHECKPOINT_HEADER,
    DONE_HEADER,
    NODE,
    READERS,
    SERVES_HEADER,
    TOKEN_VARIABLE,
)
from coldframe.loader.peers.node import CHOOSING, FAILED, LOADED, LOADING, Root
from coldframe.loader.sources.location import Peer, parse_location
from coldframe.loader.web.address import Target
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.dial import Dialler, host_header
from coldframe.loader.web.head import Garbled
from coldframe.loader.web.http import bearer
from coldframe.loader.web.limits import Limits

__all__ = ["Elsewhere", "NodeFacts", "PeerTalk", "Seat"]

_BRIEF = Limits(connect_s=1.0, stall_s=2.0)
_MOST = 256 << 10
_ID = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_VIA = 4096


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a peer says of itself; see `peers.node`.

    Attributes:
        node: Its id.
        model: A hash of where its model is, as its user wrote it.
        fingerprint: The checkpoint's, where it has opened it.
        root: Where the weights came from at first, as far as it knows.
        state: One of `peers.node`'s.
        seated: Whether it has found a peer to load from.
        whole: Whether it will have all of the weights.
        done: Bytes of them that are in.
        readers: How many read from it.
    """

    node: str
    model: str
    fingerprint: str | None
    root: Root | None
    state: str
    seated: bool
    whole: bool
    done: int
    readers: int

    @staticmethod
    def parse(found: Any, where: str) -> NodeFacts:
        """Reads it.

        Raises:
            SourceProtocol: It is nothing that a peer of this version says.
        """
        try:
            fingerprint, root = found["fingerprint"], found["root"]
            facts = NodeFacts(
                found["node"],
                found["model"],
                fingerprint,
                None if root is None else Root(*root),
                found["state"],
                found["seated"],
                found["whole"],
                found["done"],
                found["readers"],
            )
            hashes = [facts.model, *([] if root is None else root)]
            hashes += [] if fingerprint is None else [fingerprint]
            sound = (
                found["version"] == 1
                and _ID.fullmatch(facts.node) is not None
                and all(_HASH.fullmatch(text) for text in hashes)
                and facts.state in (CHOOSING, LOADING, LOADED, FAILED)
                and type(facts.done) is type(facts.readers) is int
            )
        except (ValueError, TypeError, LookupError):
            sound = False
        if not sound:
            raise _no_peer(where)
        return facts


@dataclass(frozen=True, slots=True)
class Seat:
    """A peer that may be read from.

    Attributes:
        peer: Where it is.
        facts: What it says of itself.
        via: The nodes that its bytes come through, itself the last.
    """

    peer: Peer
    facts: NodeFacts
    via: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A peer with readers enough names one of them.

    Attributes:
        peer: Where that one is.
        node: Its id.
    """

    peer: Peer
    node: str


class PeerTalk:
    """Asks peers. Safe for several threads.

    Args:
        token: What they want to hear; None takes `COLDFRAME_PEER_TOKEN`, if it is set.
        limits: Patience for one question.

    Raises:
        SourceCredentials: The token is none that could be sent.
    """

    def __init__(self, token: str | None = None, limits: Limits = _BRIEF) -> None:
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._fixed = {"User-Agent": "coldframe", "Connection": "close", "Content-Length": "0"}
        if token:
            self._fixed["Authorization"] = bearer(token, TOKEN_VARIABLE)
        self._dialler = Dialler(limits)

    def node(self, peer: Peer) -> NodeFacts:
        """What a peer says of itself.

        Raises:
            SourceError: It does not answer, or is no peer of this version.
        """
        _, found = self._ask("GET", peer, NODE, {})
        return NodeFacts.parse(found, f"{peer.uri}{NODE}")

    def seat(
        self,
        peer: Peer,
        node: str,
        *,
        fingerprint: str | None = None,
        serves: str | None = None,
        avoid: Collection[str] = (),
        done: int | None = None,
    ) -> Seat | Elsewhere:
        """Asks to read from a peer, or to go on reading.

        Args:
            peer: Where it is.
            node: Our id.
            fingerprint: The checkpoint that we want, where we know it.
            serves: Where others can read from us; see `SERVES_HEADER`.
            avoid: Nodes that we could not read from.
            done: Bytes that we have, where we are in mid-load.

        Raises:
            SourceBusy: It has not found its own source yet.
            SourceChanged: It serves another model.
            SourceError: It does not answer, or there is nothing to be had from it.
        """
        headers = {}
        if fingerprint is not None:
            headers[CHECKPOINT_HEADER] = fingerprint
        if serves is not None:
            headers[SERVES_HEADER] = serves
        if avoid:
            headers[AVOID_HEADER] = ",".join(avoid)
        if done is not None:
            headers[DONE_HEADER] = str(done)
        path = READERS + node
        status, found = self._ask("PUT", peer, path, headers)
        where = f"{peer.uri}{READERS}"
        if status == 307:
            return _elsewhere(found, where)
        facts = NodeFacts.parse(found, where)
        via = found.get("via")
        if not isinstance(via, list) or not 0 < len(via) <= _MOST_VIA or via[-1] != facts.node:
            raise _no_peer(where)
        return Seat(peer, facts, tuple(map(str, via)))

    def leave(self, peer: Peer, node: str) -> None:
        """Gives a seat back; a peer that does not hear of it finds out by itself."""
        with suppress(SourceError):
            self._ask("DELETE", peer, READERS + node, {})

    def _ask(
        self, method: str, peer: Peer, path: str, headers: dict[str, str]
    ) -> tuple[int, dict[str, Any]]:
        target = Target("http", peer.host, peer.port, path, {})
        where = peer.uri
        try:
            connection = self._dialler.dial(target)
            try:
                host = {"Host": host_header(target)}
                connection.send(method, path, {**host, **self._fixed, **headers})
                head = connection.head()
                body = connection.read(_MOST)
            finally:
                connection.close()
        except Broken as broken:
            raise SourceUnreachable(
                "the peer does not answer", where=where, got=broken.why
            ) from None
        except Garbled:
            raise _no_peer(where) from None
        try:
            found: Any = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            found = {}
        if head.status not in (200, 307):
            raise _refused(head.status, found, where)
        return head.status, found


def _elsewhere(found: dict[str, Any], where: str) -> Elsewhere:
    node, ask = found.get("node"), found.get("ask")
    try:
        place = parse_location(f"peer://{ask}")
    except ColdframeError:
        place = None
    if not isinstance(place, Peer) or not isinstance(node, str) or _ID.fullmatch(node) is None:
        raise _no_peer(where)
    return Elsewhere(place, node)


def _refused(status: int, found: dict[str, Any], where: str) -> SourceError:
    said = found.get("what")
    what = said[:200] if isinstance(said, str) and said.isprintable() else "the peer refuses"
    state = found.get("state")
    if status == 401:
        hint = f"Set {TOKEN_VARIABLE} to what it is where the peer runs."
        return SourceCredentials("the peer wants another token", where=where, hint=hint)
    if status == 412:
        got = [found.get(name) for name in ("expected", "got")]
        return SourceChanged(what, where=where, expected=got[0], got=got[1])
    if status == 503 and state != FAILED:
        return SourceBusy(what, where=where)
    if status == 404:
        hint = "Run one version of coldframe everywhere."
        return SourceNotFound("this is no peer that tells of itself", where=where, hint=hint)
    return SourceError(what, where=where, got=f"status {status}")


def _no_peer(where: str) -> SourceProtocol:
    return SourceProtocol(
        "this is no peer, or one of another version",
        where=where,
        expected="what a node of version 1 says of itself",
        got="something else",
        hint="Check host and port, and run one version of coldframe everywhere.",
    )
