"""Decode steps that were captured once and are replayed since.

A step of one token for each of a few sequences is hundreds of small kernels, and asking for them
one by one takes longer than they do. So such steps are padded to a bucket (`buckets.py`), and each
bucket is captured once, over addresses that do not move: weights, KV, and a place for the step's
numbers and its logits. From then on a step is one copy of its numbers, and one call. Any other
step is computed as it always was.

Captures are made lazily, never before somebody has a first token, and between two steps at most
one: of a bucket that is in use, right after a step that was run in the same form, so that nothing
happens in a capture for the first time. While nobody asks, the others follow, the smallest first.
A process that is to be frozen makes all of them at once.

What fails is not tried again: its steps are computed kernel by kernel, and the reason is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from coldframe.loader.errors import DeviceError, DeviceLost
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.buckets import Bucket, bucket_for, buckets, largest
from coldframe.runtime.engine.capture import Captured, Capturer
from coldframe.runtime.engine.device_errors import as_device_error
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.padded import PaddedStep

__all__ = ["MOST_GRAPHS", "Replay", "StepGraphs"]

MOST_GRAPHS = 64
"""Steps that are captured at most. Each takes some of the device's memory for itself, besides what
all of them compute in; the longest ones, which gain least, are left out."""
_USES = 2
"""How often a bucket comes before it is captured: most that come twice go on coming."""
_GATHERED = 256 << 20
"""Bytes of keys and values that a captured step may copy in a layer, where no kernel reads them
where they lie: those of the whole bucket, however long its sequences are."""
_FAILURES = 3
"""Failed captures in a row behind which no other is tried."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Relative and absolute: how far logits of a rebuilt step may be from those that it should make."""


class Replay(Protocol):
    """A step that was captured elsewhere, and rebuilt here over the same addresses."""

    def replay(self) -> None:
        """Queues it on the device's current stream."""
        ...


