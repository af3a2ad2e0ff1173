"""What the manifest of an image says of the part of it that was on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from coldframe.snapshot.fields import Fields, is_integer

__all__ = ["GpuImage"]


class GpuImage(NamedTuple):
    """A context that the driver has written to the process's own memory, and what was in it.

    Attributes:
        cuda: The version of CUDA that torch was built with.
        gpus: The UUID and the name of all GPUs that the driver had when it was frozen, the
            process's own the first: of each it must be said who stands for it after a restore.
        context_bytes: What the context took of the GPU, and takes again.
        plan: The fingerprint of the plan by which the weights lay.
        block_bytes: Of a KV block.
        blocks: How many blocks the reserved addresses have room for.
        graphs: The steps that were captured, each as the sequences and the KV blocks of one
            sequence that it has room for.
    """

    cuda: str
    gpus: tuple[tuple[str, str], ...]
    context_bytes: int
    plan: str
    block_bytes: int
    blocks: int
    graphs: tuple[tuple[int, int], ...]

    @staticmethod
    def from_json(value: object) -> GpuImage:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "what an image has of a GPU")
        found = GpuImage(
            fields.text("cuda"),
            tuple(_gpu(fields, gpu) for gpu in fields.items("gpus")),
            fields.integer("context_bytes"),
            fields.text("plan"),
            fields.integer("block_bytes", 1),
            fields.integer("blocks", 1),
            tuple(_graph(fields, graph) for graph in fields.items("graphs")),
        )
        if not found.gpus:
            raise fields.wrong("gpus", "at least one", "none")
        fields.end()
        return found

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        lists = {name: [[*pair] for pair in getattr(self, name)] for name in ("gpus", "graphs")}
        return {**self._asdict(), **lists}


def _gpu(fields: Fields, value: object) -> tuple[str, str]:
    match value:
        case [str(uuid), str(name)]:
            return uuid, name
    raise fields.wrong("gpus", "the UUID and the name of each", value)


def _graph(fields: Fields, value: object) -> tuple[int, int]:
    match value:
        case [int(sequences), int(blocks)] if is_integer(sequences) and is_integer(blocks):
            if sequences > 0 and blocks > 0:
                return sequences, blocks
    raise fields.wrong("graphs", "sequences and blocks of each", value)
