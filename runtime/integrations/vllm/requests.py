"""The requests in a vLLM worker: from hand-offs to tokens, as a client is to get them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.runtime.engine.sequence import Emission, Sequence
from coldframe.runtime.integrations.vllm.engine import Engine, Made
from coldframe.runtime.integrations.vllm.grammars import Grammars
from coldframe.runtime.integrations.vllm.params import ask, sampled
from coldframe.runtime.integrations.vllm.transfer import consume
from coldframe.runtime.worker.handoff import Handoff, Job
from coldframe.runtime.worker.prompts import bounded

if TYPE_CHECKING:
    from coldframe.runtime.integrations.vllm.worker import VllmWorker

__all__ = ["Requests"]


class Requests:
    """What is under way in one engine.

    Args:
        worker: Says what comes of it.
        engine: Computes it.
        context: The longest sequence that the engine takes, in tokens.
    """

    def __init__(self, worker: VllmWorker, engine: Engine, context: int) -> None:
        self._worker = worker
        self._engine = engine
        self._context = context
        self._running: dict[str, _Running] = {}
        self._forming: dict[str, _Running] = {}
        """Those whose grammars are being compiled, so that the engine has not got them yet."""
        self._grammars = Grammars(engine, lambda: worker.inbox.put(None))
        self._seen: dict[str, int] = {}
        """The latest attempt of each request that was taken here."""

    def take(self, job: Job, handoff: Handoff | None = None) -> None:
        """Takes a request, once for each attempt, and says so in any case.

        Args:
            job: The request.
            handoff: Its KV, as far as that is there; None where all is to be computed here.
        """
        if self._seen.get(job.request, -1) < job.attempt:
            self.cancel(job.request)
            try:
                self._add(job, handoff)
            except RequestError as error:
                self._worker.refuse(job, error)
            else:
                self._seen[job.request] = job.attempt
        # Behind the engine's own taking: from then on it holds the KV, and no lease runs.
        ack = {"type": "ack", "request": job.request, "attempt": job.attempt}
        self._worker.control.send(ack)

    def cancel(self, request: str) -> None:
        """Forgets a request, where it is here."""
        self._engine.remove(request)
        self._grammars.forget(request)
        self._running.pop(request, None)
        self._forming.pop(request, None)
        self._seen.pop(request, None)

    def admit(self) -> None:
        """Gives the engine those whose grammars are there; to be called between its steps."""
        for request, found in self._grammars.ready():
            running = self._forming.pop(request)
            try:
                if isinstance(found, ColdframeError):
                    raise found
                self._engine.add(request, found)
            except ColdframeError as error:
                self._seen.pop(request, None)
                self._worker.refuse(running.job, error)
            else:
                self._running[request] = running

    def step(self) -> None:
        """Computes a step, and sends what it has made."""
        items = []
        for made in self._engine.step():
            running = self._running.get(made.request)
            if running is not None:
                items += [emission.to_wire() for emission in self._emissions(running, made)]
        if items:
            self._worker.control.send({"type": "tokens", "items": items})
            self._worker.report_spans()

    def _add(self, job: Job, handoff: Handoff | None) -> None:
        if handoff is None:
            job = self._worker.job_of(job)
        ids = job.prompt_ids
        assert ids is not None
        # What was given here before anybody knew what fits: the client has a token already.
        job = bounded(job, len(ids), self._context)
        sequence = self._worker.sequence(job, ids)
        asked = None
        if handoff is not None and handoff.foreign:
            self._check_foreign(handoff)
        elif handoff is not None and self._worker.knows(handoff):
            # Both engines draw alike, and what has a grammar is never handed over.
            asked = ask(
                job,
                self._worker.spec.eos_token_ids,
                kv_transfer_params=consume(handoff, "fast"),
                mode="fast",
            )
        asked = asked or ask(job, self._worker.spec.eos_token_ids)
        running = _Running(job, sequence, asked.known)
        if job.params.structured is not None:
            self._forming[job.request] = running
            self._grammars.begin(job.request, asked)
        else:
            self._engine.add(job.request, asked)
            self._running[job.request] = running

    def _check_foreign(self, handoff: Handoff) -> None:
        """A request of another replica's: its KV is computed again, by the same weights.

        Raises:
            RequestError: They are others.
        """
        ours = self._worker.plan.fingerprint
        if handoff.fingerprint not in ("", ours):
            raise RequestError(
                "this request was begun with another model",
                where=handoff.job.request,
                expected=ours,
                got=handoff.fingerprint,
                hint="Start both replicas from the same checkpoint.",
            )

    def _emissions(self, running: _Running, made: Made) -> list[Emission]:
        """What a client gets of what a step has made for its request."""
        job, sequence, found = running.job, running.sequence, []
        sequence.cached_tokens = min(made.cached, len(sequence.prompt_ids))
        for place, token in enumerate(made.tokens):
            if running.known:
                running.known -= 1
                continue
            logprobs: Any = made.logprobs[place] if made.logprobs else None
            found.append(sequence.accept(sampled(job.params, token, logprobs)))
            if found[-1].finish is not None:
                self.cancel(job.request)  # by a stop string, which the engine does not know
                return found
        if made.over is not None:
            self._running.pop(job.request)
            self._seen.pop(job.request, None)
            if made.over == "length" and found:
                found[-1] = replace(found[-1], finish="length")
            else:
                why = f"it ended with {made.over!r}"
                self._worker.refuse(job, ReplicaError("vLLM gave a request up", got=why))
        return found


class _Running:
    """A request in the engine.

    Args:
        job: It, as it came.
        sequence: Makes its text, and knows when it is over.
        known: So many tokens are made once more that the client has already.
    """

    def __init__(self, job: Job, sequence: Sequence, known: int) -> None:
        self.job = job
        self.sequence = sequence
        self.known = known
