"""The connector in vLLM's scheduler: which requests have their KV outside, and who holds it.

The scheduler's side holds all blocks of the arena, whatever ranks there are to copy them. It claims
a request's KV when vLLM hears of the request, says once how many tokens there are, and lets go when
every rank has copied them, or the request is over and no rank copies any more. A request whose KV
was used, or was found lost, is vLLM's own from then on: when it is asked for again, as after a
preemption, there is nothing more.

Requests that are to be handed on are the affair of `kv_outgoing`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.integrations.vllm.fingerprint import (
    Fingerprint,
    differences,
    kv_differences,
)
from coldframe.runtime.integrations.vllm.kv_holds import Hold, Holds, domain_of
from coldframe.runtime.integrations.vllm.kv_outgoing import KvOutgoing
from coldframe.runtime.integrations.vllm.kv_step import Load, Report, Step
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.transfer import (
    Consume,
    Produce,
    digest_of,
    parse,
)

__all__ = ["KvSchedule"]

_log = logging.getLogger(__name__)

_CLAIM_S = 0.05
"""How long a step waits for the ledger's answers, to all who come with it, while nothing else is to
be done."""
_BUSY_S = 0.002
"""And while others decode: all of them wait. An answer takes less than that as a rule."""
_PATIENCE_S = 20.0
"""After how long KV that cannot be claimed is given up."""


@dataclass(eq=False, slots=True)
class _Consumer:
    """A request whose KV may be outside."""

    asked: Consume
    hold: Hold | None
    since: float
    request: Any
    asked_for: bool = False
    """Whether a step has waited for its claim."""
    consumed: bool = False
    local: int = 0
    copying: int = 0
    """Ranks that have not said yet that they are done."""
    plan: Load | None = None
    over: bool = False


class KvSchedule:
    """The scheduler's side.

    Args:
        client: Gives the connection to the memory service.
        tally: Counts.
        fingerprint: Of this engine.
        unfit: Why this engine can have no KV from outside and give none, if so.
        ranks: Processes that copy.
        layered: Whether a step begins while its KV still comes; else KV comes beside steps.
        recompute: Whether vLLM is to compute lost KV again; else the request is to fail.
        block_tokens: Tokens in a block of vLLM's.
    """

    def __init__(
        self,
        client: Callable[[], MemoryClient],
        tally: KvTally,
        fingerprint: Callable[[], Fingerprint],
        *,
        unfit: str | None,
        ranks: int,
        layered: bool,
        recompute: bool,
        block_tokens: int,
    ) -> None:
        self._client = client
        self._tally = tally
        self._fingerprint = fingerprint
        self._unfit = unfit
        self._ranks = ranks
        self._layered = layered
        self._recompute = recompute
        self._block_tokens = block_tokens
        self._holds = Holds(client, tally)
        self._consumers: dict[str, _Consumer] = {}
        self._outgoing = KvOutgoing(
            *(client, self._holds, tally, fingerprint, self._unfit_now, ranks, block_tokens)
        )
        self._step = Step()
        self._idle = True
        """Whether the last step had nothing to compute."""
        self._waits_s = _CLAIM_S
        """How long the next step may still wait."""
        self._evict: Callable[[set[int]], None] = lambda _: None

    def close(self) -> None:
        self._holds.close()

    def bind(
        self, table: Callable[[str], Iterable[int]], evict: Callable[[set[int]], None]
    ) -> None:
        """Takes the scheduler's own bookkeeping.

        Args:
            table: The blocks of a request.
            evict: Makes blocks unknown to vLLM's prefix cache.
        """
        self._outgoing.table, self._evict = table, evict

    # -- a request comes -------------------------------------------------------------------------

    def came(self, request: Any) -> None:
        """vLLM has a new request."""
        try:
            asked = parse(request.kv_transfer_params)
        except ColdframeError as error:
            self._not_used(request.request_id, error.what)
            return
        if isinstance(asked, Consume):
            why = _of_other_tokens(asked, request)
            named_well = why is None
            why = why or self._unusable(asked)
            hold = None
            if why is None:
                hold = self._holds.claim(
                    asked.request, asked.attempt, asked.kv_tokens, asked.domain
                )
            else:
                self._tally.add("mismatched")
                self._not_used(request.request_id, why)
                if named_well:
                    self._free(asked)
            consumer = _Consumer(asked, hold, time.monotonic(), request, consumed=hold is None)
            self._consumers[request.request_id] = consumer
        elif isinstance(asked, Produce):
            self._outgoing.came(request, asked)

    def _unfit_now(self) -> str | None:
        if self._unfit is not None:
            return self._unfit
        if self._client().kv is None or self._client().plan is None:
            return "the memory service has no KV arena"
        return None

    def _unusable(self, asked: Consume) -> str | None:
        """Why a request's KV must not be used here, if so."""
        unfit = self._unfit_now()
        if unfit is not None:
            return unfit
        mine = self._fingerprint()
        found = {"model": (asked.model, mine.model), "kv_format": (asked.kv_format, mine.kv_format)}
        found = {name: both for name, both in found.items() if both[0] != both[1]}
        if asked.made_by is not None:
            found |= kv_differences(asked.made_by, mine)
        if asked.made_for is not None:
            found |= differences(asked.made_for, mine)
        return _differ(found) if found else None

    def _free(self, asked: Consume) -> None:
        """Sees that KV which is not used takes no room; a lease would end that later.

        Never that of other tokens: it may be another request's, which waits for it.
        """
        if self._client().kv is not None and asked.domain == domain_of(self._client()):
            hold = self._holds.claim(asked.request, asked.attempt, asked.kv_tokens, asked.domain)
            self._holds.let_go(hold)

    def _not_used(self, request: str, why: str) -> None:
        self._tally.add("recomputed", why=why)
        _log.warning("coldframe: the KV of %s is not used, vLLM computes it: %s", request, why)

    # -- it is scheduled -------------------------------------------------------------------------

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """How many tokens beyond the first `local` there is KV of outside, and whether it comes
        beside steps; None where that is not known yet."""
        consumer = self._consumers.get(request.request_id)
        if consumer is None or consumer.consumed or consumer.hold is None:
            return 0, False
        hold = consumer.hold
        if not self._answered(consumer, hold):
            if time.monotonic() - consumer.since < _PATIENCE_S:
                return None, False
            hold.why = "the memory service does not answer"
        count = min(consumer.asked.kv_tokens, request.num_tokens - 1) - local
        if hold.blocks is None and self._recompute:
            consumer.consumed = True
            if count > 0:
                self._not_used(request.request_id, str(hold.why))
            self._holds.let_go(hold)
            return 0, False
        if count <= 0:
            return 0, False
        consumer.local = local
        return count, not self._layered

    def _answered(self, consumer: _Consumer, hold: Hold) -> bool:
        """Whether it is known what has become of a claim; waits for that, but never for long."""
        if hold.settled:
            return True
        # Once is enough while others decode: the next step asks again.
        if self._waits_s <= 0 or (consumer.asked_for and not self._idle):
            return False
        consumer.asked_for = True
        began = time.monotonic()
        settled = hold.wait(self._waits_s)
        self._waits_s -= time.monotonic() - began
        return settled

    def placed(self, request: Any, table: tuple[int, ...], external: int) -> None:
        """vLLM has blocks for a request, and takes so many tokens from outside."""
        consumer = self._consumers.get(request.request_id)
        if consumer is None or consumer.consumed:
            return
        consumer.consumed = True
        hold = consumer.hold
        assert hold is not None
        if not external:
            self._holds.let_go(hold)
            return
        asked = consumer.asked
        consumer.plan = Load(
            request.request_id,
            asked.request,
            tuple(hold.blocks or ()),
            consumer.local,
            consumer.local + external,
            table,
            self._block_tokens,
            # They are of all tokens; of fewer they say nothing.
            asked.checksums if consumer.local + external == asked.kv_tokens else (),
            self._layered,
            None if hold.blocks is not None else str(hold.why),
        )
        consumer.copying = self._ranks
        self._step.loads.append(consumer.plan)

    def plan(self, scheduled: dict[str, int]) -> Step:
        """What the workers are to copy in the step that was scheduled.

        Args:
            scheduled: How many tokens of which requests it computes.
        """
        step, self._step = self._step, Step()
        step.idle = self._idle = not scheduled
        self._waits_s = _CLAIM_S if step.idle else _BUSY_S
        step.saves = self._outgoing.saves(scheduled)
        return step

    # -- the workers have said something ---------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Takes what the ranks have done."""
        for name, why in report.failed.items():
            consumer = self._consumers.get(name)
            if consumer is None or (consumer.over and self._recompute):
                continue
            if self._recompute:
                self._not_used(name, why)
                _computed_here(consumer.request, consumer.local)
                if consumer.plan is not None and consumer.plan.waits:
                    # vLLM knows them by the tokens that they were to hold, and nobody else may
                    # find them before they do.
                    self._evict(consumer.plan.touched)
            else:
                self._tally.add("failed", why=why)
        for name, count in report.loaded.items():
            consumer = self._consumers.get(name)
            if consumer is None:
                continue
            consumer.copying -= count
            if consumer.copying <= 0 and consumer.hold is not None:
                self._holds.let_go(consumer.hold)
                if consumer.over:
                    del self._consumers[name]
        self._outgoing.reported(report)

    # -- it is over ------------------------------------------------------------------------------

    def over(self, request: Any, *, whole: bool) -> dict[str, Any] | None:
        """A request has ended; what its output is to say of its KV.

        Args:
            request: Which.
            whole: Whether it came to its end, and was not cancelled.
        """
        name = request.request_id
        consumer = self._consumers.get(name)
        if consumer is not None:
            consumer.over = True
            if not consumer.consumed:
                self._tally.add("cancelled")
            if consumer.copying <= 0:
                del self._consumers[name]
                if consumer.hold is not None:
                    self._holds.let_go(consumer.hold)
        return self._outgoing.over(request, whole=whole)


def _of_other_tokens(asked: Consume, request: Any) -> str | None:
    """Why what a request says of its KV cannot be true, if so."""
    tokens = list(request.prompt_token_ids or ())[: max(0, asked.kv_tokens)]
    if len(tokens) != asked.kv_tokens or digest_of(tokens) != asked.tokens:
        return "the KV is of other tokens"
    return None


def _computed_here(request: Any, cached: int) -> None:
    """Takes it back that tokens came from outside: vLLM tells clients so with the first output."""
    if request.prefill_stats is not None:
        request.prefill_stats.set(
            num_prompt_tokens=request.num_prompt_tokens,
            num_local_cached_tokens=cached,
            num_external_cached_tokens=0,
        )


def _differ(found: dict[str, tuple[Any, Any]]) -> str:
    both = found.items()
    shown = ", ".join(f"{name}: {one!s:.40} and {other!s:.40}" for name, (one, other) in both)
    return f"the engines differ ({shown})"
