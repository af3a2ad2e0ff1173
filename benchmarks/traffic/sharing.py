"""What models take of a device that they share, reckoned as an endpoint does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldframe.benchmarks.traffic.simulate import Sharing, Takes
from coldframe.runtime.endpoint.served import memory_to_share
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.sizing import ModelFacts, context_bytes, kv_blocks

__all__ = ["Shared", "sharing", "sharing_of_weights"]


@dataclass(frozen=True, slots=True)
class Shared:
    """A device's memory, and what is said of what models take of it.

    Args:
        memory: What they have together, in bytes.
        kv: For KV of each; None for the endpoint's default.
        device: `cpu` or `cuda:N`: on a GPU weights and contexts leave for host memory while a model
            is parked; where they are in that already they stay.
        host: Bytes of the host's memory for weights that are parked there; None for no limit.
    """

    memory: int
    kv: int | None
    device: str
    host: int | None = None

    @property
    def options(self) -> ReplicaOptions:
        """What a replica is to be within it."""
        options = ReplicaOptions("", device=self.device, kv_bytes=self.kv)
        return memory_to_share(options, 2, self.memory, lambda: self.memory)[1]

    def takes(self, weights: int, kv: int) -> Takes:
        """What a model takes with so many bytes of weights and of KV."""
        options = self.options
        kept = weights + max(context_bytes(options, each) for each in options.devices)
        stays = self.device == CPU
        return Takes(kept + kv, kept if stays else 0, 0 if stays else weights)


def sharing(models: Sequence[Path], shared: Shared) -> Sharing:
    """What checkpoints take of a device's memory.

    Args:
        models: Their directories, one for each model.
        shared: The device.

    Raises:
        ColdframeError: One is no model that can be served, or there is no memory for its KV.
    """
    kv_bytes, found = shared.options.kv_bytes, {}
    for model in dict.fromkeys(models):
        facts = ModelFacts(str(model))
        block, blocks = kv_blocks(facts.spec, kv_bytes, available=shared.memory)
        found[model] = shared.takes(facts.weights_bytes or 0, block * blocks)
    return Sharing(shared.memory, [found[model] for model in models], shared.host)


def sharing_of_weights(weights: Sequence[int], shared: Shared) -> Sharing:
    """What models of so many bytes of weights take of a device's memory.

    Args:
        weights: Of each, in their order; further ones have as many as the last.
        shared: The device.
    """
    kv = shared.options.kv_bytes or 0
    return Sharing(shared.memory, [shared.takes(size, kv) for size in weights], shared.host)
