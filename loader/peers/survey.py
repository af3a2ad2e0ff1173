"""All peers asked at once how they are: who answers in time counts."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, SourceUnreachable
from coldframe.loader.peers.choice import Candidate
from coldframe.loader.peers.directory import PeerDirectory
from coldframe.loader.peers.node import LOADED, LOADING
from coldframe.loader.sources.location import Peer

__all__ = ["MOST_ASKED", "Survey"]

MOST_ASKED = 64
"""Of very many a few will do."""


class Survey:
    """One round of questions.

    Args:
        directory: Where peers may be.
        ask: Asks one of them; raises where it does not answer.

    Attributes:
        found: What those say who answered.
        failures: Why others did not.
    """

    def __init__(self, directory: PeerDirectory, ask: Callable[[Peer], Candidate]) -> None:
        self.found: list[Candidate] = []
        self.failures: list[ColdframeError] = []
        self._directory = directory
        self._ask = ask
        self._changed = threading.Condition()
        self._open_questions = 1
        self._known_at: float | None = None
        """Since when it is known where peers may be."""
        # Daemons, since one that a name server or a dead host holds is left behind.
        threading.Thread(target=self._ask_all, name="peer-ask", daemon=True).start()

    def wait(self, ask_s: float, more_s: float) -> tuple[list[Candidate], list[ColdframeError]]:
        """What all peers say of themselves, as far as they do in time, and what was in the way.

        Args:
            ask_s: Seconds at most, from when it is known where they may be,
            more_s: and once one of them can be read from.
        """
        deadline = time.monotonic() + self._directory.waits_s + ask_s
        useful = False
        with self._changed:
            while self._open_questions and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
                if self._known_at is not None:
                    deadline = min(deadline, self._known_at + ask_s)
                if not useful and any(each.facts.state in (LOADING, LOADED) for each in self.found):
                    useful = True
                    deadline = min(deadline, time.monotonic() + more_s)
            failures = list(self.failures)
            if self._open_questions:
                what = f"{self._open_questions} of them said nothing in time"
                failures.append(SourceUnreachable(what, where="peers"))
            return list(self.found), failures

    def _ask_all(self) -> None:
        try:
            peers = list(self._directory.peers())
        except ColdframeError as error:
            self._answered(None, error)
            return
        peers = random.sample(peers, min(len(peers), MOST_ASKED))
        with self._changed:
            self._open_questions += len(peers)
            self._known_at = time.monotonic()
            self._changed.notify()
        for peer in peers:
            threading.Thread(
                target=self._ask_one, args=(peer,), name="peer-ask", daemon=True
            ).start()
        self._answered(None, None)

    def _ask_one(self, peer: Peer) -> None:
        try:
            self._answered(self._ask(peer), None)
        except ColdframeError as error:
            self._answered(None, error)

    def _answered(self, candidate: Candidate | None, error: ColdframeError | None) -> None:
        with self._changed:
            self._open_questions -= 1
            if candidate is not None:
                self.found.append(candidate)
            if error is not None:
                self.failures.append(error)
            self._changed.notify()
