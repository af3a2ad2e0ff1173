"""Which of several peers to take weights from.

Whoever is loaded before who is loading, then whoever has fewer readers, then whoever has more of
the bytes. Among equals each node draws its own order, or all who start together would ask the same.

Where nobody has anything yet, those who start together must not all go to the store. The least of
their ids goes there, and the others wait until it is a peer to read from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coldframe.loader.peers.node import CHOOSING, LOADED, LOADING, Root, hashed
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.peer_talk import NodeFacts

__all__ = ["Candidate", "Wanted", "is_awaited", "others", "ranked"]


class Candidate(NamedTuple):
    """A peer, and what it says of itself."""

    peer: Peer
    facts: NodeFacts


class Wanted(NamedTuple):
    """What a node is to load.

    Attributes:
        model: A hash of where it is, as its user wrote it.
        fingerprint: The checkpoint's; None where nobody could look there.
        root: Its place and versions, where that is a place that tells versions apart.
    """

    model: str
    fingerprint: str | None = None
    root: Root | None = None

    def met_by(self, facts: NodeFacts) -> bool:
        """Whether a peer has that.

        By the fingerprint, which a peer that is loading knows; where ours is not to be had, since
        the store cannot be reached, a peer is believed that was given the same place.
        """
        if self.root is not None and facts.root is not None and self.root.contradicts(facts.root):
            return False
        if self.fingerprint is None:
            return facts.model == self.model
        return facts.fingerprint == self.fingerprint


def others(found: Iterable[Candidate], me: str) -> list[Candidate]:
    """Each node once, whatever it is called, and not this one."""
    nodes: dict[str, Candidate] = {}
    for candidate in found:
        if candidate.facts.node != me:
            nodes.setdefault(candidate.facts.node, candidate)
    return list(nodes.values())


def ranked(
    found: Iterable[Candidate], wanted: Wanted, me: str, done: int | None = None
) -> list[Candidate]:
    """Those to read from, the best one first.

    Args:
        found: As `others` has them.
        wanted: What is to be loaded.
        me: The id of this node.
        done: Bytes that it has, in mid-load: then only those who have more are of use.
    """

    def useful(facts: NodeFacts) -> bool:
        if not facts.whole or facts.state not in (LOADED, LOADING):
            return False
        return done is None or facts.state == LOADED or facts.done > done

    def order(candidate: Candidate) -> tuple[bool, int, int, str]:
        facts = candidate.facts
        ahead = 0 if facts.state == LOADED else -facts.done
        return facts.state != LOADED, facts.readers, ahead, hashed(me, facts.node)

    able = [c for c in found if useful(c.facts) and wanted.met_by(c.facts)]
    return sorted(able, key=order)


def is_awaited(found: Iterable[Candidate], wanted: Wanted, me: str) -> bool:
    """Whether somebody who starts as we do will be a peer to read from soon."""
    return any(
        facts.state == CHOOSING
        and facts.model == wanted.model
        and facts.whole
        and (facts.seated or facts.node < me)
        for _, facts in found
    )
