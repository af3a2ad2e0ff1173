"""The process groups of an engine that is alone: ended before a freeze, made anew in each clone.

vLLM keeps two groups for each of its kinds of parallelism, and one for the world, also where the
world is one process. Each has three threads of gloo's, an event loop and a socket that listens, and
none of that can be in an image. Nothing is ever sent over them: vLLM's coordinators return early
where they have one rank. They are there to be asked, so a clone gets new ones.
"""

from __future__ import annotations

import gc
from typing import Any

from coldframe.loader.errors import SnapshotError

__all__ = ["begin_groups", "end_groups"]

_GROUPS = ("device_group", "cpu_group")


def end_groups() -> list[Any]:
    """Ends torch's process groups: the coordinators that `begin_groups` is to give new ones.

    Raises:
        SnapshotError: The world is not one process, or a group lives on somewhere.
    """
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    if dist.get_world_size() != 1:
        raise SnapshotError(
            "the engine cannot be frozen: its ranks talk to each other over open connections",
            where="tensor, pipeline or data parallelism",
            expected="one process",
            got=f"{dist.get_world_size()} ranks",
            hint="Engines of several ranks start fresh.",
        )
    found = (reference() for reference in parallel_state._groups.values())
    coordinators = [coordinator for coordinator in found if coordinator is not None]
    for coordinator in coordinators:
        for name in _GROUPS:
            setattr(coordinator, name, None)
    dist.destroy_process_group()
    gc.collect()  # a group's threads end with its last reference
    return coordinators


def begin_groups(coordinators: list[Any]) -> None:
    """Makes the world's group and each coordinator's two, in a clone.

    Args:
        coordinators: What `end_groups` gave.
    """
    import torch.distributed as dist

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    for coordinator in coordinators:
        backends = (coordinator.torch_distributed_backend, "gloo")
        for name, backend in zip(_GROUPS, backends, strict=True):
            setattr(coordinator, name, dist.new_group([0], backend=backend))
