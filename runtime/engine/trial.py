"""Whether steps that are padded or replayed compute what they should: tried with real ones.

Whoever a step is tried for gets the logits of one done the ordinary way, kernel by kernel.

That a kernel takes the bucket's bounds for the sequences' own shows when the first padded step is
held against the same one without padding. And what is replayed works from the numbers of the step
before it, in a KV without what that has written, and has to come to the same logits. So a replay
whose kernels got something from the host that was true once, or that works in the wrong place
within the memory of this process, is found out before anybody is answered by it. One that touches
an address with nothing behind it cannot be: it takes the device's context, and with it the process.
So whoever watches over the process is told what is tried before it is, and when that is over.

A replay that is right is also to be worth it: where a step is faster kernel by kernel and without
padding, as it may be where all keys of a bucket are copied, its bucket is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from coldframe.loader.errors import DeviceError, DeviceLost, RequestError
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.capture import Replay
from coldframe.runtime.engine.device_errors import as_device_error
from coldframe.runtime.engine.fixed import FixedSteps
from coldframe.runtime.engine.held import HeldSteps
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.wanted import Wanted

__all__ = ["CAPTURED", "REBUILT", "Stopwatch", "Trials", "as_refusal", "try_padding", "try_replay"]

REBUILT, CAPTURED = "rebuilt", "captured"
"""What is tried: a step from an archive, or one of this process's own."""

Stopwatch = Callable[[], Callable[[], float]]
"""Starts to measure; what it gives says how many seconds it has been (see `device.stopwatch`)."""

_SLOWER = 1.1
"""How many times as long as a step kernel by kernel a replay may take."""
_MISFITS = 2
"""Buckets whose padded steps compute something else, behind which padding is not trusted."""

