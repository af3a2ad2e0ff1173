"""The prefill role: prompts in, first tokens and hand-offs out."""

from __future__ import annotations

import threading
import time
from collections import deque

from coldframe.loader.errors import RequestError
from coldframe.loader.timeline import now
from coldframe.loader.wire import Message
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.saturation import Saturation, SaturationProbe
from coldframe.runtime.engine.sequence import Emission, Sequence
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.handoff import RENEW_S, Job
from coldframe.runtime.worker.prompts import bounded, token_ids
from coldframe.runtime.worker.underway import Underway
from coldframe.runtime.worker.worker import Worker

__all__ = ["run"]

_CALM_S = 2.0
"""How long nobody must have asked before something is measured, in seconds."""
_LONG_TEXT = 32 << 10
"""Characters of a prompt above which it is tokenised beside the loop."""
_TOKENISED = "tokenised"


def run(worker: Worker) -> None:
    """Serves until the front is gone.

    Raises:
        ColdframeError: The weights will not come, or the memory service is gone.
    """
    _PrefillRole(worker).run()


class _PrefillRole:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._client = worker.client
        self._prefiller = Prefiller(
            worker.model,
            self._client.is_ready if worker.overlap else self._all_ready,
            worker.recorder,
        )
        self._pool = worker.kv_pool()
        self._queue: deque[tuple[Job, Sequence]] = deque()
        self._underway: Underway[tuple[Job, Sequence]] = Underway(BLOCK_TOKENS)
        self._handed: dict[str, int] = {}
        """Requests sent on and not acknowledged yet: their leases are renewed here. Of each, how
        many tokens of its prompt are left to the decode worker."""
        self._inside: set[str] = set()
        """Requests that are queued or computed here."""
        self._cancelled: set[str] = set()
        self._renew_at = 0.0
        self._context = worker.spec.context_length
        """The longest sequence that it and those who decode take, in tokens."""
        self._probe: SaturationProbe | None = None
        self._calm_since: float | None = None
        """Since when nobody has asked; None before the first token."""
        if worker.saturation is None:
            self._probe = SaturationProbe()
        else:
            self._saturate(worker.saturation)

    def run(self) -> None:
        while True:
            self._worker.beat()
            self._receive(block=False)
            self._admit()
            finished = self._prefiller.advance() if not self._prefiller.idle else None
            if finished is None:
                self._wait()
                continue
            for sequence, emission in finished:
                self._hand_over(sequence, emission)
            if finished:
                self._worker.report_spans()

    def _all_ready(self, _: int) -> bool:
        return all(self._client.is_ready(stage.index) for stage in self._worker.plan.stages)

    def _wait(self) -> None:
        """Sleeps until there is a message, or news of the weights or the KV."""
        started = now()
        if self._prefiller.idle:
            if self._worker.let_go():
                self._prefiller.weights_leave()
            if self._measured():
                return
            self._receive(block=True)
            self._worker.recorder.add("queue", started, waits_for="request")
            return
        stage = self._prefiller.blocked_on
        self._client.check_stalled()
        self._receive(block=True)
        self._worker.recorder.add("wait", started, waits_for=f"stage_ready[{stage}]")

    def _measured(self) -> bool:
        """Goes on finding out how large a batch should be, where nobody waits.

        Who comes meanwhile waits for a layer's time at most, as behind a long prompt.
        """
        if self._probe is None or self._calm_since is None:
            return False
        if time.monotonic() - self._calm_since < _CALM_S or not self._client.complete:
            return False
        found = self._probe.advance(self._worker.model.weights.layers)
        if found is not None:
            self._probe = None
            self._saturate(found)
        return True

    def _saturate(self, found: Saturation) -> None:
        self._prefiller.full = found.tokens
        self._worker.control.send({"type": "saturation", **found.to_wire()})

    def _receive(self, *, block: bool) -> None:
        if time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + RENEW_S
            for request in self._handed:
                self._client.renew(request)
        for message in self._worker.messages(block=block):
            if message.kind == "job":
                native = self._worker.spec.context_length
                self._context = min(native, message.body.get("context", native))
                self._take(Job.from_wire(message.body["job"]))
            elif message.kind == _TOKENISED:
                self._line_up(*message.body["outcome"])
            elif message.kind == "ack":
                self._handed.pop(message.body["request"], None)
            elif message.kind == "cancel":
                self._cancel(message.body["request"])

    def _take(self, job: Job) -> None:
        self._inside.add(job.request)
        if job.prompt_ids is None and len(job.prompt or "") > _LONG_TEXT:
            # A megabyte takes half a second, in which nobody else would get on.
            threading.Thread(target=self._tokenise_beside, args=(job,), daemon=True).start()
        else:
            self._line_up(job, *self._tokenised(job))

    def _tokenise_beside(self, job: Job) -> None:
        body = {"type": _TOKENISED, "outcome": (job, *self._tokenised(job, in_background=True))}
        self._worker.inbox.put(Message(body, ()))

    def _tokenised(
        self, job: Job, *, in_background: bool = False
    ) -> tuple[tuple[int, ...], RequestError | None]:
        """The prompt's ids, or what is wrong with it."""
        started = now()
        try:
            return token_ids(self._worker, job, in_background=in_background), None
        except RequestError as error:
            return (), error
        finally:
            self._worker.recorder.add("tokenize", started)

    def _line_up(self, job: Job, ids: tuple[int, ...], error: RequestError | None) -> None:
        """Puts a request at the end of the queue."""
        try:
            if error is not None:
                raise error
            room = self._worker.kv.blocks * BLOCK_TOKENS
            job = bounded(job, len(ids), self._context, room)
            self._queue.append((job, self._worker.sequence(job, ids)))
        except RequestError as wrong:
            self._leave(job.request)
            self._worker.refuse(job, wrong)

    def _admit(self) -> None:
        """Lets requests in, in their order, as far as there are KV blocks for them."""
        while self._queue:
            job, sequence = self._queue[0]
            if job.request in self._cancelled:
                self._leave(job.request)
                self._queue.popleft()
                continue
            if not self._pool.may_take:
                return
            keys = self._pool.keys(sequence)
            if self._underway.wait((job, sequence), keys):
                self._queue.popleft()
                continue
            try:
                taken = self._pool.take(sequence)
            except RequestError as error:
                self._worker.refuse(job, error)
                self._leave(job.request)
                self._queue.popleft()
                continue
            if not taken:
                return
            self._queue.popleft()
            if self._is_for_decode(sequence):
                self._leave(job.request)
                self._pass_on(sequence)
                continue
            self._prefiller.admit(sequence)
            self._underway.begin(sequence, keys[sequence.kv_tokens // BLOCK_TOKENS :])

    def _is_for_decode(self, sequence: Sequence) -> bool:
        """Whether a decode worker is to compute what is left of a prompt.

        That is so where it would have to wait here, and little is left behind what is in KV. No
        more is sent than the decode worker has acknowledged, as it does when it takes them into its
        next step: of many that come at once each side gets some.
        """
        if not sequence.cached_tokens or self._prefiller.has_room_for(sequence):
            return False
        return sequence.left + sum(self._handed.values()) <= self._worker.local_prefill

    def _cancel(self, request: str) -> None:
        sequence = self._prefiller.remove(request)
        if sequence is not None:
            self._leave(request)
            self._pool.finish(sequence)
            self._go_on_behind(request)
        elif request in self._inside:
            self._cancelled.add(request)
        self._handed.pop(request, None)

    def _leave(self, request: str) -> bool:
        """The request is here no more. Whether it had been cancelled."""
        self._inside.discard(request)
        cancelled = request in self._cancelled
        self._cancelled.discard(request)
        return cancelled

    def _go_on_behind(self, request: str) -> None:
        """Those that have waited for this one's KV are the next."""
        self._queue.extendleft(reversed(self._underway.end(request)))

    def _hand_over(self, sequence: Sequence, emission: Emission) -> None:
        request = sequence.request
        cancelled = self._leave(request)
        self._calm_since = time.monotonic()
        if not cancelled:
            self._worker.control.send({"type": "tokens", "items": [emission.to_wire()]})
        if cancelled or emission.finish is not None:
            self._pool.finish(sequence)
        else:
            self._pass_on(sequence)
        self._go_on_behind(request)

    def _pass_on(self, sequence: Sequence) -> None:
        """Hands a request to a decode worker, as far as it is."""
        request = sequence.request
        # From here on the decode worker may take the blocks; the lease keeps them until then.
        self._pool.hand_over(sequence)
        self._handed[request] = sequence.left - 1
        self._worker.give_on(sequence)
