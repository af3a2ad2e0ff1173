"""Captured steps that the emulated driver has graphs of, to be kept in an archive.

What a step does is written down as ever (`recording`). Its graph is another thing, a kernel that
adds numbers: that an archive brings back what a graph computes is shown where archives are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.graph_calls import GraphCalls
from tests.runtime.engine.recording import Recording, RecordingCapturer
from tests.snapshot.graph_kit import KERNELS, MIX, Device

__all__ = ["GraphCapturer"]


class GraphCapturer(RecordingCapturer):
    """Captures on the CPU, with a graph for each step."""

    _device: Device | None = None

    def capture(self, work: Callable[[], object]) -> Recording:
        recording = super().capture(work)
        if self._device is None:
            self._device = _device()
        graph = self._device.graph()
        self._device.kernel(graph, MIX, (KV_BASE, WEIGHTS_BASE + 64, 5, 128))
        recording.handle = int(graph)
        return recording


def _device() -> Device:
    """This process's emulated GPU, with the kernels and without memory of its own."""
    device: Any = Device.__new__(Device)
    device.driver = Driver.open()
    device.calls = GraphCalls(device.driver)
    device.functions = dict(
        zip(
            (code.name for code in KERNELS),
            device.driver.api.load_module(KERNELS),
            strict=True,
        )
    )
    device._graphs = []
    found: Device = device
    return found
