"""Blocks of the KV arena that this process holds for vLLM's requests: claimed, assigned, let go.

A request's blocks are claimed as soon as vLLM knows of it: from then on no lease runs out while it
waits for blocks of vLLM's own. One thread talks to the memory service, in the order in which it is
asked, so that the engine never waits for long, and letting go never overtakes a claim.

Attempts at one request have the same blocks. They are let go with the last of those who hold them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coldframe.loader.errors import ColdframeError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.kv_thread import LateThread
from coldframe.runtime.options import BLOCK_TOKENS

__all__ = ["Hold", "Holds", "domain_of"]

_log = logging.getLogger(__name__)

_AGAIN_S = 0.02
"""How soon blocks are asked for again that were not to be had, in seconds."""
_OPEN_S = 60.0
"""How long a request that was opened here lives on once it was handed over: longer than a lease."""
_CPU = 1  # kDLCPU


@dataclass(eq=False, slots=True)
class Hold:
    """Blocks of one request, or what has become of the wish for them.

    Attributes:
        blocks: In order, from the first token on; None where there are none.
        why: Why there are none, once that is known.
    """

    request: str
    attempt: int
    blocks: list[int] | None = None
    why: str | None = None
    _settled: threading.Event = field(default_factory=threading.Event)
    _gone: bool = False

    @property
    def settled(self) -> bool:
        """Whether it is known what has become of it."""
        return self._settled.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Waits until it is; whether that is so."""
        return self._settled.wait(timeout_s)


