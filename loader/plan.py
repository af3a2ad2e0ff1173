"""The load plan: which bytes go where in the arena, in the order in which a model uses them.

Stage 0 is the embedding, stage i + 1 is layer i, and the last is the head: the final norm and
everything else that comes after the layers. A stage for which the checkpoint has no bytes is
there all the same, without extents. The plan names bytes; splitting them into reads is the
stream's, and what the tensors mean is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.header import TensorInfo
from coldframe.loader.stages import stage_names, stage_of_each, unused

__all__ = ["Extent", "Layout", "Placement", "Plan", "Run", "Stage"]

SHARD_ALIGNMENT = 2 << 20  # a huge page, so that a shard can lie in huge pages from its start
ARENA_ROUNDING = 64 << 10  # the largest base page in use (arm64), so a plan fits every machine
MAX_GAP = 64 << 10  # bytes that are cheaper to read than to skip

_WIRE_VERSION = 2


class Layout(StrEnum):
    """How an arena mirrors a checkpoint.

    `FILE`: each shard as it is, at a base of its own; a tensor at base + its offset in the file.
    Memory and file agree modulo every block size up to 2 MiB, so that a shard can be mapped
    whole, or read with O_DIRECT without a bounce.
    """

    FILE = "file"


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of an extent that lie together in the arena: a tensor, several, or rows of one.

    Attributes:
        offset: Where they begin, from the start of the extent.
        length: Bytes of one row; never 0.
        arena_offset: Where the first byte goes, from the start of the arena.
        count: Rows; 1 for all that is not a slice by columns.
        stride: From row to row in the extent, in bytes. In the arena the rows touch.
    """

    offset: int
    length: int
    arena_offset: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one shard that are read in one go.

    Attributes:
        stage: The index of its stage.
        shard: The index of its shard in the checkpoint.
        file_offset: The position of its first byte in the file.
        length: Bytes; never 0.
        runs: Where they go, in the order of the file. Bytes that are in no run go nowhere.
    """

    stage: int
    shard: int
    file_offset: int
    length: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor in the arena.

    Attributes:
        name: As in the checkpoint.
        dtype: As safetensors names it.
        shape: Its dimensions.
        arena_offset: Where its first byte is, from the start of the arena.
        nbytes: Its size in bytes.
        stage: The index of the stage that brings it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    arena_offset: int
    nbytes: int
    stage: int


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
        stages: In the order of use.
        placements: The planned tensors by name, in the order of use.
        skipped: Tensors of the checkpoint that no model uses, by name.
        arena_bytes: The size of the arena, a multiple of 64 KiB.
        shard_bases: Where each shard begins in the arena (layout `file`).
        hash: SHA-256 over all of this and the checkpoint's fingerprint, in hexadecimal.
    """

    layout: Layout
    stages: tuple[Stage, ...]
    placements: dict[str, Placement]
    skipped: tuple[str, ...]
    arena_bytes: int
    shard_bases: tuple[int, ...]
    hash: str

    @staticmethod
    def build(
        checkpoint: Checkpoint, *, layout: Layout | str = Layout.FILE, max_gap: int = MAX_GAP
    ) -> Plan:
        """Plan the load of a checkpoint.

        The order comes from the tensors' names (`stages.stage_of_each`). Skipped is what models
        do not read (`stages.unused`).

        Args:
            checkpoint: The opened checkpoint.
            layout: How the arena mirrors it.
            max_gap: Two tensors of one stage are read together when at most this many bytes,
                none of them wanted by another stage, lie between them.

        Raises:
            CheckpointError: There are no tensors, or a layer is missing.
            ColdframeError: There is no such layout.
        """
        layout = _layout(layout)
        skipped = unused(checkpoint.tensors)
        dropped = set(skipped)
        planned = [t for t in checkpoint.tensors.values() if t.name not in dropped]
        stage_of, layers = stage_of_each([t.name for t in planned], where=checkpoint.path)
        offsets, shard_bases, arena_bytes = _PACKERS[layout](checkpoint)
        # Stable: within a stage the order of the files remains.
        by_use = sorted(planned, key=lambda t: stage_of[t.name])
        placements = {
            t.name: Placement(t.name, t.dtype, t.shape, offsets[t.name], t.nbytes, stage_of[t.name])
            for t in by_use
        }
        extents = _extents(planned, stage_of, offsets, max_gap, mirror=layout is Layout.FILE)
        stages = _stages(stage_names(layers), extents)
        plan = Plan(layout, stages, placements, skipped, arena_bytes, shard_bases, "")
        digest = _digest(plan.to_wire(), checkpoint.fingerprint)
        return Plan(layout, stages, placements, skipped, arena_bytes, shard_bases, digest)

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
                [p.name, p.dtype, list(p.shape), p.arena_offset, p.nbytes, p.stage]
                for p in self.placements.values()
            ],
            "skipped": list(self.skipped),
            "arena_bytes": self.arena_bytes,
            "shard_bases": list(self.shard_bases),
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
            name: Placement(name, dtype, tuple(shape), *rest)
            for name, dtype, shape, *rest in data["placements"]
        }
        return Plan(
            Layout(data["layout"]),
            tuple(stages),
            placements,
            tuple(data["skipped"]),
            data["arena_bytes"],
            tuple(data["shard_bases"]),
            data["hash"],
        )


