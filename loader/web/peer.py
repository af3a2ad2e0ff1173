"""A warm peer: another memory service that has the checkpoint in its arena, or is filling it.

It speaks HTTP with ranges (`peers.http` says what), so all about retries and resuming is the range
reader's. What is served is fixed by the first answer: a peer that was started again with another
model refuses what is asked from then on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from coldframe.loader.checkpoints.header import MAX_HEADER_BYTES, PREFIX_BYTES
from coldframe.loader.errors import (
    SourceChanged,
    SourceCorrupt,
    SourceCredentials,
    SourceError,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.peers.http import (
    CHECKPOINT_HEADER,
    FILES,
    PLAN,
    PLAN_HEADER,
    SHARDS,
    TOKEN_VARIABLE,
)
from coldframe.loader.sources.location import Peer
from coldframe.loader.throttle import Throttle
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.http import bearer, later, other_error, refusal_error, status_of
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.origin import WebOrigin, WebSource
from coldframe.loader.web.ranges import Opening, RangeReader

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Shard

__all__ = ["PLAN_FILE", "ROW_CONNECTIONS", "PeerAddress", "PeerOrigin", "peer_origin"]

PLAN_FILE = "plan"
"""The name under which an address finds what the peer says about itself."""

_MAX_PLAN_BYTES = 16 << 20
_SMALL_FILE = 512 << 10
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# What is slow waits for a stage, and would wait on a second connection too.
_LIMITS = Limits(hedges=0)
_ROW_READERS = 4
ROW_CONNECTIONS = _ROW_READERS + 2
"""For a peer in a row: as many as ever read at once, with those who hash meanwhile (`verify`).