_DRIFT = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 1e-3}
"""How far a row of logits may be from the one of another kernel, relative to its length: several
times what rounding makes of it, and a fraction of what one wrong key does."""

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Relative and absolute. The kernels are the same, and so are the logits, to the bit; but for a
library that sums in another order for another workspace."""


class Trials:
    """Tries a model's steps before anybody is answered by them.

    Args:
        steps: The padded steps.
        model: The model.
        held: What is replayed; what is not right is set aside.
        wanted: Is told of what is not to be captured, or not again.
        stopwatch: Measures what the device does; None where its time says nothing.

    Attributes:
        tell: Is called with what is tried, before it is, and with "" when that is over. It is not
            where the device is lost in between.
        hopeless: Whether padding computes something else, for more than one bucket.
    """

    def __init__(
        self,
        steps: FixedSteps,
        model: Model,
        held: HeldSteps,
        wanted: Wanted,
        stopwatch: Stopwatch | None,
    ) -> None:
        self.tell: Callable[[str], None] = lambda what: None
        self._steps = steps
        self._model = model
        self._held = held
        self._wanted = wanted
        self._stopwatch = stopwatch
        self._padded: set[Bucket] = set()
        self._misfits = 0

    @property
    def hopeless(self) -> bool:
        return self._misfits >= _MISFITS

    def trusts_padding(self, bucket: Bucket) -> bool:
        """Whether padded steps of a bucket are right: where one was not, each has to show it."""
        return bucket in self._padded or (bool(self._padded) and not self._misfits)

    def padding(self, bucket: Bucket, chunks: Sequence[Chunk]) -> Tensor:
        """The logits of a step, and whether those of a padded one are the same."""
        with self._telling(CAPTURED):
            logits, complaint = try_padding(self._steps, bucket, self._model, chunks)
        if complaint is None:
            self._padded.add(bucket)
        else:
            self._misfits += 1
            self._wanted.leave(bucket, complaint)
            self._held.set_aside(bucket)
        return logits

    def replay(self, bucket: Bucket, replay: Replay, chunks: Sequence[Chunk]) -> Tensor:
        """The logits of a step, and whether its replay is right, and worth it.

        Args:
            bucket: Which step.
            replay: Does it again.
            chunks: What the step is to be.

        Raises:
            DeviceLost: The device broke.
        """
        rebuilt, dtype, slow = bucket in self._held.rebuilt, self._model.kv.dtype, None
        with self._telling(REBUILT if rebuilt else CAPTURED):
            logits, complaint = try_replay(self._steps, bucket, replay, chunks, dtype)
            if complaint is None and self._stopwatch is not None:
                slow = self._slower(self._stopwatch, bucket, replay, chunks)
        if complaint is None and slow is None:
            self._held.trusted.add(bucket)
            return logits
        self._held.set_aside(bucket)
        if slow is not None:
            self._wanted.leave(bucket, slow)
        elif complaint is not None and rebuilt:  # it is captured here instead
            self._wanted.refused[bucket] = complaint
        elif complaint is not None:
            self._wanted.refuse(bucket, complaint)
        return logits

    @torch.inference_mode()
    def _slower(
        self, stopwatch: Stopwatch, bucket: Bucket, replay: Replay, chunks: Sequence[Chunk]
    ) -> DeviceError | None:
        """Why a replay is not worth it, if it is not: each way the better one of two."""

        def replayed() -> None:
            self._steps.fill(bucket, chunks)
            replay.replay()

        def eager() -> None:
            self._model.forward(self._model.batch(chunks))

        def seconds(step: Callable[[], None]) -> float:
            elapsed = stopwatch()
            step()
            return elapsed()

        # The eager ones are the last to write keys and values, as they are where this is refused.
        ours = min(seconds(replayed) for _ in range(2))
        plain = min(seconds(eager) for _ in range(2))
        if ours <= _SLOWER * plain:
            return None
        return DeviceError(
            "a replayed step is slower than one kernel by kernel",
            where=f"a replayed decode step of {bucket}",
            expected=f"at most {_SLOWER:g} times {plain * 1e3:.3f} ms",
            got=f"{ours * 1e3:.3f} ms",
            hint="Its steps are computed kernel by kernel.",
        )

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        self.tell(what)
        try:
            yield
        except RequestError:  # nothing was tried
            self.tell("")
            raise
        self.tell("")


@torch.inference_mode()
def try_padding(
    steps: FixedSteps, bucket: Bucket, model: Model, chunks: Sequence[Chunk]
) -> tuple[Tensor, DeviceError | None]:
    """Does a step as it is, and padded.

    Args:
        steps: The padded steps.
        bucket: That of the step.
        model: The model.
        chunks: What the step is to be.

    Returns:
        The logits, and what is wrong with the padded ones.
    """
    expected = model.forward(model.batch(chunks))
    steps.fill(bucket, chunks)
    steps.run(bucket)
    off = steps.logits(len(chunks)) - expected
    near = _DRIFT[model.kv.dtype]
    furthest = float((off.norm(dim=-1) / expected.norm(dim=-1)).max())
    if furthest <= near:  # and is a number
        return expected, None
    complaint = DeviceError(
        "a padded decode step computes something else",
        where=str(bucket),
        expected=f"logits within {near}",
        got=f"{furthest} off",
        hint="Its steps are computed kernel by kernel.",
    )
    return model.forward(model.batch(chunks)), complaint


@torch.inference_mode()
def try_replay(
    steps: FixedSteps,
    bucket: Bucket,
    replay: Replay,
    chunks: Sequence[Chunk],
    dtype: torch.dtype,
) -> tuple[Tensor, DeviceError | None]:
    """Does a step kernel by kernel, and then by a replay.

    Args:
        steps: The steps.
        bucket: Which.
        replay: Does it again.
        chunks: What the step is to be.
        dtype: What the model computes in.

    Returns:
        The logits, and what is wrong with the replay.

    Raises:
        DeviceLost: The device broke.
    """
    steps.fill(bucket, chunks)
    steps.run(bucket)
    expected = steps.logits(len(chunks)).clone()
    steps.forget(chunks)
    complaint = _complaint(steps, bucket, replay, expected, _TOLERANCE[dtype])
    if complaint is not None:
        steps.run(bucket)  # what it may have written to the KV is not to stay
    return expected, complaint


def _complaint(
    steps: FixedSteps, bucket: Bucket, replay: Replay, expected: Tensor, near: float
) -> DeviceError | None:
    where = f"a replayed decode step of {bucket}"
    try:
        replay.replay()
        found = steps.logits(len(expected))
        if torch.allclose(found, expected, rtol=near, atol=near):
            return None
        off = float((found - expected).abs().max())
    except Exception as error:  # noqa: BLE001 - whatever it fails of, steps go on
        return as_refusal(error, where)
    return DeviceError(
        "a replayed step computes something else",
        where=where,
        expected=f"logits within {near}",
        got=f"{off} off",
        hint="Its steps are computed kernel by kernel.",
    )


def as_refusal(error: Exception, where: str) -> DeviceError:
    """Why a step is not replayed, with the driver's own name for it.

    Args:
        error: What was raised.
        where: Which step.

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
        hint="Its steps are computed kernel by kernel.",
    )
