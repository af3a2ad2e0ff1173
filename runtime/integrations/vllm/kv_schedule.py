"""The connector in vLLM's scheduler: which requests have their KV outside, and who holds it.

The scheduler's side holds all blocks of the arena, whatever ranks there are to copy them. It claims
a request's KV when vLLM hears of the request, says once how many tokens there are, and lets go when
every rank has copied them, or the request is over and no rank copies any more. A request whose KV
was used, or was found lost, is vLLM's own from then on: when it is asked for again, as after a
preemption, there is nothing more.

A request to be handed on gets blocks of the arena at once. Its prompt is copied there by the steps
that compute it, before they end, and published before the step's outputs leave the scheduler: so
whoever is told of it by its output can claim its KV. vLLM asks for what the output is to say before
it passes on what the workers report of the same step; so what is said is put right if need be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from coldframe.loader.client import MemoryClient
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.handoff import Handoff, Job
from coldframe.runtime.integrations.vllm.fingerprint import (
    Fingerprint,
    differences,
    kv_differences,
)
from coldframe.runtime.integrations.vllm.kv_holds import Hold, Holds, domain_of
from coldframe.runtime.integrations.vllm.kv_step import Load, Report, Save, Step
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.transfer import (
    Consume,
    Outcome,
    Produce,
    digest_of,
    handed,
    parse,
)

__all__ = ["KvSchedule"]

_log = logging.getLogger(__name__)

_CLAIM_S = 0.05
"""How long the scheduler waits for the ledger's answer before it goes on with others."""
_PATIENCE_S = 20.0
"""After how long KV that cannot be claimed is given up."""
_HAND_S = 5.0


@dataclass(eq=False, slots=True)
class _Consumer:
    """A request whose KV may be outside."""

    asked: Consume
    hold: Hold | None
    since: float
    consumed: bool = False
    local: int = 0
    copying: int = 0
    """Ranks that have not said yet that they are done."""
    plan: Load | None = None
    over: bool = False


@dataclass(eq=False, slots=True)
class _Producer:
    """A request whose KV is to be outside."""

    asked: Produce
    hold: Hold
    request: Any
    saved: int = 0
    copying: int = 0
    why: str | None = None
    checksums: tuple[str, ...] = ()
    over: bool = False
    said: dict[str, Any] | None = None
    """What its output says, where it was over before its last copy was reported."""


