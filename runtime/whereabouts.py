"""What a served model has here: for whoever must say where it would start fastest.

    {
      "state": "zero" | "starting" | "ready" | "parked" | "draining" | "failed",
      "device": where its replicas compute,
      "memory_available": bytes that nobody has there, or null,
      "fingerprint": the checkpoint's, or null while it is not known,
      "weights": {"bytes", "at": "memory" | "page_cache" | "disk" | "elsewhere", "cached": bytes},
      "image": whether one fits that workers would be restored from,
      "last_start": {"ttft_s", "tier"} of the last one that made a token, or null
    }

It looks at files, but never for long, and not again for a while.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.location import Directory, parse_location
from coldframe.loader.sources.file import FileSource
from coldframe.runtime.creating import store_of
from coldframe.runtime.device_choice import CPU, kind_of
from coldframe.runtime.options import ReplicaOptions
from coldframe.snapshot.choose import choose
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import images_are_there

if TYPE_CHECKING:
    from coldframe.runtime.supervisor import Supervisor

__all__ = ["Whereabouts"]

_KEPT_S = 10.0
_IN_MEMORY = ("ready", "parked", "draining")
_MOSTLY = 0.9
"""What has this share in the page cache is mapped; see `loader.load`."""


class Whereabouts:
    """What is told of each model."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, dict[str, Any]]] = {}

    def of(self, name: str, supervisor: Supervisor) -> dict[str, Any]:
        """What there is of one.

        Args:
            name: As clients call it.
            supervisor: Of its replicas.
        """
        state = supervisor.load_state()
        options = supervisor.options
        at, files = self._files.get(name, (0.0, {}))
        if not files or time.monotonic() - at > _KEPT_S:
            files = _files(options)
            self._files[name] = time.monotonic(), files
        weights = dict(files["weights"])
        if state.phase in _IN_MEMORY:
            weights["at"] = "memory"
        log = supervisor.start_log
        started = None
        if log.first_token_ns is not None:
            started = {"ttft_s": log.first_token_s, "tier": state.tier}
        on_cpu = options.device == CPU
        return {
            **files,
            "state": state.phase,
            "device": options.device,
            # A driver is not asked for this: that would take a context of its own.
            "memory_available": memory_available() if on_cpu else None,
            "weights": weights,
            "last_start": started,
        }


def _files(options: ReplicaOptions) -> dict[str, Any]:
    """What lies on disks here."""
    weights: dict[str, Any] = {"bytes": None, "at": "elsewhere", "cached": 0}
    found: dict[str, Any] = {"fingerprint": None, "weights": weights, "image": False}
    place = parse_location(options.model)
    if not isinstance(place, Directory):
        return found
    try:
        checkpoint = Checkpoint.open(place.path)
        size = sum(shard.size for shard in checkpoint.shards)
        source = FileSource(checkpoint.shards)
        try:
            cached = source.cached_bytes()
        finally:
            source.close()
        weights["bytes"] = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        weights["cached"] = cached
        weights["at"] = "page_cache" if cached >= _MOSTLY * size else "disk"
        found["fingerprint"] = checkpoint.fingerprint
        found["image"] = _image(options, place.path, checkpoint)
    except ColdframeError:  # it is told where the model is loaded
        return found
    return found


def _image(options: ReplicaOptions, directory: str, checkpoint: Checkpoint) -> bool:
    """Whether one fits, as far as its manifest tells."""
    snapshot = options.snapshot
    # A bucket would have to be waited for.
    if snapshot.mode == "off" or "://" in snapshot.store or not images_are_there(snapshot.store):
        return False
    images, _ = store_of(snapshot).manifests()
    key, here = (
        ModelKey.of(directory, checkpoint.tensors),
        Machine.here(device=kind_of(options.device)),
    )
    return choose(images, here, model=key, name=options.model).manifest is not None
