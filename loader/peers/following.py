"""A load that takes its weights from a node that has them, or is about to.

Who that is, is found anew each time one is needed: at the start, and when the one that was read
from has died, failed or all but stopped. The place that the user named stands behind all of them.
It is opened beside the asking, headers alone, since its fingerprint says which peers have the same.

    all peers asked at once -> the best that has it: a seat there, or at one of its readers
                            -> somebody who starts as we do: asked again soon
                            -> nobody: the place itself

What has come in stays in: the chain of sources (`chain`) asks the next place for the rest alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from coldframe.loader.errors import (
    ColdframeError,
    SourceBusy,
    SourceChanged,
    SourceError,
)
from coldframe.loader.loads.chain import Opened, Places
from coldframe.loader.peers.choice import Candidate, Wanted, is_awaited, others, ranked
from coldframe.loader.peers.directory import PeerDirectory
from coldframe.loader.peers.fallback import Fallback, root_of
from coldframe.loader.peers.node import LOADED, LOADING, Node
from coldframe.loader.peers.pace import Pace
from coldframe.loader.peers.survey import MOST_ASKED, Survey
from coldframe.loader.sources.base import Origin
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.peer import PeerOrigin
from coldframe.loader.web.peer_talk import Elsewhere, NodeFacts, PeerTalk, Seat

__all__ = ["Following", "FollowingLimits"]

_MOST_STEPS = 256
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5

OpenPeer = Callable[[Peer, str | None], PeerOrigin]
"""Makes the origin of a peer that must serve a checkpoint with this fingerprint."""


@dataclass(frozen=True, slots=True)
class FollowingLimits:
    """How patient a node is before it has a source.

    Attributes:
        ask_s: Until all peers must have said how they are.
        more_s: And once one of them has said that it can be read from: a dead address must not keep
            us from a warm one.
        choose_s: Until one of those who start as we do must have found its own source.
        seat_s: Likewise for one that a peer has sent us on to.
        probe_s: Until the place behind the peers must be open where some peer could be used.
        renew_s: Between two looks at the peer that we read from.
    """

    ask_s: float = 2.0
    more_s: float = 0.2
    choose_s: float = 20.0
    seat_s: float = 5.0
    probe_s: float = 5.0
    renew_s: float = 2.0


class Following:
    """The peers of one load.

    Args:
        directory: Where they may be.
        node: This one.
        talk: Asks them.
        open_peer: Opens one.
        fallback: What stands behind them.
        serves: Where others can read from us (see `SERVES_HEADER`), or None.
        limits: Patience.
        pace: Judges a peer that is read from.
    """

    def __init__(
        self,
        directory: PeerDirectory,
        node: Node,
        talk: PeerTalk,
        open_peer: OpenPeer,
        fallback: Places,
        *,
        serves: str | None = None,
        limits: FollowingLimits = FollowingLimits(),
        pace: Callable[[], Pace] = Pace,
    ) -> None:
        self._directory = directory
        self._node = node
        self._talk = talk
        self._open_peer = open_peer
        self._fallback = fallback
        self._serves = serves
        self._limits = limits
        self._make_pace = pace
        self._behind = Fallback(fallback)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._seat: Seat | None = None
        self._origin: PeerOrigin | None = None
        self._watch: threading.Thread | None = None
        self._failures: list[ColdframeError] = []
        self._left: set[str] = set()

    @property
    def why(self) -> str:
        """Where the bytes come from, and what was in the way, for people."""
        with self._lock:
            seat, failures = self._seat, list(self._failures)
        text = f"from {seat.peer.uri}" if seat is not None else "from no peer"
        return "; ".join([text, *(f"{error.where}: {error.what}" for error in failures)])

    def places(self) -> Places:
        """The places to load from, each found when the one before it has failed."""
        yield from self._peers()
        yield self._fall_back
        yield from self._peers()
        for make in self._fallback:
            self._reads_from(None, None)
            yield make
            yield from self._peers()

    def spare(self) -> Origin | None:
        """What stands behind the peers, as far as it can be had, for what is small."""
        opened = self._behind.wait(self._limits.probe_s)
        return None if opened is None else opened.origin

    def ended(self) -> None:
        """Nothing more is wanted from any peer."""
        self._stop.set()

    def close(self) -> None:
        """Ends what goes on. Whoever has the seat to give back is not waited for."""
        self._stop.set()
        self._behind.close()

    def _peers(self) -> Places:
        while not self._stop.is_set():
            seat = self._choose()
            if seat is None:
                return
            yield partial(self._open, seat)
            # Who comes back for another one could not use it, or not to its end.
            self._left.add(seat.facts.node)
            self._talk.leave(seat.peer, self._node.id)

    def _open(self, seat: Seat) -> PeerOrigin:
        origin = self._open_peer(seat.peer, seat.facts.fingerprint)
        self._reads_from(seat, origin)
        if self._watch is None and not self._stop.is_set():
            self._watch = threading.Thread(target=self._look_after, name="peer-seat", daemon=True)
            self._watch.start()
        return origin

    def _fall_back(self) -> Opened:
        self._reads_from(None, None)
        opened = self._behind.take()
        self._node.comes_from(root_of(opened))
        return opened

    def _reads_from(self, seat: Seat | None, origin: PeerOrigin | None) -> None:
        with self._lock:
            self._seat, self._origin = seat, origin
        self._node.reads_from(() if seat is None else seat.via)
        self._node.comes_from(None if seat is None else seat.facts.root)

    # -- choosing --------------------------------------------------------------------------------

    def _choose(self) -> Seat | None:
        """A peer to read from, with a seat there; None where there is none."""
        again = self._node.state == LOADING
        deadline = None
        pause = _FIRST_PAUSE_S
        while not self._stop.is_set():
            self._failures.clear()
            found = others(self._ask_all(), self._node.id)
            if deadline is None:  # it may have taken long to know where peers may be
                deadline = time.monotonic() + self._limits.choose_s
            found = [each for each in found if each.facts.node not in self._left]
            seat = self._best_seat(found, again) if found else None
            if seat is not None or again:
                return seat
            model = Wanted(self._node.model)
            if not is_awaited(found, model, self._node.id) or time.monotonic() > deadline:
                return None
            self._stop.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return None

    def _best_seat(self, found: Sequence[Candidate], again: bool) -> Seat | None:
        done = self._node.progress.done if again else None
        # Without a peer that could be used there is no need to know what it should have.
        if not any(each.facts.state == LOADING or each.facts.fingerprint for each in found):
            return None
        wanted = self._wanted()
        for peer, facts in found:
            if facts.state in (LOADING, LOADED) and not wanted.met_by(facts):
                what = "the peer has another model, or another version of it"
                self._failures.append(SourceChanged(what, where=peer.uri))
        for candidate in ranked(found, wanted, self._node.id, done):
            try:
                seat = self._sit(candidate.peer, wanted, done)
            except SourceError as error:
                self._failures.append(error)
                continue
            if wanted.met_by(seat.facts) and seat.facts.node not in self._left:
                return seat
            self._talk.leave(seat.peer, self._node.id)
        return None

    def _wanted(self) -> Wanted:
        fingerprint = self._node.fingerprint  # in mid-load it is known
        opened = self._behind.wait(self._limits.probe_s)
        if opened is None:
            return Wanted(self._node.model, fingerprint)
        return Wanted(
            self._node.model, fingerprint or opened.checkpoint.fingerprint, self._behind.root
        )

    def _ask_all(self) -> list[Candidate]:
        """What all peers say of themselves, as far as they do in time."""
        survey = Survey(self._directory, lambda peer: Candidate(peer, self._talk.node(peer)))
        found, failures = survey.wait(self._limits.ask_s, self._limits.more_s)
        self._failures += failures
        return found

    def _sit(self, first: Peer, wanted: Wanted, done: int | None) -> Seat:
        """Takes a seat at a peer, or at the end of the row behind it.

        Raises:
            SourceError: There is none to be had.
        """
        avoid = set(self._left)
        row: list[tuple[Peer, str | None]] = [(first, None)]
        seen: set[str] = set()
        deadline = time.monotonic() + self._limits.seat_s
        for _ in range(_MOST_STEPS):
            peer, node = row[-1]
            try:
                said = self._talk.seat(
                    peer,
                    self._node.id,
                    fingerprint=wanted.fingerprint,
                    serves=self._serves,
                    avoid=sorted(avoid)[:MOST_ASKED],
                    done=done,
                )
            except SourceError as error:
                if isinstance(error, SourceBusy) and time.monotonic() < deadline:
                    # Who has got a seat an instant before us has yet to open its source.
                    if self._stop.wait(_FIRST_PAUSE_S):
                        raise
                    continue
                if node is None:
                    raise
                avoid.add(node)  # back to who has named it
                row.pop()
                continue
            if isinstance(said, Seat):
                return said
            if said.node in seen or said.node == self._node.id:
                avoid.add(said.node)
            else:
                seen.add(said.node)
                row.append((said.peer, said.node))
        raise SourceBusy("the row of readers has no end", where=first.uri)

    # -- while it is read from -------------------------------------------------------------------

    def _look_after(self) -> None:
        """Keeps the seat, and gives a peer up that has stopped giving."""
        seat: Seat | None = None
        pace = self._make_pace()
        while not self._stop.wait(self._limits.renew_s):
            with self._lock:
                current, origin = self._seat, self._origin
            if current is None or origin is None:
                continue
            if seat is None or seat.facts.node != current.facts.node:
                seat, pace = current, self._make_pace()
            facts = self._renew(seat)
            theirs = None if facts is None else facts.done
            why = pace.look(time.monotonic(), self._node.progress.done, theirs)
            if why is not None:
                origin.give_up(why)
        with self._lock:
            current = self._seat
        if current is not None:
            self._talk.leave(current.peer, self._node.id)

    def _renew(self, seat: Seat) -> NodeFacts | None:
        """Keeps the seat; None where the peer says nothing that tells how far it is.

        One that does not answer is not given up for that: if it has died, the bytes tell.
        """
        try:
            said: Seat | Elsewhere = self._talk.seat(
                seat.peer, self._node.id, fingerprint=seat.facts.fingerprint, serves=self._serves
            )
        except SourceError:
            return None
        if isinstance(said, Elsewhere) or said.facts.node != seat.facts.node:
            return None
        self._node.reads_from(said.via)
        return said.facts