class StepGraphs:
    """A model's decode steps, as far as they are captured.

    Args:
        model: The model, which computes all other steps; with the kernel that it attends by.
        capturer: What captures.
        most: Sequences in the largest step.
        limit: Steps to be captured at most.
        recorder: Gets a span `graph_capture` for each.

    Attributes:
        buckets: Those that are to be captured sooner or later, the smallest first.
        refused: Why steps of a bucket are not captured, or a rebuilt one was not taken.
        replayed: How many steps were replayed so far.
    """

    def __init__(
        self,
        model: Model,
        capturer: Capturer,
        *,
        most: int = 64,
        limit: int = MOST_GRAPHS,
        recorder: Recorder | None = None,
    ) -> None:
        self._model = model
        self._capturer = capturer
        self._most = most
        self._recorder = recorder
        self._weights = model.weights
        self._context_blocks = -(-model.spec.context_length // model.kv.block_tokens)
        every = buckets(most, self._context_blocks, model.kv.blocks)
        self.buckets = tuple(bucket for bucket in every if self._fits(bucket))[:limit]
        self.refused: dict[Bucket, DeviceError] = {}
        self.replayed = 0
        self._wanted = set(self.buckets)
        self._steps: dict[Bucket, PaddedStep] = {}
        self._graphs: dict[Bucket, Captured] = {}
        self._rebuilt: dict[Bucket, Replay] = {}
        self._untried: set[Bucket] = set()
        """Rebuilt ones that were not held against what they should compute yet."""
        self._uses: Counter[Bucket] = Counter()
        self._due: Bucket | None = None
        self._failures = 0
        self._stepped = False
        """Whether somebody has got a token since the weights came."""
        self._numbers = self._out = torch.empty(0)
        self._placed = False

    @property
    def captured(self) -> dict[Bucket, Captured]:
        """What was captured here, by bucket."""
        return dict(self._graphs)

    @property
    def scratch(self) -> tuple[int, int] | None:
        """Address and length of what steps know of beside weights and KV; see `Capturer`."""
        return self._capturer.scratch

    def report_to(self, recorder: Recorder) -> None:
        """Has spans go to another recorder, as in a process that was made of this one."""
        self._recorder = recorder

    # -- a step ----------------------------------------------------------------------------------

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """The logits of a step, `[S, vocab_size]`, float32; to be read before the next step.

        Args:
            chunks: As many as there are sequences.

        Raises:
            RequestError: A sequence's tokens do not fit its blocks.
            DeviceLost: The device broke.
        """
        if self._model.weights is not self._weights:
            self.drop()
        self._stepped = True
        bucket = self._bucket_of(chunks)
        if bucket is None:
            return self._model.forward(self._model.batch(chunks))
        if bucket in self._untried:
            return self._try(bucket, chunks)
        graph = self._rebuilt.get(bucket) or self._graphs.get(bucket)
        if graph is not None:
            self._fill(bucket, chunks)
            graph.replay()
            self.replayed += 1
            return self._out[: len(chunks)]
        self._uses[bucket] += 1
        if self._uses[bucket] < _USES or not self._place():
            return self._model.forward(self._model.batch(chunks))
        self._due = bucket
        self._fill(bucket, chunks)
        self._run(bucket, self._model)
        return self._out[: len(chunks)]

    def _bucket_of(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The bucket of a step; None where it has none that is or will be captured."""
        if any(len(chunk.token_ids) != 1 for chunk in chunks):
            return None
        blocks = max(chunk.start for chunk in chunks) // self._model.kv.block_tokens + 1
        bucket = bucket_for(len(chunks), blocks, self._most)
        return bucket if bucket in self._wanted or bucket in self._rebuilt else None

    def _fill(self, bucket: Bucket, chunks: Sequence[Chunk]) -> None:
        self._model.kv.clear(self._step(bucket).fill(chunks))

    @torch.inference_mode()
    def _run(self, bucket: Bucket, model: Model) -> None:
        """The step itself, over the numbers that were filled in: what is captured."""
        logits = model.forward(self._step(bucket).batch())
        self._out[: bucket.sequences].copy_(logits)

    def _step(self, bucket: Bucket) -> PaddedStep:
        if bucket not in self._steps:
            self._steps[bucket] = PaddedStep(
                bucket,
                self._numbers,
                block_tokens=self._model.kv.block_tokens,
                windows=self._model.windows,
                ragged=self._model.varlen is not None,
            )
        return self._steps[bucket]

    # -- captures --------------------------------------------------------------------------------

    def between_steps(self) -> None:
        """Captures what the last step has called for, if anything: to be called once it is told.

        Raises:
            DeviceLost: The device broke.
        """
        bucket, self._due = self._due, None
        if bucket is not None and bucket in self._missing():
            self._capture(bucket, "in use")

    def while_idle(self) -> bool:
        """Captures one more step, while nobody waits for one.

        Returns:
            Whether it did. There is none to capture before somebody has had a token.

        Raises:
            DeviceLost: The device broke.
        """
        missing = self._missing() if self._stepped else []
        if not missing or not self._place():
            return False
        bucket = next((bucket for bucket in missing if self._uses[bucket]), missing[0])
        self._capture(bucket, "while idle", warm=True)
        return True

    def capture_all(self) -> int:
        """Captures all that is not captured yet; weights must be mapped, and may be anything.

        Nothing is written to the model's KV, and none of it needs memory behind it.

        Returns:
            How many steps are captured now.

        Raises:
            DeviceLost: The device broke.
        """
        if self._place():
            for bucket in self._missing():
                self._capture(bucket, "beforehand", warm=True)
        return len(self._graphs)

    def weights_leave(self) -> None:
        """The weights leave, and come back to the same place: captures wait for a token again."""
        self._stepped = False
        self._due = None

    def drop(self) -> None:
        """Forgets all that is captured: the weights lie somewhere else now."""
        self._model.settle()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._rebuilt.clear()
        self._untried.clear()
        self._due = None
        self._capturer.drop()
        self._weights = self._model.weights

    def _missing(self) -> list[Bucket]:
        """Those that are to be captured yet, the smallest first."""
        if self._failures >= _FAILURES:
            return []
        there = self._graphs.keys() | self._rebuilt.keys()
        return [b for b in self.buckets if b in self._wanted and b not in there]

    def _capture(self, bucket: Bucket, why: str, *, warm: bool = False) -> None:
        """Captures a step, or keeps why it cannot be.

        Args:
            bucket: Which.
            why: For the timeline.
            warm: Whether it was not just run, and is to be before.
        """
        started = now()
        try:
            if warm:
                self._warm_up(bucket)
            graph = self._capturer.capture(lambda: self._run(bucket, self._model))
        except Exception as error:  # noqa: BLE001 - whatever a capture fails of, steps go on
            self._refuse(bucket, error)
            note = f"{bucket} failed: {self.refused[bucket].got}"
        else:
            self._graphs[bucket] = graph
            self._failures = 0
            note = f"{bucket}, {why}; {len(self._graphs)} so far"
            if self._capturer.note:
                note += f"; {self._capturer.note}"
        if self._recorder is not None:
            self._recorder.add("graph_capture", started, note=note)

    def _warm_up(self, bucket: Bucket) -> None:
        """Runs a step for nobody, over a KV block of its own."""
        kv, spec = self._model.kv, self._model.spec
        nbytes = spec.kv_block_bytes(kv.dtype.itemsize, kv.block_tokens)
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=kv.device)
        self._step(bucket).fill_for_nobody()
        self._run(bucket, self._model.over(KVCache(memory, spec, kv.dtype, 1, kv.block_tokens)))
        self._model.settle()

    def _refuse(self, bucket: Bucket, error: Exception) -> None:
        self._wanted.discard(bucket)
        self._failures += 1
        self.refused[bucket] = _typed(error, f"a decode step of {bucket}")

    # -- steps that were captured elsewhere ------------------------------------------------------

    def install(self, bucket: Bucket, replay: Replay) -> None:
        """Takes a step that was rebuilt; it is tried when it is first needed.

        Args:
            bucket: Of which it is. What it knows of lies where it does here (see `scratch`).
            replay: Does it.

        Raises:
            DeviceError: There is no memory for what steps are told.
        """
        if not self._place():
            raise self.refused[bucket]
        if bucket not in self._graphs:
            self._rebuilt[bucket] = replay
            self._untried.add(bucket)

    def _try(self, bucket: Bucket, chunks: Sequence[Chunk]) -> Tensor:
        """A step as it is computed, and the rebuilt one held against it."""
        self._fill(bucket, chunks)
        self._run(bucket, self._model)
        expected = self._out[: len(chunks)].clone()
        self._untried.discard(bucket)
        complaint = self._complaint(bucket, chunks, expected)
        if complaint is not None:
            del self._rebuilt[bucket]
            self.refused[bucket] = complaint
            self._run(bucket, self._model)  # what it may have written to the KV is not to stay
        return expected

    @torch.inference_mode()
    def _complaint(
        self, bucket: Bucket, chunks: Sequence[Chunk], expected: Tensor
    ) -> DeviceError | None:
        """What is wrong with a rebuilt step, where the right one was just run."""
        unit, near = self._model.kv.block_tokens, _TOLERANCE[self._model.kv.dtype]
        where = f"a rebuilt decode step of {bucket}"
        # Neither keys, values nor logits are to be those that are there already.
        for chunk in chunks:
            self._model.kv.forget(chunk.blocks[chunk.start // unit], chunk.start % unit)
        self._out.fill_(torch.nan)
        try:
            self._rebuilt[bucket].replay()
            found = self._out[: len(chunks)]
            if torch.allclose(found, expected, rtol=near, atol=near):
                return None
        except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
            return _typed(error, where)
        return DeviceError(
            "a rebuilt step computes something else",
            where=where,
            expected=f"logits within {near}",
            got=f"{float((found - expected).abs().max())} off",
            hint="It is captured again.",
        )

    # -- memory ----------------------------------------------------------------------------------

    def _place(self) -> bool:
        """Has what steps are told and make lie where it stays. Whether there is memory for it."""
        if self._placed:
            return True
        if not self._wanted:
            return False
        rows, vocab = self._most, self._model.spec.vocab_size
        numbers = largest(self._most, self._context_blocks).numbers
        try:
            # In this order, so that they lie at the same places in every process.
            self._model.rope.move(self._keep)
            self._numbers = self._capturer.place(numbers * 8).view(torch.int64)
            self._out = self._capturer.place(rows * vocab * 4).view(torch.float32).view(rows, vocab)
        except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
            for bucket in list(self._wanted):
                self._refuse(bucket, error)
            return False
        self._placed = True
        return True

    def _keep(self, tensor: Tensor) -> Tensor:
        there = self._capturer.place(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return there.copy_(tensor)

    def _fits(self, bucket: Bucket) -> bool:
        """Whether a captured step would not copy more keys and values than it may."""
        model = self._model
        if model.varlen is not None and model.varlen.way.paged:
            return True
        blocks = bucket.sequences * bucket.blocks
        layer = model.spec.kv_block_bytes(model.kv.dtype.itemsize, model.kv.block_tokens)
        return blocks * layer // model.spec.layers <= _GATHERED


def _typed(error: Exception, where: str) -> DeviceError:
    """Why a step is not captured, with the driver's own name for it.

    Raises:
        DeviceLost: There is no device any more.
    """
    found = error if isinstance(error, DeviceError) else as_device_error(error, where)
    if isinstance(found, DeviceLost):
        raise found from error
    return found or DeviceError(
        "a decode step cannot be captured",
        where=where,
        got=str(error).partition("\n")[0] or repr(error),
        hint="It is computed kernel by kernel.",
    )
