"""Decode steps that were captured once and are replayed since.

A step of one token for each of a few sequences is hundreds of small kernels, and asking for them
one by one takes longer than they do. So such steps are padded to a bucket (`buckets.py`), and each
bucket is captured once, over addresses that do not move (`fixed.py`). From then on a step is one
copy of its numbers, and one call. Any other step is computed as it always was.

Captures are made lazily, never before somebody has a first token, and between two steps at most
one: of a bucket that is in use, right after a step that was run in the same form, so that nothing
happens in a capture for the first time. While nobody asks, the others follow, the smallest first.
A process that is to be frozen makes all of them at once.

Whatever is to be replayed is held against the step that it stands for when it is first needed
(`trial.py`). What fails is not tried again: its steps are computed kernel by kernel, and the reason
is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from coldframe.loader.errors import DeviceError
from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.buckets import Bucket, bucket_for, buckets
from coldframe.runtime.engine.capture import Captured, Capturer, Replay
from coldframe.runtime.engine.fixed import FixedSteps
from coldframe.runtime.engine.held import HeldSteps
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.trial import Stopwatch, Trials, as_refusal
from coldframe.runtime.engine.wanted import Wanted

__all__ = ["MOST_GRAPHS", "StepGraphs"]

MOST_GRAPHS = 64
"""Steps that are captured at most. Each takes some of the device's memory for itself, besides what
all of them compute in; the longest ones, which gain least, are left out."""


class StepGraphs:
    """A model's decode steps, as far as they are captured.

    Args:
        model: The model, which computes all other steps; with the kernel that it attends by.
        capturer: What captures.
        most: Sequences in the largest step.
        limit: Steps to be captured at most.
        recorder: Gets a span `graph_capture` for each.
        stopwatch: Measures whether replays are worth it; None where time says nothing.

    Attributes:
        buckets: Those that are to be captured sooner or later, the smallest first.
        replayed: How many steps were replayed so far.
        due: The bucket that the last step has called for.
    """

    def __init__(
        self,
        model: Model,
        capturer: Capturer,
        *,
        most: int = 64,
        limit: int = MOST_GRAPHS,
        recorder: Recorder | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._model = model
        self._capturer = capturer
        self._most = most
        self._recorder = recorder
        self._weights = model.weights
        self._steps = FixedSteps(model, most)
        every = buckets(most, self._steps.context_blocks, model.kv.blocks)
        self.buckets = tuple(bucket for bucket in every if self._steps.fits(bucket))[:limit]
        self.replayed = 0
        self._wanted = Wanted(self.buckets)
        self._held = HeldSteps()
        self._trials = Trials(self._steps, model, self._held, self._wanted, stopwatch)
        self.due: Bucket | None = None
        self._stepped = False
        """Whether somebody has got a token since the weights came."""

    @property
    def captured(self) -> dict[Bucket, Captured]:
        """What was captured here, by bucket."""
        return dict(self._held.captured)

    @property
    def dropped(self) -> bool:
        """See `HeldSteps`."""
        return self._held.dropped

    @property
    def refused(self) -> dict[Bucket, DeviceError]:
        """Why steps of a bucket are not captured, or what was captured is not replayed."""
        return dict(self._wanted.refused)

    @property
    def scratch(self) -> tuple[int, int] | None:
        """Address and length of what steps know of beside weights and KV; see `Capturer`."""
        return self._capturer.scratch

    @property
    def own_bytes(self) -> int:
        """What they have of the device besides torch's; see `Capturer`."""
        return self._capturer.own_bytes

    def report_to(self, recorder: Recorder) -> None:
        """Has spans go to another recorder, as in a process that was made of this one."""
        self._recorder = recorder

    def tell_trials(self, tell: Callable[[str], None]) -> None:
        """Has somebody hear what is tried, before it is; see `Trials`."""
        self._trials.tell = tell

    @property
    def places(self) -> tuple[int, int]:
        """The addresses of a step's numbers and of its logits, once something is captured."""
        return self._steps.places

    # -- a step ----------------------------------------------------------------------------------

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """The logits of a step, `[S, vocab_size]`, float32; to be read before the next step.

        Args:
            chunks: As many as there are sequences.

        Raises:
            RequestError: A sequence's tokens do not fit its blocks.
            DeviceLost: The device broke.
        """
        self._follow_weights()
        self._stepped = True
        bucket = self._bucket_of(chunks)
        if bucket is None:
            return self._model.forward(self._model.batch(chunks))
        replay = self._held.get(bucket)
        if replay is None:
            if not self._wanted.use(bucket) or not self._ready():
                return self._model.forward(self._model.batch(chunks))
            self.due = bucket
        if not self._trials.trusts_padding(bucket):
            logits = self._trials.padding(bucket, chunks)
            if self._trials.hopeless:
                self._close(self._wanted.refused[bucket])
            return logits
        if replay is not None and bucket not in self._held.trusted:
            return self._trials.replay(bucket, replay, chunks)
        self._steps.fill(bucket, chunks)
        if replay is None:
            self._steps.run(bucket)
        else:
            replay.replay()
            self.replayed += 1
        return self._steps.logits(len(chunks))

    def _bucket_of(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The bucket of a step; None where it has none that is or will be captured."""
        if any(len(chunk.token_ids) != 1 for chunk in chunks):
            return None
        blocks = max(chunk.start for chunk in chunks) // self._model.kv.block_tokens + 1
        bucket = bucket_for(len(chunks), blocks, self._most)
        return bucket if bucket in self._wanted or bucket in self._held.rebuilt else None

    # -- captures --------------------------------------------------------------------------------

    def between_steps(self) -> bool:
        """Captures what the last step has called for: to be called once its tokens are sent.

        Returns:
            Whether there was anything.

        Raises:
            DeviceLost: The device broke.
        """
        self._follow_weights()
        bucket, self.due = self.due, None
        if bucket is None or bucket not in self._missing():
            return False
        self._capture(bucket, "in use")
        return True

    def while_idle(self) -> bool:
        """Captures one more step, while nobody waits for one.

        Returns:
            Whether it did. There is none to capture before somebody has had a token.

        Raises:
            DeviceLost: The device broke.
        """
        self._follow_weights()
        missing = self._missing() if self._stepped else []
        if not missing or not self._ready():
            return False
        self._capture(missing[0], "while idle", warm=True)
        return True

    def capture_all(self) -> int:
        """Captures all that is not captured yet; weights must be mapped, and may be anything.

        Nothing is written to the model's KV, and none of it needs memory behind it.

        Returns:
            How many steps are captured now.

        Raises:
            DeviceLost: The device broke.
        """
        self._follow_weights()
        while (missing := self._missing()) and self._ready():
            self._capture(missing[0], "beforehand", warm=True)
        return len(self._held.captured)

    def install(self, bucket: Bucket, replay: Replay, nbytes: int) -> None:
        """Takes a step that was captured elsewhere and rebuilt.

        Args:
            bucket: Of which it is.
            replay: Does it. What it knows of lies where it does here.
            nbytes: Of `scratch`, what it may touch.

        Raises:
            DeviceError: There is no memory for it, or not at that place.
        """
        self._follow_weights()
        if not self._ready():
            assert self._wanted.closed is not None
            raise self._wanted.closed
        self._capturer.reach(nbytes)
        if self.due == bucket:
            self.due = None
        if bucket in self._held.captured:
            replay.close()
        else:
            self._held.rebuilt[bucket] = replay

    def weights_leave(self) -> None:
        """The weights leave, and come back to the same place: captures wait for a token again."""
        self._stepped = False
        self.due = None

    def _missing(self) -> list[Bucket]:
        return self._wanted.missing(self._held.buckets)

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
                self._steps.warm_up(bucket)
            captured = self._capturer.capture(lambda: self._steps.run(bucket))
        except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
            refusal = as_refusal(error, f"a decode step of {bucket}")
            self._wanted.refuse(bucket, refusal)
            notes = [f"{bucket} failed: {refusal.got}"]
        else:
            self._held.captured[bucket] = captured
            self._wanted.succeeded()
            count = len(self._held.captured)
            notes = [f"{bucket}, {why}", f"{count} so far", self._capturer.note]
        if self._recorder is not None:
            self._recorder.add("graph_capture", started, note="; ".join(filter(None, notes)))

    # -- what steps know of ----------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether what steps share has its place; nothing is captured where there is none."""
        if not self._steps.placed and self._wanted.closed is None:
            try:
                self._steps.place(self._capturer.place)
            except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
                self._close(as_refusal(error, "memory for decode steps"))
        return self._wanted.closed is None

    def _follow_weights(self) -> None:
        """Forgets all that is captured where the weights lie somewhere else now."""
        if self._model.weights is not self._weights:
            self.drop()
            self._weights = self._model.weights

    def _close(self, why: DeviceError) -> None:
        """Has every step computed kernel by kernel from now on."""
        self._wanted.close(why)
        self.drop()

    def drop(self) -> None:
        """Forgets all that is captured; what is still wanted is captured anew."""
        self._model.settle()
        self._held.drop()
        self.due = None
        self._capturer.drop()
