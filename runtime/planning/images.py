"""Whether a start would find an image here, and the same image for a scale model of its model.

An image has no weights in it. What ties it to its model is the manifest's key of shapes, so that a
manifest with another key, beside the same objects, restores the same processes over a scale model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.sources.base import Origin
from coldframe.runtime.frozen.creating import store_of
from coldframe.runtime.machine.device_choice import kind_of
from coldframe.runtime.machine.side_process import ask
from coldframe.runtime.options import SnapshotOptions
from coldframe.snapshot.backend import MANIFESTS, OBJECTS
from coldframe.snapshot.check import ENTRY
from coldframe.snapshot.choose import choose
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import images_are_there
from coldframe.snapshot.signing import read_key, sign

__all__ = ["Found", "borrowed", "find_image"]


class Found(NamedTuple):
    """An image that fits, or why there is none."""

    manifest: Manifest | None
    why: str | None


def find_image(
    name: str, origin: Origin, checkpoint: Checkpoint, snapshot: SnapshotOptions, device: str
) -> Found:
    """Looks for one as a start does.

    Args:
        name: MODEL, as it was written.
        origin: Where it is.
        checkpoint: As it was opened there.
        snapshot: Where images are.
        device: Where workers are to compute.
    """
    if not images_are_there(snapshot.store):
        return Found(None, f"no image in {snapshot.store}")
    try:
        found = ask(ENTRY, "snapshots")
        if found["error"] is not None:
            raise ColdframeError.from_wire(found["error"])
        key = None if origin.path is None else ModelKey.of(origin.path, checkpoint.tensors)
        here = Machine.here(device=kind_of(device))
        images, _ = store_of(snapshot).manifests()
        choice = choose(images, here, model=key, name=name)
    except ColdframeError as error:
        return Found(None, str(error))
    return Found(choice.manifest, None if choice.manifest else choice.why)


@contextmanager
def borrowed(
    manifest: Manifest, snapshot: SnapshotOptions, model: str, work: str
) -> Iterator[Mapping[str, str]]:
    """A store with that image, for another model of the same kind, while the context lasts.

    Args:
        manifest: The image.
        snapshot: Where it is: a directory.
        model: The scale model's directory.
        work: Where the store is made; best on the same file system.

    Returns:
        The environment in which workers are clones of it.

    Raises:
        OSError: It cannot be made.
        ColdframeError: The key cannot be read.
    """
    lent = manifest._replace(name=model, model=ModelKey.of(model), oracle=None, signature=None)
    if snapshot.key_file is not None:
        lent = sign(lent, read_key(snapshot.key_file))
    store = os.path.join(work, "images")
    for folder in (OBJECTS, MANIFESTS):
        os.makedirs(os.path.join(store, folder), mode=0o700)
    try:
        for item in manifest.objects:
            _link(*(os.path.join(root, OBJECTS, item.digest) for root in (snapshot.store, store)))
        with open(os.path.join(store, MANIFESTS, f"{lent.id}.json"), "xb") as file:
            file.write(lent.encode())
        environment: dict[str, Any] = {
            "COLDFRAME_SNAPSHOT": "require",
            "COLDFRAME_SNAPSHOT_STORE": store,
        }
        if snapshot.key_file is not None:
            environment["COLDFRAME_SNAPSHOT_KEY"] = snapshot.key_file
        yield environment
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _link(there: str, here: str) -> None:
    """The same file under another name, or where that cannot be, a copy."""
    try:
        os.link(there, here)
    except OSError:
        shutil.copyfile(there, here)
