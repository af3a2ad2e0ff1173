"""Which image of a store is restored: the newest that fits this machine and this model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.fields import Refusal
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey

__all__ = ["Choice", "choose"]


class Choice(NamedTuple):
    """What was chosen, and why not something else.

    Attributes:
        manifest: The image, or None.
        refusals: What does not fit of each image of this model that was looked at, newest first.
    """

    manifest: Manifest | None
    refusals: tuple[tuple[str, Refusal], ...]

    @property
    def why(self) -> str:
        """One sentence for the timeline and the log."""
        if self.manifest is not None:
            return f"image {self.manifest.id[:8]} fits"
        if not self.refusals:
            return "no image of this model"
        image, refusal = self.refusals[0]
        others = f", and {len(self.refusals) - 1} more" if len(self.refusals) > 1 else ""
        return f"image {image[:8]}: {refusal}{others}"


def choose(
    manifests: Iterable[Manifest],
    here: Machine,
    *,
    model: ModelKey | None,
    name: str,
    engine: EngineKey | None = None,
    exclude: frozenset[str] = frozenset(),
) -> Choice:
    """Chooses the newest image that fits.

    Args:
        manifests: Those of a store, newest first.
        here: This machine.
        model: What the model is. None where its files are not here yet: then the name decides, and
            whoever gets the files has to compare.
        name: The MODEL, as it was written.
        engine: Whose engine clones are to be of; None for our own workers.
        exclude: Ids of images that are not to be used, since they have failed.
    """
    refusals: list[tuple[str, Refusal]] = []
    for manifest in manifests:
        if (manifest.engine and manifest.engine.name) != (engine and engine.name):
            continue  # another engine, of which nobody has asked
        refusal = None if model is None else manifest.model.refusal(model)
        if manifest.name != name and (refusal is not None or model is None):
            continue  # another model
        if refusal is None:
            refusal = manifest.machine.refusal(here)
        if refusal is None and manifest.engine is not None and engine is not None:
            refusal = manifest.engine.refusal(engine)
        image = manifest.id
        if refusal is None and image in exclude:
            refusal = Refusal("image", "one that can be restored", "one that has just failed")
        if refusal is None:
            return Choice(manifest, tuple(refusals))
        refusals.append((image, refusal))
    return Choice(None, tuple(refusals))
