"""Requests of vLLM's that are handed on: their KV copied into the arena, and who may claim it.

A request to be handed on gets blocks of the arena at once. Its prompt is copied there by the steps
that compute it, before they end, and published before the step's outputs leave the scheduler: so
whoever is told of it by its output can claim its KV. vLLM asks for what the output is to say before
it passes on what the workers report of the same step; so what is said is put right if need be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.integrations.vllm.fingerprint import Fingerprint
from coldframe.runtime.integrations.vllm.kv_holds import Hold, Holds, domain_of
from coldframe.runtime.integrations.vllm.kv_step import Report, Save
from coldframe.runtime.integrations.vllm.kv_tally import KvTally
from coldframe.runtime.integrations.vllm.transfer import Outcome, Produce, handed
from coldframe.runtime.worker.handoff import Handoff, Job

__all__ = ["KvOutgoing"]

_ROOM_S = 0.05
"""How long a step waits for blocks of the arena, for all who begin with it, in seconds."""
_HAND_S = 5.0
_NO_ROOM = "there were no blocks of the arena for it"
_NO_PLACE = "vLLM keeps no KV of some of its tokens"


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


class KvOutgoing:
    """Those requests, in the scheduler.

    Args:
        client: Gives the connection to the memory service.
        holds: Gets their blocks.
        tally: Counts.
        fingerprint: Of this engine.
        unfit: Says why none of its KV can travel, if so.
        ranks: Processes that copy.
        block_tokens: Tokens in a block of vLLM's.

    Attributes:
        table: The blocks of a request, as the scheduler has them.
    """

    def __init__(
        self,
        client: Callable[[], MemoryClient],
        holds: Holds,
        tally: KvTally,
        fingerprint: Callable[[], Fingerprint],
        unfit: Callable[[], str | None],
        ranks: int,
        block_tokens: int,
    ) -> None:
        self._client = client
        self._holds = holds
        self._tally = tally
        self._fingerprint = fingerprint
        self._unfit = unfit
        self._ranks = ranks
        self._block_tokens = block_tokens
        self._producers: dict[str, _Producer] = {}
        self.table: Callable[[str], Iterable[int]] = lambda _: ()

    def __len__(self) -> int:
        return len(self._producers)

    def came(self, request: Any, asked: Produce) -> None:
        """vLLM has a new one."""
        job, tokens = asked.job, request.num_prompt_tokens
        most = tokens if job.params.max_tokens is None else _most_tokens(job, tokens)
        hold = self._holds.assign(job.request, job.attempt, most, opens=asked.opens)
        self._producers[request.request_id] = _Producer(asked, hold, request)

    def saves(self, scheduled: dict[str, int]) -> list[Save]:
        """What a step is to copy: of each of these that it computes, the part of its prompt.

        Args:
            scheduled: How many tokens of which requests it computes.
        """
        found = []
        until = time.monotonic() + _ROOM_S
        for name in [name for name in scheduled if name in self._producers]:
            save = self._save(name, self._producers[name], scheduled[name], until)
            if save is not None:
                found.append(save)
        return found

    def _save(self, name: str, producer: _Producer, tokens: int, until: float) -> Save | None:
        hold, request = producer.hold, producer.request
        if producer.why is None and not hold.wait(max(0.0, until - time.monotonic())):
            self._holds.let_go(hold)
            producer.why = _NO_ROOM
        if producer.why is not None or hold.blocks is None or self._unfit() is not None:
            return None
        end = min(request.num_computed_tokens + tokens, request.num_prompt_tokens)
        if end <= producer.saved:
            return None
        table, size = tuple(self.table(name)), self._block_tokens
        if -1 in table[producer.saved // size : -(-end // size)]:
            # A sliding window has left them behind: found in the prefix cache, say.
            producer.why = _NO_PLACE
            return None
        start, producer.saved = producer.saved, end
        producer.copying += self._ranks
        return Save(
            name,
            hold.request,
            tuple(hold.blocks),
            start,
            end,
            table,
            size,
            sums=producer.asked.checksums and end == request.num_prompt_tokens,
        )

    def reported(self, report: Report) -> None:
        """Takes what the ranks have done."""
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

    def over(self, request: Any, *, whole: bool) -> dict[str, Any] | None:
        """A request has ended; what its output is to say. See `KvSchedule.over`."""
        name = request.request_id
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
        mine = self._fingerprint() if self._unfit() is None else None
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
        if self._unfit() is not None:
            return self._unfit()
        if producer.why is not None:
            return producer.why
        if producer.hold.blocks is None:
            return producer.hold.why or _NO_ROOM
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
            domain_of(self._client()),
        )


def _most_tokens(job: Job, prompt_tokens: int) -> int:
    """Tokens that can come to lie in a request's KV, wherever it goes on."""
    assert job.params.max_tokens is not None
    return prompt_tokens - len(job.generated_ids) + job.params.max_tokens - 1