class Holds:
    """All blocks that this process holds.

    Args:
        client: Gives the connection to the memory service.
        tally: Counts what is claimed.
    """

    def __init__(self, client: Callable[[], MemoryClient], tally: KvTally) -> None:
        self._client = client
        self._tally = tally
        self._users: dict[str, set[Hold]] = {}
        self._wanting: list[tuple[Hold, Callable[[], bool]]] = []
        self._opened: set[str] = set()
        self._ending: deque[tuple[float, str]] = deque()
        """Requests that were opened here and handed over, and when they end."""
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = LateThread(self._run, "kv-holds")

    def close(self) -> None:
        """Ends the thread, after all that it was asked. What is held stays so until the process
        ends."""
        self._asked.put(None)
        self._thread.join(5.0)

    def _ask(self, action: Callable[[], None]) -> None:
        self._thread.start()
        self._asked.put(action)

    def claim(self, request: str, attempt: int, kv_tokens: int, domain: str) -> Hold:
        """Claims the KV of a request that was handed over.

        Args:
            request: The ledger's name of it.
            attempt: The receiver's.
            kv_tokens: How many tokens there is KV of.
            domain: The device that has it. From another one it is brought here.
        """
        hold = Hold(request, attempt)
        self._ask(lambda: self._claim(hold, kv_tokens, domain))
        return hold

    def assign(self, request: str, attempt: int, tokens: int, *, opens: bool) -> Hold:
        """Gets blocks for a request's KV that is to be handed on.

        It is asked for again, where there are not enough, until they are there or `let_go`.

        Args:
            request: The ledger's name of it.
            attempt: This worker's.
            tokens: That can come to lie in them.
            opens: Whether the request is to be opened here.
        """
        hold = Hold(request, attempt)
        count = max(1, -(-tokens // BLOCK_TOKENS))
        self._ask(lambda: self._begin_assign(hold, count, opens))
        return hold

    def let_go(self, hold: Hold) -> None:
        """The blocks are not needed here any more, nor by who gets the request next.

        Nobody here may read or write them any more. Any number of times.
        """
        self._ask(lambda: self._let_go(hold))

    def hand_over(self, hold: Hold, timeout_s: float) -> bool:
        """Publishes what was written and lets the blocks go, for another worker to claim.

        Returns:
            Whether the ledger knows that; else the blocks are lost.
        """
        done = threading.Event()
        handed: list[bool] = []

        def hand() -> None:
            handed.append(self._hand_over(hold))
            done.set()

        self._ask(hand)
        return done.wait(timeout_s) and handed[0]

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                action = self._asked.get(timeout=self._patience())
            except queue.Empty:
                self._try_again()
                self._end_opened()
                continue
            if action is None:
                return
            action()

    def _patience(self) -> float | None:
        if self._wanting:
            return _AGAIN_S
        return max(0.0, self._ending[0][0] - time.monotonic()) if self._ending else None

    def _end_opened(self) -> None:
        while self._ending and self._ending[0][0] <= time.monotonic():
            self._release(self._ending.popleft()[1])

    def _release(self, request: str) -> None:
        self._opened.discard(request)
        self._tell(lambda: self._client().release(request))

    def _claim(self, hold: Hold, kv_tokens: int, domain: str) -> None:
        try:
            hold.blocks = self._claimed(hold, kv_tokens, domain)
            if hold.blocks is None:
                hold.why = "the KV is not there any more"
        except Exception as error:  # noqa: BLE001 - see `_reason`
            hold.why = _reason(error)
        if hold.blocks is not None:
            self._users.setdefault(hold.request, set()).add(hold)
            self._tally.add("claimed")
        hold._settled.set()

    def _claimed(self, hold: Hold, kv_tokens: int, domain: str) -> list[int] | None:
        if domain == domain_of(self._client()):
            return self._client().claim(hold.request, hold.attempt)
        count = max(1, -(-kv_tokens // BLOCK_TOKENS))
        got = self._client().bring(hold.request, hold.attempt, count, count)
        return None if got is None else got.blocks

    def _begin_assign(self, hold: Hold, count: int, opens: bool) -> None:
        if opens:
            try:
                self._client().open(hold.request)
                self._opened.add(hold.request)
            except Exception as error:  # noqa: BLE001 - see `_reason`
                hold.why = _reason(error)
                hold._settled.set()
                return

        def attempt() -> bool:
            if hold._gone:
                hold.why = "it is over"
                return True
            try:
                got = self._client().assign(hold.request, hold.attempt, count)
            except Exception as error:  # noqa: BLE001 - see `_reason`
                hold.why = _reason(error)
                return True
            if got is None:
                return False
            hold.blocks = got.blocks
            self._users.setdefault(hold.request, set()).add(hold)
            return True

        self._wanting.append((hold, attempt))
        self._try_again()

    def _try_again(self) -> None:
        for wanted in list(self._wanting):
            hold, attempt = wanted
            if attempt():
                self._wanting.remove(wanted)
                hold._settled.set()

    def _let_go(self, hold: Hold) -> None:
        hold._gone = True
        if self._leave(hold):
            self._tell(lambda: self._client().finish(hold.request))
        if self._wanting:
            self._try_again()
        if hold.request in self._opened and hold.request not in self._users:
            self._release(hold.request)

    def _hand_over(self, hold: Hold) -> bool:
        hold._gone = True
        if not self._leave(hold):
            return False

        def tell() -> None:
            self._client().publish(hold.request, ())
            self._client().drop(hold.request)

        if hold.request in self._opened:
            self._ending.append((time.monotonic() + _OPEN_S, hold.request))
        return self._tell(tell)

    def _leave(self, hold: Hold) -> bool:
        """Whether nobody else here has the request's blocks."""
        users = self._users.get(hold.request, set())
        if hold not in users:
            return False
        users.remove(hold)
        if users:
            return False
        del self._users[hold.request]
        return True

    @staticmethod
    def _tell(say: Callable[[], None]) -> bool:
        try:
            say()
        except Exception as error:  # noqa: BLE001 - see `_reason`
            _reason(error)
            return False  # as a rule the ledger is gone, and with it what it knew
        return True


def _reason(error: Exception) -> str:
    """What a request is told that cannot have its blocks.

    Whatever goes wrong with one request, the thread goes on: nobody else would answer the others.
    """
    if isinstance(error, ColdframeError):
        return error.what
    _log.error("coldframe: the KV of a request is given up", exc_info=error)
    return f"the memory service's answer could not be used ({error!r})"


def domain_of(client: MemoryClient) -> str:
    """The device whose arena a memory service has, as a hand-off names it."""
    assert client.kv is not None
    kind, index = client.kv.reservation.dlpack_device
    return "cpu" if kind == _CPU else f"cuda:{index}"
