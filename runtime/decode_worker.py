"""The decode role: hand-offs in, tokens out."""

from __future__ import annotations

from coldframe.loader.errors import ReplicaError, RequestError
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.sequence import Sequence
from coldframe.runtime.handoff import Handoff
from coldframe.runtime.kvpool import KvPool
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker import Worker, kv_format

__all__ = ["run"]


def run(worker: Worker) -> None:
    """Serves until the front is gone.

    Raises:
        ColdframeError: The weights will not come, or the memory service is gone.
    """
    role = _DecodeRole(worker)
    for stage in range(len(worker.plan.stages)):
        worker.client.wait_stage(stage)
    role.run()


class _DecodeRole:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._client = worker.client
        self._decoder = Decoder(worker.model)
        self._pool = KvPool(self._client, worker.kv.blocks, BLOCK_TOKENS)
        self._seen: dict[str, int] = {}
        """The latest attempt of each request that was taken here."""
        self._waiting: list[Handoff] = []
        """Requests that lost their KV, until there are blocks to compute it again in."""
        self._recomputed: dict[str, list[int]] = {}
        """Blocks of this worker's own with such KV, until the ledger has them as the request's."""

    def run(self) -> None:
        while True:
            self._worker.beat()
            self._receive(block=not len(self._decoder))
            if not len(self._decoder):
                self._pool.trim()
                continue
            emitted = self._decoder.step()
            for sequence, emission in emitted:
                if emission.finish is not None:
                    self._let_go(sequence.request)
                elif sequence.request in self._recomputed:
                    self._publish(sequence)
            items = [emission.to_wire() for _, emission in emitted]
            self._worker.control.send({"type": "tokens", "items": items})

    def _receive(self, *, block: bool) -> None:
        self._waiting = [handoff for handoff in self._waiting if not self._admit(handoff)]
        for message in self._worker.messages(block=block):
            if message.kind == "handoff":
                self._take(Handoff.from_wire(message.body["handoff"]))
            elif message.kind == "cancel":
                self._cancel(message.body["request"])

    def _take(self, handoff: Handoff) -> None:
        job = handoff.job
        self._check(handoff)
        if self._seen.get(job.request, -1) < job.attempt:
            self._seen[job.request] = job.attempt
            if not self._admit(handoff):
                self._waiting.append(handoff)
        self._worker.control.send({"type": "ack", "request": job.request, "attempt": job.attempt})

    def _check(self, handoff: Handoff) -> None:
        expected = (self._worker.plan.fingerprint, kv_format(self._worker.spec.dtype))
        got = (handoff.fingerprint, handoff.kv_format)
        if got != expected:
            raise ReplicaError(
                "a hand-off from another model",
                where=handoff.job.request,
                expected=expected,
                got=got,
            )

    def _admit(self, handoff: Handoff) -> bool:
        """Takes a request in with its KV, or, where that is lost, with blocks to compute it again.

        Returns:
            Whether it is settled; else try again when something has changed.
        """
        job = handoff.job
        assert job.prompt_ids is not None
        sequence = self._worker.sequence(job, job.prompt_ids)
        blocks = self._client.claim(job.request, job.attempt)
        if blocks is not None:
            sequence.kv_tokens = handoff.kv_tokens
        else:
            try:
                blocks = self._pool.reserve(job.request, sequence.most_tokens)
            except RequestError as error:
                self._seen.pop(job.request)
                self._worker.refuse(job, error)
                return True
            if blocks is None:
                return False
            self._recomputed[job.request] = blocks
        sequence.blocks = blocks
        self._decoder.admit(sequence)
        return True

    def _publish(self, sequence: Sequence) -> None:
        """Makes blocks the request's, now that the KV in them is whole.

        Not before: whoever claims a request's blocks takes them to hold what the hand-off says.
        """
        blocks = self._recomputed[sequence.request]
        if self._client.assign(sequence.request, sequence.attempt, blocks):
            del self._recomputed[sequence.request]

    def _cancel(self, request: str) -> None:
        self._waiting = [handoff for handoff in self._waiting if handoff.job.request != request]
        self._decoder.remove(request)
        if request in self._seen:
            self._let_go(request)

    def _let_go(self, request: str) -> None:
        self._pool.put_back(self._recomputed.pop(request, []))
        self._client.drop(request)
        self._seen.pop(request, None)
