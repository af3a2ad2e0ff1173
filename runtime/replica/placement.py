"""Which worker a request goes to: the one that is through with it first, as far as can be told.

What is given to a worker stays there. So where others may come to help, prompts wait beyond what
a worker has to do for a while (`Placement.share`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from coldframe.runtime.replica.answers import Listener
from coldframe.runtime.replica.loads import TextGauge, blocks_of
from coldframe.runtime.worker.handoff import Handoff, Job

__all__ = ["MOST_ATTEMPTS", "MOST_STARTS", "Placement", "Request", "Worker"]

MOST_ATTEMPTS = 4
"""How many workers may die under a request before it is given up."""
MOST_STARTS = 2
"""The same where one engine alone serves a request, and has made no token of it: its grammar may
be what kills it, and each engine takes long to start."""


@dataclass(slots=True)
class Worker:
    """What is known of a worker."""

    role: str
    group: str = ""
    domain: str = ""
    """Whose KV it reaches: that of its device."""
    engine: str = "native"
    up: bool = False
    heard: float = 0.0
    leaving: bool = False
    context: int | None = None
    """The longest sequence that it takes, in tokens; None where it takes what prefill lets in."""


@dataclass(slots=True)
class Request:
    """A request that is open, and how far it is."""

    job: Job
    listener: Listener
    group: str = ""
    engine: str | None = None
    """The only one that serves it, prefill and all; None where each does."""
    generated: list[int] = field(default_factory=list)
    handoff: Handoff | None = None
    worker: str | None = None
    acked: bool = False
    elsewhere: bool = False
    """Whether its last tokens were made in KV that no other worker reaches."""
    sender: str | None = None
    """The prefill worker that renews the lease until the `ack`."""
    give: bool = False
    """Whether another replica is to go on with it behind its first token."""
    offered: bool = False
    """Whether it waits for a ticket to be given away with."""
    blameless: int = 0
    """Attempts that ended with engines which never were up, and so never saw it."""

    @property
    def role(self) -> str:
        """Of the workers that it needs next."""
        return "prefill" if self.handoff is None and self.engine is None else "decode"

    @property
    def most_attempts(self) -> int:
        """How many workers may die under it."""
        return MOST_ATTEMPTS if self.engine is None or self.generated else MOST_STARTS

    @property
    def most_tokens(self) -> int:
        """Tokens that prompt and answer may come to; 0 before that is known."""
        if self.handoff is None:
            return 0
        return len(self.handoff.job.prompt_ids or ()) + (self.job.params.max_tokens or 0)


class Placement:
    """The workers that there are, and what each would have to do for a request.

    Attributes:
        workers: By name; the router's to change.
        gauge: Learns how many tokens a text is.
        share: Prompt tokens that a prefill worker may have to compute; None gives it all there is.
        natives_help: Whether native workers can be had for what vLLM has no room for.
    """

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.gauge = TextGauge()
        self.share: int | None = None
        self.natives_help = False

    def loads(self, requests: Iterable[Request]) -> Counter[str]:
        """What each worker has to do."""
        loads: Counter[str] = Counter()
        for found in requests:
            if found.worker is not None:
                loads[found.worker] += self.work(found)
        return loads

    def work(self, found: Request) -> int:
        """What there is to do for a request.

        Returns:
            For prefill the prompt tokens that are not computed yet, as far as they are known; for
            decode the KV blocks.
        """
        job, generated = found.job, len(found.generated)
        if found.handoff is not None:
            return blocks_of(len(found.handoff.job.prompt_ids or ()) + generated)
        if job.prompt_ids is None:
            tokens = self.gauge.guess(job.prompt or "") + generated
        else:
            tokens = max(1, len(job.prompt_ids) + generated)
        return tokens if found.role == "prefill" else blocks_of(tokens)

    def choose(self, found: Request, loads: Counter[str]) -> str | None:
        """The worker with the least to do for it to be through, or None where it is to wait.

        A request's KV is as near to one worker of its domain as to another, so there the load
        decides. Elsewhere it would have to be moved or computed again, which is work, too.
        """
        names = self._able(found)
        if not names:
            return None
        best = min(names, key=lambda name: loads[name] + self._missing(found, name))
        if found.role == "prefill" and self.share is not None and loads[best]:
            return best if loads[best] + self.work(found) <= self.share else None
        return best

    def is_long(self, found: Request) -> bool:
        """Whether vLLM is up and has no room for a request, which native workers decode then."""
        if not self.natives_help or found.handoff is None or found.engine is not None:
            return False
        engines = [
            state
            for state in self.workers.values()
            if (state.engine, state.group) == ("vllm", found.group)
            and (state.up and not state.leaving)
        ]
        most = found.most_tokens
        return bool(engines) and all(
            state.context is not None and most > state.context for state in engines
        )

    def _able(self, found: Request) -> list[str]:
        """Those who come into question."""
        names = [
            name
            for name, state in self.workers.items()
            if (state.role, state.group) == (found.role, found.group)
            and found.engine in (None, state.engine)
        ]
        if self.is_long(found):
            # A native worker that is about to go stays for it.
            able = [name for name in names if self.workers[name].engine == "native"]
            names = [name for name in able if not self.workers[name].leaving] or able
        else:
            names = [name for name in names if not self.workers[name].leaving]
        # One that is up comes first whatever its load: the other may take a while. And a vLLM
        # engine that is not takes longer than any native worker.
        engines = [[n for n in names if self.workers[n].engine == e] for e in ("vllm", "native")]
        if engines[0] and engines[1]:
            names = [n for n in engines[0] if self.workers[n].up] or engines[1]
        return [name for name in names if self.workers[name].up] or names

    def _missing(self, found: Request, worker: str) -> int:
        """What of a request's KV a worker does not reach, in blocks."""
        handoff = found.handoff
        if handoff is None or self.workers[worker].domain == handoff.domain:
            return 0
        return blocks_of(handoff.kv_tokens)
