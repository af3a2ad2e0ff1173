"""Native prefill and decode over a real memory service, in the test's own process.

What workers do with a request, without their processes: KV blocks from the ledger, computed by the
native engine, handed over as a `Handoff`, and taken up again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.engine.decode import Decoder
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.prefill import Prefiller
from coldframe.runtime.engine.sequence import Sequence as Request
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.worker.handoff import Handoff, Job
from coldframe.runtime.worker.kvpool import KvPool
from coldframe.runtime.worker.prefix import kv_format
from coldframe.runtime.worker.tensors import tensor_over, tensors_of, torch_dtypes


class Silent:
    """A text stream for requests whose text nobody reads."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> tuple[str, bool]:
        return "", False

    def spell(self, token: int) -> bytes:
        return b""


class Native:
    """A memory service, and a native engine beside it.

    Args:
        model: The checkpoint.
        run_dir: Where the service's socket is to be; a short path.
        blocks: KV blocks of its arena.
        lease_s: See `BlockLedger`.
    """

    def __init__(self, model: Path, run_dir: Path, blocks: int = 64, lease_s: float = 30.0) -> None:
        self.launch = Launch(ReplicaOptions(str(model), run_dir=str(run_dir)), Recorder("front"))
        self._memory = self.launch.memories[0].channel
        config = json.loads((model / "config.json").read_text())
        shape = ModelSpec.from_config(config)
        dtype = torch_dtypes()[shape.dtype]
        size = shape.kv_block_bytes(dtype.itemsize, BLOCK_TOKENS)
        self._memory.send({"type": "kv", "block_bytes": size, "blocks": blocks, "lease_s": lease_s})
        self._await("listening")
        self.path = os.path.join(self.launch.run_dir, "memory.sock")
        self.client = MemoryClient(Channel.connect(self.path), "native")
        plan, weights, kv = self.client.wait_arenas()
        self.plan, self.config = plan, config
        self.spec = ModelSpec.from_config(config, plan.placements)
        memory = tensor_over(kv.reservation.address, kv.nbytes, kv.reservation.dlpack_device)
        self.cache = KVCache(memory, self.spec, dtype, blocks, BLOCK_TOKENS)
        for stage in plan.stages:
            self.client.wait_stage(stage.index)
        self.model = Model(self.spec, tensors_of(plan, weights), self.cache)
        self.pool = KvPool(self.client, blocks, BLOCK_TOKENS, "cpu")
        self.blocks: dict[str, list[int]] = {}

    def close(self) -> None:
        self.client.close()
        self.launch.close()

    def open(self, name: str) -> None:
        """A request comes to life, as the front's router has it."""
        self._memory.send({"type": "open", "request": name})

    def release(self, name: str) -> None:
        self._memory.send({"type": "release", "request": name})

    def job(self, name: str, prompt: Sequence[int], most: int = 17) -> Job:
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        return Job(name, 0, params, prompt_ids=tuple(prompt))

    def prefill(self, name: str, prompt: Sequence[int], most: int = 17) -> Handoff:
        """A request with its KV in the arena, held by nobody."""
        job = self.job(name, prompt, most)
        self.open(name)
        request = self._request(job)
        self._take(request)
        prefiller = Prefiller(self.model, lambda _: True)
        prefiller.admit(request)
        while not (done := prefiller.advance()):
            pass
        assert [sequence for sequence, _ in done] == [request]
        self.pool.hand_over(request)
        self.blocks[name] = list(request.blocks)
        made = Job(
            name, 0, job.params, prompt_ids=tuple(prompt), generated_ids=(*request.generated_ids,)
        )
        return Handoff(
            made,
            self.plan.fingerprint,
            kv_format(self.spec.dtype),
            tuple(request.blocks),
            request.kv_tokens,
            "cpu",
        )

    def decode(self, handoff: Handoff) -> tuple[list[int], int]:
        """Goes on with a request: all its tokens, and of how many the KV was there."""
        request = self._request(handoff.job)
        assert self.pool.claim(request, handoff.kv_tokens, handoff.domain), "the KV is lost"
        there = request.kv_tokens
        decoder = Decoder(self.model)
        decoder.admit(request)
        while len(decoder):
            decoder.step()
        self.pool.finish(request)
        return list(request.generated_ids), there

    def poison(self, name: str) -> None:
        """Makes the KV of a request another."""
        for block in self.blocks[name]:
            self.cache.pages[block].mul_(-1.5)

    def used(self) -> int:
        """Blocks that are some request's."""
        self._memory.send({"type": "usage"})
        return self._await("usage")["kv_used"]

    def wait_used(self, blocks: int, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while (used := self.used()) != blocks:
            assert time.monotonic() < deadline, f"{used} blocks in use, not {blocks}"
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends the memory service with no chance to say anything."""
        self.launch.memories[0].child.kill()

    def _request(self, job: Job) -> Request:
        ids, generated = job.prompt_ids or (), job.generated_ids
        return Request(job.request, job.attempt, ids, generated, job.params, Silent(), ())

    def _take(self, request: Request) -> None:
        deadline = time.monotonic() + 10
        while not self.pool.take(request):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _await(self, kind: str) -> dict:
        while (message := self._memory.recv(timeout=20)) is not None:
            for fd in message.fds:
                os.close(fd)
            if message.kind == kind:
                return message.body
        raise AssertionError(f"the memory service is gone before its {kind!r}")
