"""The router: which worker has which request, and what happens to it when that one dies.

Plain bookkeeping: it is told what happened and says what to send; sockets, processes and clocks
are the replica's. Two rules make it safe to kill any worker at any moment. A token counts when
it has the index that is due and comes from the attempt that is current, so none is sent twice.
And a request is given out again only after its former worker is dead.

Decode workers are of two engines. Where there is a vLLM engine beside native workers, these decode
until it is up, and again when it is gone; what they have in hand then stays with them, or is told
to move (`move`).

Which worker a request goes to is settled in `placement`; what is to wait waits here, in the order
in which it came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.transport.base import Ticket
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import Listener, TokenEvent
from coldframe.runtime.replica.placement import Placement, Request, Worker
from coldframe.runtime.transport.base import Given, Taken
from coldframe.runtime.worker.handoff import Handoff, Job

__all__ = ["Router", "Transport"]

ACK_S = 30.0
"""How long a worker that is up may take to acknowledge a hand-off, in seconds."""
VLLM_ACK_S = 120.0
"""The same for vLLM: one step of it may compute thousands of tokens of other prompts."""
SILENCE_S = {"prefill": 300.0, "decode": 60.0, "vllm": 300.0}
"""How long a worker with requests may go without a word, in seconds. A decode worker speaks with
every step, a prefill worker between any two layers, and a layer over a long prompt takes time. A
step of vLLM's may compute a whole prompt again, or compile kernels for it."""


class Transport(Protocol):
    """How the router reaches the other processes."""

    def to_worker(self, worker: str, message: dict[str, Any]) -> None: ...

    def to_memory(self, message: dict[str, Any]) -> None: ...

    def offer(self, request: str, handoff: Handoff) -> None:
        """Has the KV of a request kept for another replica; `offered` follows."""
        ...

    def kill(self, worker: str) -> None:
        """Ends a worker that hangs; `worker_gone` follows."""
        ...


