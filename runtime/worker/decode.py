"""The decode role: hand-offs in, tokens out."""

from __future__ import annotations

import time
from dataclasses import replace

from coldframe.loader.errors import ReplicaError, RequestError, TransferRefused
from coldframe.loader.timeline import now
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.sequence import Emission, Sequence
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.handoff import RENEW_S, Handoff, Job
from coldframe.runtime.worker.prompts import bounded, token_ids
from coldframe.runtime.worker.worker import Worker, kv_format

__all__ = ["run"]


def run(worker: Worker) -> None:
    """Serves until the front is gone.

    Raises:
        ColdframeError: The weights will not come, or the memory service is gone.
    """
    _DecodeRole(worker).run()


class _DecodeRole:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        graphs = worker.steps.graphs()
        self._kept = worker.steps.kept(graphs)
        steps = worker.steps.compiled if graphs is None else graphs
        self._decoder = Decoder(worker.model, graphs=steps)
        self._pool = worker.kv_pool()
        self._seen: dict[str, int] = {}
        """The latest attempt of each request that was taken here."""
        self._waiting: dict[str, Handoff] = {}
        """Requests that lost their KV, until there are blocks to compute it again in."""
        self._silent = False
        """Whether there is nothing to do, and nobody has said anything for a second."""
        self._behind: dict[str, int] = {}
        """Since when each request is here whose KV is not whole yet. Only then is it published:
        nobody may take it to be whole before."""
        self._moved: set[str] = set()
        """Requests given back for another engine: their leases are renewed until that has them."""
        self._renew_at = 0.0
        self._bringing: dict[str, int] = {}
        """Since when the KV of each request is on its way from another replica."""

    def run(self) -> None:
        while True:
            self._worker.beat()
            if not self._may_step():
                continue
            self._tell(self._decoder.step())
            if self._kept is not None and self._kept.between_steps():
                self._worker.report_spans()

    def _tell(self, emitted: list[tuple[Sequence, Emission]]) -> None:
        """Sends what a step has made."""
        if not emitted:
            return
        for sequence, emission in emitted:
            self._caught_up(sequence)
            if emission.finish is not None:
                self._let_go(sequence)
        items = [emission.to_wire() for _, emission in emitted]
        self._worker.control.send({"type": "tokens", "items": items})

    def _may_step(self) -> bool:
        """Takes what has come. Whether there is a step to be made, and all weights for it."""
        complete = self._worker.client.complete
        idle = not len(self._decoder)
        captured = self._silent and complete and self._capture()
        came = self._receive(block=(idle or not complete) and not captured)
        self._silent = idle and not came
        if not len(self._decoder):
            if self._worker.let_go() and self._kept is not None:
                self._kept.weights_leave()
        elif not complete:
            self._worker.client.check_stalled()
        return complete and len(self._decoder) > 0

    def _capture(self) -> bool:
        """Captures a step, where nobody has asked for anything. Whether there may be another."""
        if self._kept is None or not self._worker.inbox.empty():
            return False
        captured = self._kept.while_idle()
        self._worker.report_spans()
        return captured

    def _receive(self, *, block: bool) -> bool:
        """Takes what the front says, for which it may wait a second. Whether it said anything."""
        came = False
        for handoff in list(self._waiting.values()):
            if self._pool.is_on_its_way(handoff.job.request):
                continue
            if not self._pool.may_take:
                break
            if self._admit(handoff):
                del self._waiting[handoff.job.request]
                block = False  # there is a step to be made
        self._renew()
        for message in self._worker.messages(block=block):
            came = True
            if message.kind == "handoff":
                self._take(Handoff.from_wire(message.body["handoff"]))
            elif message.kind == "cancel":
                self._cancel(message.body["request"])
            elif message.kind == "move":
                self._move(message.body["request"])
            elif message.kind == "ack":
                self._moved.discard(message.body["request"])
        return came

    def _renew(self) -> None:
        if self._moved and time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + RENEW_S
            for request in self._moved:
                self._worker.client.renew(request)

    def _take(self, handoff: Handoff) -> None:
        job = handoff.job
        try:
            handoff = self._checked(handoff)
        except TransferRefused as error:
            self._worker.refuse(job, error)
            return
        if self._seen.get(job.request, -1) < job.attempt:
            self._seen[job.request] = job.attempt
            if not self._admit(handoff):
                self._waiting.setdefault(job.request, handoff)
        self._worker.control.send({"type": "ack", "request": job.request, "attempt": job.attempt})

    def _checked(self, handoff: Handoff) -> Handoff:
        """A hand-off of this model, with KV in the format of its KV, or none.

        Raises:
            ReplicaError: It is of another model, by a worker of this replica.
            TransferRefused: The same, by another replica.
        """
        expected = (self._worker.plan.fingerprint, kv_format(self._worker.spec.dtype))
        got = (handoff.fingerprint, handoff.kv_format)
        if handoff.foreign and got[0] in ("", expected[0]):
            return handoff if got == expected else replace(handoff, kv_tokens=0, ticket=None)
        if handoff.foreign:
            raise TransferRefused(
                "this request was begun with another model",
                where=handoff.job.request,
                expected=expected[0],
                got=got[0],
                hint="Start both replicas from the same checkpoint.",
            )
        if got != expected:
            raise ReplicaError(
                "a hand-off from another model",
                where=handoff.job.request,
                expected=expected,
                got=got,
            )
        return handoff

    def _admit(self, handoff: Handoff) -> bool:
        """Takes a request in with its KV, or, where that is lost, with blocks to compute it again.

        What is missing in the KV is computed between steps: all of it, or the rest of a prompt.

        Returns:
            Whether it is settled; else try again when something has changed.
        """
        job = handoff.job
        try:
            if handoff.foreign or job.prompt_ids is None:
                job = self._fit(job)
        except RequestError as error:
            self._seen.pop(job.request)
            self._worker.refuse(job, error)
            return True
        assert job.prompt_ids is not None
        sequence = self._worker.sequence(job, job.prompt_ids)
        began = self._bringing.setdefault(job.request, now()) if handoff.ticket else 0
        claimed = self._pool.claim(sequence, handoff.kv_tokens, handoff.domain, handoff.ticket)
        if not claimed and self._pool.comes_later:
            return False
        if handoff.ticket is not None:
            self._tell_of_kv(job.request, began, claimed=claimed)
        if not claimed:
            try:
                if not self._pool.take(sequence):
                    if handoff.ticket is not None:  # which has been tried, and was no good
                        tried = replace(handoff, kv_tokens=0, ticket=None)
                        self._waiting[job.request] = tried
                    return False
            except RequestError as error:
                self._seen.pop(job.request)
                self._worker.refuse(job, error)
                return True
        if not claimed or sequence.left > 1:
            self._behind[job.request] = now()
        self._decoder.admit(sequence)
        return True

    def _fit(self, job: Job) -> Job:
        """A request that no prefill worker of this replica has looked at, its prompt tokenised.

        Raises:
            RequestError: It cannot be served.
        """
        ids = token_ids(self._worker, job)
        room = self._worker.kv.blocks * BLOCK_TOKENS
        job = replace(job, prompt=None, prompt_ids=ids)
        return bounded(job, len(ids), self._worker.spec.context_length, room)

    def _tell_of_kv(self, request: str, began: int, *, claimed: bool) -> None:
        """For the timeline: how long KV was on its way from another replica, or why it was not."""
        self._bringing.pop(request, None)
        why = self._pool.lost_why
        note = "from another replica" if claimed or why is None else f"computed again: {why}"
        self._worker.recorder.add("handoff", began, note=note)
        self._worker.report_spans()

    def _caught_up(self, sequence: Sequence) -> None:
        """A request has a token: all before that is in the KV."""
        since = self._behind.pop(sequence.request, None)
        if since is not None:
            self._pool.publish(sequence)
            self._worker.recorder.add("prefill", since, note="between decode steps")
            self._worker.report_spans()

    def _move(self, request: str) -> None:
        """Gives a request back with its KV, for another engine to go on with it.

        One whose KV is not whole stays: whoever had it next would compute the rest no sooner.
        """
        if request in self._waiting or request in self._behind:
            return
        sequence = self._decoder.remove(request)
        if sequence is None:
            return
        self._seen.pop(request, None)  # it may come back in the same attempt
        self._pool.hand_over(sequence)
        self._moved.add(request)
        self._worker.give_on(sequence)

    def _cancel(self, request: str) -> None:
        self._moved.discard(request)
        if self._waiting.pop(request, None) is not None and request in self._bringing:
            del self._bringing[request]
            self._pool.abandon(request)
        self._seen.pop(request, None)
        sequence = self._decoder.remove(request)
        if sequence is not None:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Its tokens are what a next turn begins with, so its KV is kept, too."""
        self._pool.finish(sequence)
        self._behind.pop(sequence.request, None)
        self._seen.pop(sequence.request, None)
