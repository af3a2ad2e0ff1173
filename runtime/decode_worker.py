"""The decode role: hand-offs in, tokens out."""

from __future__ import annotations

import queue

from coldframe.loader.errors import ReplicaError, RequestError
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.handoff import Handoff
from coldframe.runtime.kvpool import KvPool
from coldframe.runtime.worker import BLOCK_TOKENS, Worker, kv_format

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
        self._without_kv: list[Handoff] = []
        self._reported = False

    def run(self) -> None:
        while True:
            self._receive(block=not len(self._decoder))
            if not len(self._decoder):
                self._pool.trim()
                continue
            emitted = self._decoder.step()
            for sequence, emission in emitted:
                if emission.finish is not None:
                    self._let_go(sequence.request)
            items = [emission.to_wire() for _, emission in emitted]
            self._worker.control.send({"type": "tokens", "items": items})

    def _receive(self, *, block: bool) -> None:
        for handoff in self._without_kv[:]:
            self._admit_without_kv(handoff)
        try:
            while True:
                message = self._worker.inbox.get(block, 1.0 if block else None)
                block = False
                if message is None:
                    self._worker.check_memory()
                elif message.kind == "handoff":
                    self._take(Handoff.from_wire(message.body["handoff"]))
                elif message.kind == "cancel":
                    self._cancel(message.body["request"])
        except queue.Empty:
            return

    def _take(self, handoff: Handoff) -> None:
        job = handoff.job
        self._check(handoff)
        if self._seen.get(job.request, -1) < job.attempt:
            self._seen[job.request] = job.attempt
            blocks = self._client.claim(job.request, job.attempt)
            if blocks is None:
                self._without_kv.append(handoff)
                self._admit_without_kv(handoff)
            else:
                self._admit(handoff, blocks, handoff.kv_tokens)
        self._worker.control.send({"type": "ack", "request": job.request, "attempt": job.attempt})

    def _check(self, handoff: Handoff) -> None:
        expected = (self._worker.plan.hash, kv_format(self._worker.spec.dtype))
        got = (handoff.plan_hash, handoff.kv_format)
        if got != expected:
            raise ReplicaError(
                "a hand-off from another model",
                where=handoff.job.request,
                expected=expected,
                got=got,
            )

    def _admit(self, handoff: Handoff, blocks: list[int], kv_tokens: int) -> None:
        job = handoff.job
        assert job.prompt_ids is not None
        sequence = self._worker.sequence(job, job.prompt_ids)
        sequence.blocks = blocks
        sequence.kv_tokens = min(kv_tokens, len(blocks) * BLOCK_TOKENS)
        self._decoder.admit(sequence)

    def _admit_without_kv(self, handoff: Handoff) -> None:
        """The KV is lost: its lease ran out, or its first owner died with it. Compute it again."""
        job = handoff.job
        assert job.prompt_ids is not None
        tokens = len(job.prompt_ids) + job.params.max_tokens - 1
        try:
            blocks = self._pool.take(job.request, job.attempt, tokens)
        except RequestError as error:
            self._worker.refuse(job, error)
            blocks = []
        if blocks is None:
            return  # not now; asked again when some are free
        self._without_kv.remove(handoff)
        if blocks:
            self._admit(handoff, blocks, 0)

    def _cancel(self, request: str) -> None:
        self._without_kv = [h for h in self._without_kv if h.job.request != request]
        if self._decoder.remove(request) is not None:
            self._let_go(request)

    def _let_go(self, request: str) -> None:
        self._client.drop(request)
        self._seen.pop(request, None)