def _layout(layout: Layout | str) -> Layout:
    try:
        return Layout(layout)
    except ValueError:
        raise ColdframeError(
            "there is no such layout", expected=" or ".join(Layout), got=layout
        ) from None


def _pack_file(checkpoint: Checkpoint) -> tuple[dict[str, int], tuple[int, ...], int]:
    """Layout `file`: arena offsets of all tensors, shard bases and the size of the arena."""
    bases, end = [], 0
    for shard in checkpoint.shards:
        bases.append(_round_up(end, SHARD_ALIGNMENT))
        end = bases[-1] + shard.size
    offsets = {t.name: bases[t.shard] + t.offset for t in checkpoint.tensors.values()}
    return offsets, tuple(bases), _round_up(end, ARENA_ROUNDING)


_Packer = Callable[[Checkpoint], tuple[dict[str, int], tuple[int, ...], int]]
_PACKERS: dict[Layout, _Packer] = {Layout.FILE: _pack_file}


def _extents(
    planned: list[TensorInfo],
    stage_of: dict[str, int],
    offsets: dict[str, int],
    max_gap: int,
    *,
    mirror: bool,
) -> list[Extent]:
    """Join neighbours of one stage. `planned` is in the order of shards and offsets.

    Since it holds every tensor that any stage wants, what lies between two neighbours in it is
    wanted by none.
    """
    extents: list[Extent] = []
    for tensor in planned:
        if not tensor.nbytes:
            continue
        stage = stage_of[tensor.name]
        run = Run(0, tensor.nbytes, offsets[tensor.name])
        if extents:
            last = extents[-1]
            gap = tensor.offset - (last.file_offset + last.length)
            if (last.stage, last.shard) == (stage, tensor.shard) and gap <= max_gap:
                run = replace(run, offset=tensor.offset - last.file_offset)
                runs = _joined(last.runs, run, mirror)
                extents[-1] = replace(last, length=last.length + gap + tensor.nbytes, runs=runs)
                continue
        extents.append(Extent(stage, tensor.shard, tensor.offset, tensor.nbytes, (run,)))
    return extents


def _joined(runs: tuple[Run, ...], run: Run, mirror: bool) -> tuple[Run, ...]:
    """The runs with one more behind them, as one with the last where that comes to the same.

    What lies in a gap goes nowhere, since its place in the arena may be another tensor's; but where
    the arena mirrors the file it has a place there, and goes along.
    """
    last = runs[-1]
    touch = last.offset + last.length == run.offset
    if (touch or mirror) and last.arena_offset - last.offset == run.arena_offset - run.offset:
        return (*runs[:-1], replace(last, length=run.offset + run.length - last.offset))
    return (*runs, run)


def _stages(names: list[str], extents: list[Extent]) -> tuple[Stage, ...]:
    by_stage: list[list[Extent]] = [[] for _ in names]
    for extent in extents:
        by_stage[extent.stage].append(extent)
    return tuple(
        Stage(index, name, tuple(found), sum(e.length for e in found))
        for index, (name, found) in enumerate(zip(names, by_stage, strict=True))
    )


def _digest(wire: dict[str, Any], fingerprint: str) -> str:
    import hashlib
    import json

    text = json.dumps([fingerprint, wire], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
