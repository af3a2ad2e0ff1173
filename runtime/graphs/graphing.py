"""What captures a decode worker's steps, where it computes on a device that can."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coldframe.loader.devices import open_device
from coldframe.runtime.engine.capture import Capturer, CudaCapturer
from coldframe.runtime.engine.decode import MOST
from coldframe.runtime.engine.device import stopwatch
from coldframe.runtime.engine.graphs import StepGraphs

if TYPE_CHECKING:
    import torch

    from coldframe.loader.devices.scratch import Scratch
    from coldframe.loader.timeline import Recorder
    from coldframe.runtime.engine.model import Model

__all__ = ["capturer_for", "graphs_for"]


def graphs_for(model: Model, device: str, recorder: Recorder | None = None) -> StepGraphs | None:
    """A model's decode steps, none of them captured yet; None where nothing captures them.

    Nothing is asked of the device by this.

    Args:
        model: The model, with the kernel that it attends by.
        device: Where it computes, by its name on the command line.
        recorder: Gets the spans.
    """
    capturer = capturer_for(model.device, device)
    if capturer is None:
        return None
    # Where the device is not one of torch's, its time is that of whatever stands for it.
    watch = partial(stopwatch, model.device) if model.device.type == "cuda" else None
    return StepGraphs(model, capturer, most=MOST, recorder=recorder, stopwatch=watch)


def capturer_for(where: torch.device, device: str) -> Capturer | None:
    """What captures on a device; None on the CPU.

    Args:
        where: The device, as torch calls it.
        device: As it is called on the command line.
    """
    return CudaCapturer(where, lambda: _scratch(device)) if where.type == "cuda" else None


def _scratch(device: str) -> Scratch:
    from coldframe.loader.devices.cuda import CudaDevice

    gpu = open_device(device)
    assert isinstance(gpu, CudaDevice)
    return gpu.scratch()
