"""What there is of a model's captured steps from an earlier start, if it fits this one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldframe.loader.arena import KV_BASE, SCRATCH_BASE, WEIGHTS_BASE
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.loader.errors import ColdframeError
from coldframe.snapshot.graph_store import GraphStore
from coldframe.snapshot.graphs import GraphArchive, GraphFingerprint, Region

__all__ = ["REGIONS", "Shelved", "look_up"]

_ROOM = KV_BASE - WEIGHTS_BASE
"""Addresses that each arena has for itself, however many of them it uses."""
REGIONS = (
    Region("weights", WEIGHTS_BASE, _ROOM),
    Region("kv", KV_BASE, _ROOM),
    Region("scratch", SCRATCH_BASE, _ROOM),
)


@dataclass(frozen=True, slots=True)
class Shelved:
    """What there is of a model's steps from an earlier start.

    Attributes:
        fingerprint: What graphs take for granted here.
        archive: The steps; None where there are none that fit.
        why: Why not.
    """

    fingerprint: GraphFingerprint
    archive: GraphArchive | None = None
    why: str = ""


def look_up(root: str, context: Context, model: str) -> Shelved:
    """Reads the archive for a model.

    Args:
        root: The folder where archives are.
        context: The GPU.
        model: What tells it and its plan from others, and this program from other versions.

    Raises:
        ColdframeError: Nobody can say what graphs would take for granted here.
    """
    context.bind()
    here = GraphFingerprint.here(
        GraphCalls(context.driver),
        context.ordinal,
        REGIONS,
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda),
        model=model,
    )
    try:
        return Shelved(here, GraphStore(root).read(here))
    except ColdframeError as error:
        return Shelved(here, None, str(error))