With fewer, a reader of a later piece could have the connection that an earlier one waits for, and
what is asked for late is late for the whole row.
"""
_PARTS = 256
_LEAST_CHUNK, _SEALED_CHUNK, _MOST_CHUNK = 256 << 10, 1 << 20, 8 << 20


def peer_origin(
    location: Peer,
    throttle: Throttle | None = None,
    *,
    token: str | None = None,
    plan_hash: str | None = None,
    fingerprint: str | None = None,
    in_a_row: bool = False,
    limits: Limits = _LIMITS,
) -> PeerOrigin:
    """The checkpoint that a peer serves. Nothing is asked of it yet.

    Args:
        location: Where it is.
        throttle: A limit on the rate.
        token: What it wants to hear; None takes `COLDFRAME_PEER_TOKEN`, if it is set.
        plan_hash: What it must have planned, or None.
        fingerprint: The checkpoint that it must serve, or None for whichever it does.
        in_a_row: Whether others may read from here what comes from there, as it comes: then it is
            asked for in smaller pieces, since a node is behind by what it has asked for.
        limits: Patience and concurrency.

    Raises:
        SourceCredentials: The token is none that could be sent.
    """
    address = PeerAddress(location, token, plan_hash)
    reader = _Reader(address, throttle=throttle, limits=limits)
    return PeerOrigin(address, reader, fingerprint, in_a_row=in_a_row)


class PeerOrigin(WebOrigin):
    """A peer: fixed by its first answer to the checkpoint that it serves then.

    Args:
        address: The peer.
        reader: Reads from it.
        fingerprint: The checkpoint that it must serve; None for whichever it does.
        in_a_row: See `peer_origin`.
    """

    def __init__(
        self,
        address: PeerAddress,
        reader: _Reader,
        fingerprint: str | None = None,
        *,
        in_a_row: bool = False,
    ) -> None:
        super().__init__(reader)
        self._wanted = fingerprint
        self._in_a_row = in_a_row
        self._given_up: str | None = None
        self._peer = address
        self._peer_reader = reader

    def check(self) -> None:
        """Asks what it serves, and waits for that where it has not planned yet.

        Raises:
            SourceError: It cannot be asked, could not load itself, or is no peer.
        """
        found = _Served.parse(
            self._peer_reader.read_small(PLAN_FILE, _MAX_PLAN_BYTES), self._peer.uri_of(PLAN_FILE)
        )
        if self._wanted is not None and found.fingerprint != self._wanted:
            raise SourceChanged(
                "the peer serves another model, or another version of it",
                where=self.uri,
                expected=self._wanted,
                got=found.fingerprint,
            )
        self._peer.expect(found.fingerprint)
        self._peer_reader.header_ends = found.header_ends

    @property
    def left_why(self) -> str | None:
        """Why nothing more can come from it, where that says nothing of what has come."""
        if self._given_up is None and self._peer.replaced:
            return "the peer has been replaced by one with another model"
        return self._given_up

    def give_up(self, why: str) -> None:
        """Ends all reads, so that another source can go on; from any thread.

        Args:
            why: What their error says.
        """
        self._given_up = why
        self._peer_reader.cancel()

    def _make_source(self, shards: Sequence[Shard], sealed: bool) -> WebSource:
        if not self._in_a_row:
            return WebSource(self._peer_reader, shards, None, self._leave)
        source = _PeerSource(self, self._peer_reader, shards, None, self._leave)
        # Powers of two; where there is a seal, whole pieces of it.
        part = sum(shard.size for shard in shards) // _PARTS
        least = _SEALED_CHUNK if sealed else _LEAST_CHUNK
        source.chunk = min(_MOST_CHUNK, max(least, 1 << part.bit_length()))
        return source


class _PeerSource(WebSource):
    """The weights of a peer that another source can go on from.

    What it gave is right even if it is given up or replaced: an arena does not change, and each
    answer is of the version that was asked for.
    """

    def __init__(self, origin: PeerOrigin, *given: Any) -> None:
        super().__init__(*given)
        self._origin = origin

    @property
    def readers(self) -> int:
        return _ROW_READERS

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        try:
            super().read_into(shard, offset, parts)
        except SourceError:
            why = self._origin.left_why
            if why is None:
                raise
            raise SourceUnreachable(
                why,
                where=self._origin.uri,
                hint="Look at that node, and at the network between here and there.",
            ) from None


class _Reader(RangeReader):
    """Opens a shard with its header alone: the bytes behind it may have to be waited for."""

    header_ends: Mapping[str, int] = {}

    def open(self, name: str, nbytes: int = _SMALL_FILE) -> Opening:
        if name.endswith(".safetensors"):
            nbytes = self.header_ends.get(name, PREFIX_BYTES)
        return super().open(name, nbytes)


@dataclass(frozen=True, slots=True)
class _Served:
    """What a peer says about itself.

    Attributes:
        fingerprint: The checkpoint's.
        header_ends: Where the header of each shard ends.
    """

    fingerprint: str
    header_ends: dict[str, int]

    @staticmethod
    def parse(content: bytes, where: str) -> _Served:
        """Reads it.

        Raises:
            SourceProtocol: It is nothing that a peer of this version says.
        """
        try:
            found: Any = json.loads(content)
            version, fingerprint = found["version"], found["fingerprint"]
            ends = {shard["name"]: int(shard["data_offset"]) for shard in found["shards"]}
            sound = version == 1 and _FINGERPRINT.fullmatch(fingerprint) is not None
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        most = PREFIX_BYTES + MAX_HEADER_BYTES
        if not sound or not all(PREFIX_BYTES <= end <= most for end in ends.values()):
            raise SourceProtocol(
                "this is no peer, or one of another version",
                where=where,
                expected="what a memory service of version 1 says about itself",
                got=f"{len(content)} bytes of something else",
                hint="Check host and port, and run one version of coldframe everywhere.",
            )
        return _Served(fingerprint, ends)


class PeerAddress:
    """The files of a peer. Safe for several threads.

    Args:
        location: Where it is.
        token: What it wants to hear; None takes `COLDFRAME_PEER_TOKEN`, if it is set.
        plan_hash: What it must have planned, or None.

    Attributes:
        replaced: Whether another model has answered there than the one that was asked for.

    Raises:
        SourceCredentials: The token is none that could be sent.
    """

    def __init__(
        self, location: Peer, token: str | None = None, plan_hash: str | None = None
    ) -> None:
        self._location = location
        self.replaced = False
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._fixed = {"User-Agent": "coldframe"}
        if token:
            self._fixed["Authorization"] = bearer(token, TOKEN_VARIABLE)
        if plan_hash is not None:
            self._fixed[PLAN_HEADER] = plan_hash

    def expect(self, fingerprint: str) -> None:
        """From now on the peer must serve the checkpoint with this fingerprint."""
        self._fixed = {**self._fixed, CHECKPOINT_HEADER: fingerprint}

    @property
    def uri(self) -> str:
        return self._location.uri

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def target(self, name: str, headers: Mapping[str, str]) -> Target:
        if name == PLAN_FILE:
            path = PLAN
        else:
            path = (SHARDS if name.endswith(".safetensors") else FILES) + quote(name, safe="")
        merged = {**self._fixed, **headers}
        return Target("http", self._location.host, self._location.port, path, merged)

    def refused(self, refusal: Refusal) -> Again:
        said = _said(refusal)
        if refusal.status == 401:
            raise refusal_error(
                SourceCredentials,
                "the peer does not take our token"
                if "Authorization" in self._fixed
                else "the peer wants a token",
                refusal,
                f"Set {TOKEN_VARIABLE} to what it is where the peer runs.",
            )
        if refusal.status == 404:
            hint = "Check what the peer serves."
            raise refusal_error(SourceNotFound, "the peer has no such file", refusal, hint)
        if refusal.status == 409:
            raise refusal_error(
                SourceNotFound,
                "the peer has not all of these bytes in its arena",
                refusal,
                "Load from where it loads, or from a peer that has the whole model.",
            )
        if refusal.status == 412:
            self.replaced = True
            raise SourceChanged(
                "the peer serves another model, or another version of it",
                where=refusal.what,
                expected=said.get("expected"),
                got=said.get("got"),
                hint="Start again with a peer that has what is wanted.",
            )
        if said.get("state") == "failed":
            raise _its_failure(said, refusal)
        again = later(refusal)
        if again is None:
            raise other_error(refusal)
        # Of a peer that loads there is no more to be had by asking for less.
        state = said.get("state")
        why = f"{status_of(refusal)}: {said['what']}" if state and "what" in said else again.why
        return Again(why, again.after_s, slow_down=again.slow_down and state != "loading")


def _its_failure(said: Mapping[str, str], refusal: Refusal) -> SourceError:
    """Why the peer itself could not load.

    What it had of a file that changed under it, or was corrupt, may have come to us before it
    knew: that is an error of the same kind here.
    """
    kinds = {"SourceChanged": SourceChanged, "SourceCorrupt": SourceCorrupt}
    kind = kinds.get(said.get("error", ""), SourceUnreachable)
    what = said.get("what", "it does not say why")
    return kind(
        f"the peer could not load the model itself: {what}",
        where=refusal.what,
        expected=said.get("expected"),
        got=said.get("got"),
        hint="Load from another place, or mend what the peer loads from and start it again.",
    )


def _said(refusal: Refusal) -> dict[str, str]:
    """What a peer says about a refusal, as far as it is text; whoever answered may be no peer."""
    try:
        found: Any = json.loads(refusal.body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    texts = {name: value for name, value in found.items() if isinstance(value, str)}
    return {name: value[:200] for name, value in texts.items() if value.isprintable()}