class Router:
    """Requests and workers.

    Args:
        transport: How to reach the processes.
        clock: Monotonic seconds.
    """

    def __init__(self, transport: Transport, clock: Callable[[], float]) -> None:
        self._transport = transport
        self._clock = clock
        self.placement = Placement()
        """Where requests go; what it goes by is others' to set."""
        self._workers = self.placement.workers
        self._requests: dict[str, Request] = {}
        self.longest: int | None = None
        """Tokens in the longest sequence that vLLM takes, where nobody else decodes."""
        self._only: str | None = None
        self.prefilled_by_decode = 0
        """Requests the rest of whose prompt was left to a decode worker, so far."""

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    @property
    def native_requests(self) -> int:
        """Those that native workers serve; the others wait for another engine."""
        return sum(found.engine is None for found in self._requests.values())

    @property
    def too_long_for_vllm(self) -> bool:
        """Whether a request waits for a native decode worker, since vLLM has no room for it."""
        return any(r.worker is None and self.placement.is_long(r) for r in self._requests.values())

    def load(self, role: str) -> int:
        """What the workers of a role have to do, and what waits for them.

        Returns:
            For prefill the prompt tokens that are not computed yet, as far as they are known; for
            decode the KV blocks of its requests. What one engine alone serves is no native
            worker's and does not count.
        """
        return sum(
            self.placement.work(r)
            for r in self._requests.values()
            if (r.role, r.group, r.engine) == (role, "", None)
        )

    # -- requests --------------------------------------------------------------------------------

    def submit(
        self,
        request: str,
        params: SamplingParams,
        listener: Listener,
        *,
        prompt: str | None = None,
        prompt_ids: tuple[int, ...] | None = None,
        add_special: bool = True,
        group: str = "",
        give: bool = False,
        kv: Given | None = None,
        generated_ids: tuple[int, ...] = (),
    ) -> None:
        """Takes a request; it waits where there is no worker of its group yet.

        Args:
            request: Its id.
            params: What is asked for.
            listener: Gets the answer; see `Taken` for one that is given away.
            prompt: The prompt as text, or
            prompt_ids: as token ids.
            add_special: Whether the tokenizer puts its own tokens around the text.
            group: Of the workers that are to serve it.
            give: Whether another replica goes on with it behind its first token.
            kv: What another replica has given with it; decode workers serve it then.
            generated_ids: Tokens that the client has.

        Raises:
            TransferRefused: What was given is of another request.
        """
        seeded = params.with_seed()
        job = Job(request, 0, seeded, prompt, prompt_ids, generated_ids, add_special)
        engine = params.needs or self._only
        found = Request(job, listener, group, engine, list(generated_ids), give=give)
        found.handoff = None if kv is None else kv.handoff(job)
        self._requests[request] = found
        self._transport.to_memory({"type": "open", "request": request})
        self._give_out()

    def leave_all_to(self, engine: str) -> None:
        """One engine serves all requests from now on, and those that have come, prefill and all."""
        self._only = engine
        for found in self._requests.values():
            found.engine = engine
        self._give_out()

    def cancel(self, request: str) -> None:
        """Forgets a request and frees what it holds."""
        found = self._requests.get(request)
        if found is None:
            return
        if found.worker is not None:
            self._transport.to_worker(found.worker, {"type": "cancel", "request": request})
        self._end(request)
        self._give_out()

    def fail_all(self, error: ColdframeError) -> None:
        """Ends every request with an error: the replica cannot go on."""
        while self._requests:  # a listener may cancel others meanwhile
            request, found = next(iter(self._requests.items()))
            self._end(request)
            found.listener.on_error(error)

    def waits_for(self, engine: str) -> bool:
        """Whether a request that this engine alone serves has no worker."""
        return any(r.worker is None and r.engine == engine for r in self._requests.values())

    def refuse_waiting(self, engine: str, error: ColdframeError) -> None:
        """Ends the requests that wait for an engine, which there is none of, without a token."""
        for request, found in list(self._requests.items()):
            waits = found.worker is None and found.engine == engine and not found.generated
            if waits and request in self._requests:  # a listener may cancel others meanwhile
                self._end(request)
                found.listener.on_error(error)

    def reopen(self) -> None:
        """Tells a memory service that is another one than before which requests there are."""
        for request in self._requests:
            self._transport.to_memory({"type": "open", "request": request})

    # -- workers ---------------------------------------------------------------------------------

    def worker_added(
        self,
        worker: str,
        role: str,
        group: str = "",
        domain: str = "",
        engine: str = "native",
    ) -> None:
        """A worker was started; what waits for its role is given to it at once.

        Args:
            worker: Its name.
            role: `prefill` or `decode`.
            group: Whose requests it takes.
            domain: Workers of the same one reach the same KV.
            engine: `native`, `vllm`, or `remote` for one that is in another replica.
        """
        self._workers[worker] = Worker(role, group, domain, engine, heard=self._clock())
        self._give_out()

    def retire(self, worker: str) -> None:
        """A worker gets no more requests: it is to go when it has none (`is_free`)."""
        state = self._workers.get(worker)
        if state is not None:  # else it has not been told yet what it is to be
            state.leaving = True

    def retain(self, worker: str) -> None:
        """A worker that was to go stays after all."""
        state = self._workers.get(worker)
        if state is not None:
            state.leaving = False
            self._give_out()

    def move(self, worker: str) -> int:
        """Has a native decode worker give back what it decodes, for another engine to go on.

        What is drawn depends on seed and position alone, in either engine. The worker keeps what
        it cannot give back, what is too long for the other engine, and what ends meanwhile.

        Returns:
            How many requests it was asked for.
        """
        theirs = [
            request
            for request, found in self._requests.items()
            if found.worker == worker
            and found.acked
            and found.handoff is not None
            and not self.placement.is_long(found)
        ]
        for request in theirs:
            self._transport.to_worker(worker, {"type": "move", "request": request})
        return len(theirs)

    def is_leaving(self, worker: str) -> bool:
        state = self._workers.get(worker)
        return state is not None and state.leaving

    def is_free(self, worker: str) -> bool:
        """Whether no request depends on a worker, nor on the lease that it renews for one."""
        return all(worker not in (r.worker, r.sender) for r in self._requests.values())

    def work_of(self, worker: str) -> int:
        """What a worker has to do; see `load`."""
        return self.placement.loads(self._requests.values())[worker]

    def worker_gone(self, worker: str, why: str = "it died") -> None:
        """A worker is dead: its requests go on elsewhere, or wait for its successor.

        A request that one worker after the other dies under is given up: it may be the cause.
        """
        self.workers_gone([worker], why)

    def workers_gone(self, workers: Sequence[str], why: str) -> None:
        """As `worker_gone`, for several at once: what one of them had does not go to another."""
        states = {worker: self._workers.pop(worker, None) for worker in workers}
        theirs = {r: found for r, found in self._requests.items() if found.worker in workers}
        for found in theirs.values():
            state = states[str(found.worker)]
            found.blameless += found.engine is not None and state is not None and not state.up
            found.worker, found.acked = None, False
            self._advance_attempt(found)
        for request, found in theirs.items():
            # A listener may cancel others.
            deaths = found.job.attempt - found.blameless
            if deaths < found.most_attempts or request not in self._requests:
                continue
            self._end(request)
            found.listener.on_error(
                ReplicaError(
                    "workers die under this request again and again",
                    where=request,
                    expected=f"fewer than {found.most_attempts} deaths",
                    got=why,
                    hint="What they said last is on standard error.",
                )
            )
        self._give_out()

    def on_message(self, worker: str, body: dict[str, Any]) -> None:
        """What a worker said."""
        state = self._workers.get(worker)
        if state is None:
            return
        state.heard = self._clock()
        match body["type"]:
            case "up":
                state.up, state.context = True, body.get("context")
                if state.engine == "vllm" and not self.placement.natives_help:
                    self.longest = state.context
                self._give_out()
            case "tokens":
                before = len(self._requests)
                for item in body["items"]:
                    self._token(worker, item)
                if len(self._requests) != before:
                    self._give_out()
            case "handoff":
                self._handed_over(worker, Handoff.from_wire(body["handoff"]))
                self._give_out()
            case "ack":
                self._acknowledged(worker, body["request"], body["attempt"])
            case "failed":
                self._failed(worker, body)
                self._give_out()

    def tick(self) -> None:
        """Kills workers that hang; call it about once a second."""
        now = self._clock()
        hung = set()
        for found in self._requests.values():
            state = self._workers.get(found.worker or "")
            if state is None or not state.up:
                continue
            unanswered = state.role == "decode" and not found.acked
            vllm = state.engine == "vllm"
            silence = SILENCE_S["vllm" if vllm else state.role]
            patience = VLLM_ACK_S if vllm else ACK_S
            if now - state.heard > (patience if unanswered else silence):
                hung.add(found.worker)
        for worker in hung:
            if worker is not None:
                self._transport.kill(worker)

    # -- the life of a request -------------------------------------------------------------------

    def _give_out(self) -> None:
        """Places what waits, in the order in which it came, as far as there are workers for it."""
        waiting = [
            request
            for request, found in self._requests.items()
            if found.worker is None and not found.offered
        ]
        if not waiting:
            return
        loads = self.placement.loads(self._requests.values())
        full: set[tuple[str, str, str | None, bool]] = set()
        for request in waiting:
            found = self._requests[request]
            wanted = (found.role, found.group, found.engine, self.placement.is_long(found))
            worker = None if wanted in full else self.placement.choose(found, loads)
            if worker is None:
                full.add(wanted)  # whoever came later does not pass
                continue
            if not loads[worker]:
                self._workers[worker].heard = self._clock()
            loads[worker] += self.placement.work(found)
            self._give(found, worker)

    def _give(self, found: Request, worker: str) -> None:
        found.worker, found.acked = worker, False
        if found.handoff is None:
            message: dict[str, Any] = {"type": "job", "job": found.job.to_wire()}
            if found.role == "prefill" and self.longest is not None:
                message["context"] = self.longest
        else:
            message = {"type": "handoff", "handoff": found.handoff.to_wire()}
        self._transport.to_worker(worker, message)

    def _advance_attempt(self, found: Request) -> None:
        """Makes the request's job or hand-off say all that the client has seen."""
        generated = tuple(found.generated)
        found.job = replace(found.job, attempt=found.job.attempt + 1, generated_ids=generated)
        if found.handoff is not None:
            prompt = found.handoff.job.prompt_ids
            kv_tokens = found.handoff.kv_tokens
            advanced = len(generated) > len(found.handoff.job.generated_ids)
            if advanced and not found.elsewhere and prompt is not None:
                kv_tokens = len(prompt) + len(generated) - 1
            if prompt is not None:  # else nobody has tokenised it, where there is no prefill
                found.job = replace(found.job, prompt=None, prompt_ids=prompt)
            found.handoff = replace(found.handoff, job=found.job, kv_tokens=kv_tokens)
        found.elsewhere = False

    def _token(self, worker: str, item: list[Any]) -> None:
        request, attempt, index, token, text, finish, logprob, top, *counts = item
        prompt_tokens, spelled, cached_tokens = counts
        found = self._current(worker, request, attempt)
        if found is None or index != len(found.generated):
            return
        found.generated.append(token)
        found.elsewhere = self._workers[worker].engine != "native"  # with KV of its own
        if (
            found.handoff is not None
            and not found.elsewhere
            and found.handoff.domain != self._workers[worker].domain
        ):
            # It was brought there, or computed again.
            domain = self._workers[worker].domain
            found.handoff = replace(found.handoff, domain=domain, ticket=None)
        if index == 0 and found.job.prompt is not None:
            self.placement.gauge.learn(found.job.prompt, prompt_tokens)
        if finish is not None:
            self._end(request)
        found.listener.on_token(
            TokenEvent(
                index,
                token,
                text,
                finish,
                logprob,
                tuple((i, p) for i, p in top),
                prompt_tokens,
                tuple(text.encode("latin-1") for text in spelled),
                cached_tokens,
            )
        )

    def _handed_over(self, worker: str, handoff: Handoff) -> None:
        job = handoff.job
        found = self._current(worker, job.request, job.attempt)
        if found is None:
            self._transport.to_worker(worker, {"type": "ack", "request": job.request})
            return
        found.handoff, found.sender, found.worker = handoff, worker, None
        found.elsewhere = False
        if self._workers[worker].role == "prefill":
            self.prefilled_by_decode += not handoff.whole
        # With what is only known since it was tokenised: how much the context leaves.
        found.job = replace(found.job, params=job.params)
        if found.give:
            found.offered = True
            self._transport.offer(job.request, handoff)

    def offered(self, request: str, ticket: Ticket | None) -> bool:
        """There is a ticket for the KV of a request, or none to be had: it is given away.

        Returns:
            Whether somebody has it now; else nobody waits for it any more.
        """
        found = self._requests.get(request)
        if found is None or found.handoff is None or not found.offered:
            return False
        self._thank_sender(request, found)
        del self._requests[request]
        cast("Taken", found.listener).on_given(Given.of(found.handoff, ticket))
        return True

    def _acknowledged(self, worker: str, request: str, attempt: int) -> None:
        found = self._current(worker, request, attempt)
        if found is None or found.acked:
            return
        found.acked = True
        self._thank_sender(request, found)

    def _failed(self, worker: str, body: dict[str, Any]) -> None:
        found = self._current(worker, body["request"], body["attempt"])
        if found is not None:
            self._end(body["request"])
            found.listener.on_error(ColdframeError.from_wire(body["error"]))

    def _current(self, worker: str, request: str, attempt: int) -> Request | None:
        """The request, if that worker's attempt at it is the one that counts."""
        found = self._requests.get(request)
        if found is None or found.worker != worker or found.job.attempt != attempt:
            return None
        return found

    def _thank_sender(self, request: str, found: Request) -> None:
        if found.sender in self._workers:
            self._transport.to_worker(found.sender, {"type": "ack", "request": request})
        found.sender = None

    def _end(self, request: str) -> None:
        found = self._requests.pop(request)
        self._thank_sender(request, found)
        self._transport.to_memory({"type": "release", "request": request})
