"""What a served model has here: for whoever must say where it would start fastest.

    {
      "state": "zero" | "starting" | "ready" | "parked" | "draining" | "failed",
      "device": where its replicas compute,
      "memory_available": bytes that nobody has there, or null,
      "fingerprint": the checkpoint's, or null while it is not known,
      "weights": {"bytes", "at": "memory" | "page_cache" | "disk" | "elsewhere", "cached": bytes},
      "image": whether one fits that workers would be restored from,
      "looked": whether files have been looked at: else the four above are not known yet,
      "last_start": {"ttft_s", "tier", "cache"} of the last one that made a token, or null;
                    `cache` is "warm" where weights were mapped, "cold" where they were copied
    }

Files are looked at by a thread, and not again for a while: whoever has tokens to pass on does not
wait for a disk, nor for a mount that never answers.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.sources.file import FileSource
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.frozen.creating import store_of
from coldframe.runtime.machine.device_choice import CPU, kind_of
from coldframe.runtime.machine.probe import MOSTLY
from coldframe.runtime.options import ReplicaOptions
from coldframe.snapshot.choose import choose
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import images_are_there

if TYPE_CHECKING:
    from coldframe.runtime.endpoint.supervisor import Supervisor

__all__ = ["Whereabouts"]

_KEPT_S = 10.0
_IN_MEMORY = ("ready", "parked", "draining")
_CACHE = {"mapped": "warm", "copied": "cold"}


class Whereabouts:
    """What is told of each model."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, dict[str, Any]]] = {}
        self._looking: dict[str, threading.Thread] = {}

    def of(self, name: str, supervisor: Supervisor) -> dict[str, Any]:
        """What there is of one, without waiting for anything.

        Args:
            name: As clients call it.
            supervisor: Of its replicas.
        """
        state = supervisor.load_state()
        options = supervisor.options
        files = self._known(name, options)
        weights = dict(files["weights"])
        if state.phase in _IN_MEMORY:
            weights["at"] = "memory"
        log = supervisor.start_log
        started = None
        if log.first_token_ns is not None:
            cache = _CACHE.get(log.document()["load_mode"])
            started = {"ttft_s": log.first_token_s, "tier": state.tier, "cache": cache}
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

    def _known(self, name: str, options: ReplicaOptions) -> dict[str, Any]:
        """What was last seen of its files; where that is old, a thread looks again."""
        at, files = self._files.get(name, (-_KEPT_S, _nothing()))
        thread = self._looking.get(name)
        if time.monotonic() - at > _KEPT_S and (thread is None or not thread.is_alive()):
            thread = threading.Thread(
                target=self._look, args=(name, options), daemon=True, name="whereabouts"
            )
            self._looking[name] = thread
            thread.start()
        return files

    def _look(self, name: str, options: ReplicaOptions) -> None:
        files = _nothing()
        # What is wrong is told where the model is loaded, and an image by its own command.
        with suppress(ColdframeError, OSError, ValueError, LookupError, TypeError, RecursionError):
            _look_at(options, files)
        files["looked"] = True
        self._files[name] = time.monotonic(), files


def _nothing() -> dict[str, Any]:
    weights: dict[str, Any] = {"bytes": None, "at": "elsewhere", "cached": 0}
    return {"fingerprint": None, "weights": weights, "image": False, "looked": False}


def _look_at(options: ReplicaOptions, found: dict[str, Any]) -> None:
    """What lies on disks here, as far as it can be looked at.

    Raises:
        ColdframeError, OSError, ValueError: The rest cannot be.
    """
    place = parse_location(options.model)
    if isinstance(place, Directory):
        weights = found["weights"]
        checkpoint = Checkpoint.open(place.path)
        size = sum(shard.size for shard in checkpoint.shards)
        source = FileSource(checkpoint.shards)
        try:
            cached = source.cached_bytes()
        finally:
            source.close()
        weights["bytes"] = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        weights["cached"] = cached
        weights["at"] = "page_cache" if cached >= MOSTLY * size else "disk"
        found["fingerprint"] = checkpoint.fingerprint
        found["image"] = _image(options, place.path, checkpoint)


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
