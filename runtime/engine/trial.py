"""Whether steps that are padded or replayed compute what they should: tried with real ones.

Whoever a step is tried for gets the logits of one done the ordinary way, kernel by kernel.

That a kernel takes the bucket's bounds for the sequences' own shows when the first padded step is
held against the same one without padding. And what is replayed works from the numbers of the step
before it, in a KV without what that has written, and has to come to the same logits. So a replay
whose kernels got something from the host that was true once, or whose addresses are not those of
this process, is found out before anybody is answered by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coldframe.loader.errors import DeviceError, DeviceLost
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.capture import Replay
from coldframe.runtime.engine.device_errors import as_device_error
from coldframe.runtime.engine.fixed import FixedSteps
from coldframe.runtime.engine.model import Model

__all__ = ["as_refusal", "try_padding", "try_replay"]

_DRIFT = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 1e-3}
"""How far a row of logits may be from the one of another kernel, relative to its length: several
times what rounding makes of it, and a fraction of what one wrong key does."""

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Relative and absolute. The kernels are the same, and so are the logits, to the bit; but for a
library that sums in another order for another workspace."""


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
        hint="No step is captured.",
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
