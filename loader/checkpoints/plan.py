"""The load plan: which bytes go where in the arena, in the order in which a model uses them.

Stage 0 is the embedding, stage i + 1 is layer i, and the last is the head: the final norm and
everything else that comes after the layers. A stage for which the checkpoint has no bytes is
there all the same, without extents. The plan names bytes; splitting them into reads is the
stream's, and what the tensors mean is the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.extents import MAX_GAP, Extent, Run, coalesce
from coldframe.loader.checkpoints.layouts import Item, Layout, pack
from coldframe.loader.checkpoints.slices import WHOLE, Rank, begin_of, cut
from coldframe.loader.checkpoints.stages import stage_names, stage_of_each, unused
from coldframe.loader.errors import ColdframeError

__all__ = ["MAX_GAP", "Extent", "Layout", "Placement", "Plan", "Rank", "Run", "Stage"]

_WIRE_VERSION = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor in the arena.

    Attributes:
        name: As in the checkpoint.
        dtype: As safetensors names it.
        shape: Its dimensions; those of the slice, where the plan is one rank's.
        arena_offset: Where its first byte is, from the start of the arena.
        nbytes: Its size in bytes.
        stage: The index of the stage that brings it.
        whole: The dimensions of the tensor that this is a slice of; empty where it is no slice.
        begin: How many rows, columns and so on of that lie before the slice.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arena_offset: int
    nbytes: int
    stage: int
    whole: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """What is loaded together, because it is used together.

    Attributes:
        index: Its place in the plan.
        name: `embedding`, `layer 0` and so on, or `head`.
        extents: By shard and offset.
        nbytes: The bytes to read: those of its tensors and of the small gaps between them.
    """

    index: int
    name: str
    extents: tuple[Extent, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to read, in which order, and where each tensor lies then.

    Attributes:
        layout: How the arena mirrors the checkpoint.
        rank: Whose rows and columns these are; `WHOLE` where the model is not divided.
        stages: In the order of use.
        placements: The planned tensors by name, in the order of use.
        skipped: Tensors of the checkpoint that no model uses, by name.
        arena_bytes: The size of the arena, a multiple of 64 KiB.
        shard_bases: Where each shard begins in the arena (layout `file`).
        fingerprint: The checkpoint's; the same for all layouts and ranks of it.
        hash: SHA-256 over all of this, in hexadecimal.
    """

    layout: Layout
    rank: Rank
    stages: tuple[Stage, ...]
    placements: dict[str, Placement]
    skipped: tuple[str, ...]
    arena_bytes: int
    shard_bases: tuple[int, ...]
    fingerprint: str
    hash: str

    @staticmethod
    def build(
        checkpoint: Checkpoint,
        *,
        layout: Layout | str = Layout.FILE,
        rank: Rank = WHOLE,
        max_gap: int = MAX_GAP,
    ) -> Plan:
        """Plan the load of a checkpoint.

        The order comes from the tensors' names (`stages.stage_of_each`). Skipped is what models
        do not read (`stages.unused`).

        Args:
            checkpoint: The opened checkpoint.
            layout: How the arena mirrors it.
            rank: The tensor-parallel rank whose slices are to be read (see `slices`).
            max_gap: Two tensors of one stage, or two rows of a slice by columns, are read together
                when at most this many bytes, none of them wanted by another stage, lie between
                them.

        Raises:
            CheckpointError: There are no tensors, a layer is missing, or a tensor cannot be divided
                over so many ranks.
            ColdframeError: There is no such layout, or slices cannot have it.
        """
        layout = _layout(layout, rank)
        skipped = unused(checkpoint.tensors)
        dropped = set(skipped)
        planned = [t for t in checkpoint.tensors.values() if t.name not in dropped]
        stage_of, layers = stage_of_each([t.name for t in planned], where=checkpoint.path)
        parts = cut(checkpoint, planned, rank)
        # Stable: within a stage the order of the files remains.
        by_use = sorted(parts, key=lambda p: stage_of[p.name])
        items = [Item(p.name, p.dtype, p.nbytes) for p in by_use]
        offsets, shard_bases, arena_bytes = pack(layout, checkpoint, items)
        placements = {}
        for p in by_use:
            tensor = checkpoint.tensors[p.name]
            slice_of = () if p.shape == tensor.shape else (tensor.shape, begin_of(tensor, p))
            placements[p.name] = Placement(
                *(p.name, p.dtype, p.shape, offsets[p.name], p.nbytes, stage_of[p.name]), *slice_of
            )
        extents = coalesce(parts, stage_of, offsets, max_gap, mirror=layout is Layout.FILE)
        stages = _stages(stage_names(layers), extents)
        plan = Plan(
            layout,
            rank,
            stages,
            placements,
            skipped,
            arena_bytes,
            shard_bases,
            checkpoint.fingerprint,
            hash="",
        )
        return replace(plan, hash=_digest(plan.to_wire()))

    @property
    def weights_bytes(self) -> int:
        """The bytes of all planned tensors."""
        return sum(placement.nbytes for placement in self.placements.values())

    @property
    def read_bytes(self) -> int:
        """The bytes of all extents: the planned tensors and the small gaps between them."""
        return sum(stage.nbytes for stage in self.stages)

    def to_wire(self) -> dict[str, Any]:
        """The plan as compact JSON values, for a message to another process."""
        return {
            "version": _WIRE_VERSION,
            "layout": str(self.layout),
            "rank": [self.rank.index, self.rank.ranks],
            "stages": [
                [
                    stage.name,
                    [
                        [
                            e.shard,
                            e.file_offset,
                            e.length,
                            [
                                [r.offset, r.length, r.arena_offset, r.count, r.stride]
                                for r in e.runs
                            ],
                        ]
                        for e in stage.extents
                    ],
                ]
                for stage in self.stages
            ],
            "placements": [
                [
                    *(p.name, p.dtype, list(p.shape), p.arena_offset, p.nbytes, p.stage),
                    *([list(p.whole), list(p.begin)] if p.whole else []),
                ]
                for p in self.placements.values()
            ],
            "skipped": list(self.skipped),
            "arena_bytes": self.arena_bytes,
            "shard_bases": list(self.shard_bases),
            "fingerprint": self.fingerprint,
            "hash": self.hash,
        }

    @staticmethod
    def from_wire(data: dict[str, Any]) -> Plan:
        """The plan that another process sent.

        Raises:
            ColdframeError: It was written by another version.
        """
        if data.get("version") != _WIRE_VERSION:
            raise ColdframeError(
                "the plan was written by another version of coldframe",
                expected=f"version {_WIRE_VERSION}",
                got=data.get("version"),
                hint="Run one version of coldframe in the whole replica.",
            )
        stages = []
        for index, (name, rows) in enumerate(data["stages"]):
            extents = tuple(
                Extent(index, shard, offset, length, tuple(Run(*run) for run in runs))
                for shard, offset, length, runs in rows
            )
            stages.append(Stage(index, name, extents, sum(e.length for e in extents)))
        placements = {
            name: Placement(name, dtype, tuple(shape), *rest, *map(tuple, slice_of))
            for name, dtype, shape, *numbers in data["placements"]
            for rest, slice_of in [(numbers[:3], numbers[3:])]
        }
        return Plan(
            Layout(data["layout"]),
            Rank(*data["rank"]),
            tuple(stages),
            placements,
            tuple(data["skipped"]),
            data["arena_bytes"],
            tuple(data["shard_bases"]),
            data["fingerprint"],
            data["hash"],
        )


def _layout(layout: Layout | str, rank: Rank) -> Layout:
    try:
        found = Layout(layout)
    except ValueError:
        raise ColdframeError(
            "there is no such layout", expected=" or ".join(Layout), got=layout
        ) from None
    if found is Layout.FILE and rank != WHOLE:
        raise ColdframeError(
            "slices cannot have this layout",
            expected=Layout.ALIGNED,
            got=found,
            hint="A rank's slices mirror no file; take the other layout.",
        )
    return found


def _stages(names: list[str], extents: list[Extent]) -> tuple[Stage, ...]:
    by_stage: list[list[Extent]] = [[] for _ in names]
    for extent in extents:
        by_stage[extent.stage].append(extent)
    return tuple(
        Stage(index, name, tuple(found), sum(e.length for e in found))
        for index, (name, found) in enumerate(zip(names, by_stage, strict=True))
    )


def _digest(wire: dict[str, Any]) -> str:
    import hashlib
    import json

    text = json.dumps(wire, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