class KvSchedule:
    """The scheduler's side.

    Args:
        client: The memory service.
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
        client: MemoryClient,
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
        self._producers: dict[str, _Producer] = {}
        self._step = Step()
        self._evict: Callable[[set[int]], None] = lambda _: None
        self._table: Callable[[str], Iterable[int]] = lambda _: ()

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
        self._table, self._evict = table, evict

    # -- a request comes -------------------------------------------------------------------------

    def came(self, request: Any) -> None:
        """vLLM has a new request."""
        try:
            asked = parse(request.kv_transfer_params)
        except ColdframeError as error:
            self._not_used(request.request_id, error.what)
            return
        if isinstance(asked, Consume):
            why = self._unusable(asked, request)
            hold = None
            if why is None:
                hold = self._holds.claim(
                    asked.request, asked.attempt, asked.kv_tokens, asked.domain
                )
            else:
                self._tally.add("mismatched")
                self._not_used(request.request_id, why)
            consumer = _Consumer(asked, hold, time.monotonic(), consumed=hold is None)
            self._consumers[request.request_id] = consumer
        elif isinstance(asked, Produce):
            job, tokens = asked.job, request.num_prompt_tokens
            most = tokens if job.params.max_tokens is None else _most_tokens(job, tokens)
            hold = self._holds.assign(job.request, job.attempt, most, opens=asked.opens)
            self._producers[request.request_id] = _Producer(asked, hold, request)
            hold.why = self._unfit_now() or hold.why

    def _unfit_now(self) -> str | None:
        if self._unfit is not None:
            return self._unfit
        if self._client.kv is None or self._client.plan is None:
            return "the memory service has no KV arena"
        return None

    def _unusable(self, asked: Consume, request: Any) -> str | None:
        """Why a request's KV must not be used here, if so."""
        unfit = self._unfit_now()
        if unfit is not None:
            return unfit
        mine = self._fingerprint()
        if (asked.model, asked.kv_format) != (mine.model, mine.kv_format):
            return _differ(
                {
                    name: both
                    for name, both in {
                        "model": (asked.model, mine.model),
                        "kv_format": (asked.kv_format, mine.kv_format),
                    }.items()
                    if both[0] != both[1]
                }
            )
        found = kv_differences(asked.made_by, mine) if asked.made_by is not None else {}
        if asked.made_for is not None:
            found |= differences(asked.made_for, mine)
        if found:
            return _differ(found)
        tokens = list(request.prompt_token_ids or ())[: asked.kv_tokens]
        if len(tokens) < asked.kv_tokens or digest_of(tokens) != asked.tokens:
            return "the KV is of other tokens"
        return None

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
        if not hold.wait(_CLAIM_S):
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
        step.idle = not scheduled
        for name in [name for name in scheduled if name in self._producers]:
            save = self._save(name, self._producers[name], scheduled[name])
            if save is not None:
                step.saves.append(save)
        return step

    def _save(self, name: str, producer: _Producer, tokens: int) -> Save | None:
        hold, request = producer.hold, producer.request
        if not hold.wait(_CLAIM_S) or hold.blocks is None or self._unfit_now() is not None:
            return None
        end = min(request.num_computed_tokens + tokens, request.num_prompt_tokens)
        if end <= producer.saved:
            return None
        start, producer.saved = producer.saved, end
        producer.copying += self._ranks
        return Save(
            name,
            hold.request,
            tuple(hold.blocks),
            start,
            end,
            tuple(self._table(name)),
            self._block_tokens,
            sums=producer.asked.checksums and end == request.num_prompt_tokens,
        )

    # -- the workers have said something ---------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Takes what the ranks have done."""
        for name, why in report.failed.items():
            consumer = self._consumers.get(name)
            if consumer is None or consumer.over:
                continue
            if self._recompute:
                self._not_used(name, why)
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
        for name, why in report.unsaved.items():
            if name in self._producers:
                self._producers[name].why = why
        for name, checksums in report.checksums.items():
            if name in self._producers:
                self._producers[name].checksums = checksums
        for name, count in report.saved.items():
            producer = self._producers.get(name)
            if producer is None:
                continue
            producer.copying -= count
            if producer.copying <= 0 and producer.over:
                if producer.said is not None:
                    producer.said.update(handed(self._end(name, producer)))
                else:
                    del self._producers[name]
                    self._holds.let_go(producer.hold)

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
        producer = self._producers.get(name)
        if producer is None:
            return None
        producer.over = True
        why = None if whole else "the request was cancelled"
        if producer.copying <= 0 or why is not None:
            return handed(self._end(name, producer, why))
        # The step that has computed its last token has copied it; that will be reported in a
        # moment. Till then nobody can claim it.
        producer.said = handed(Outcome(None, None, "its KV was not copied to the end"))
        return producer.said

    def _end(self, name: str, producer: _Producer, why: str | None = None) -> Outcome:
        """Hands a request on, or lets its blocks go."""
        why = why or self._why_not(producer)
        mine = self._fingerprint() if self._unfit_now() is None else None
        if why is None and mine is not None:
            handoff = self._handoff(producer, mine)
            if self._holds.hand_over(producer.hold, _HAND_S):
                self._tally.add("handed")
                del self._producers[name]
                return Outcome(handoff, mine, None, producer.checksums)
            why = "the memory service is gone"
        self._tally.add("not_handed", why=why)
        if producer.copying <= 0:
            del self._producers[name]
            self._holds.let_go(producer.hold)
        return Outcome(None, mine, why)

    def _why_not(self, producer: _Producer) -> str | None:
        request, job = producer.request, producer.asked.job
        ids = [*(job.prompt_ids or request.prompt_token_ids), *job.generated_ids]
        if self._unfit_now() is not None:
            return self._unfit_now()
        if producer.why is not None:
            return producer.why
        if producer.hold.blocks is None:
            return producer.hold.why or "there were no blocks of the arena for it"
        if list(request.prompt_token_ids) != ids:
            return "its prompt is not the job's"
        if producer.saved < request.num_prompt_tokens:
            return "its KV was not copied to the end"
        return None

    def _handoff(self, producer: _Producer, mine: Fingerprint) -> Handoff:
        request, job = producer.request, producer.asked.job
        done = Job(
            job.request,
            job.attempt,
            job.params,
            prompt_ids=tuple(job.prompt_ids or request.prompt_token_ids),
            generated_ids=(*job.generated_ids, *request.output_token_ids),
        )
        return Handoff(
            done,
            mine.model,
            mine.kv_format,
            tuple(producer.hold.blocks or ()),
            request.num_prompt_tokens,
            domain_of(self._client),
        )


def _most_tokens(job: Job, prompt_tokens: int) -> int:
    """Tokens that can come to lie in a request's KV, wherever it goes on."""
    assert job.params.max_tokens is not None
    return prompt_tokens - len(job.generated_ids) + job.params.max_tokens - 1


def _differ(found: dict[str, tuple[Any, Any]]) -> str:
    both = found.items()
    shown = ", ".join(f"{name}: {one!s:.40} and {other!s:.40}" for name, (one, other) in both)
    return f"the engines differ ({shown})"
