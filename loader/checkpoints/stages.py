"""The order in which a model uses its tensors, told from their names alone.

Whatever the architecture: the stages are the embedding, layer 0 ... layer N-1, and the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from coldframe.loader.errors import CheckpointError

__all__ = ["EMBEDDING", "is_embedding", "layer_of", "stage_names", "stage_of_each", "unused"]

EMBEDDING = 0  # stage i + 1 is layer i, and the head is the last

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.([0-9]{1,6})\.")
# GPT-NeoX calls its output head `embed_out`; GPT-2's embeddings are `wte` and `wpe`.
_EMBEDDING = re.compile(r"(?:^|\.)(?:(?!embed_out|unembed)[^.]*embed[^.]*|wte|wpe)(?:\.|$)")
# Old checkpoints store this buffer; models compute it from the config.
_ROTARY_BUFFER = re.compile(r"(?:^|\.)rotary_\w*\.inv_freq$")


def unused(names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of a checkpoint that no model reads: rotary buffers, which models compute.

    A head beside the embedding that its config ties it to is not among them. Weights that are
    really tied are stored once; where both are there, Transformers 5 ties them only if their
    values are equal, and a plan cannot know that before the bytes are in. Loading both is right
    in either case.
    """
    return tuple(name for name in names if _ROTARY_BUFFER.search(name))


def layer_of(name: str) -> int | None:
    """The number of the layer that a name is of, or None."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def is_embedding(name: str) -> bool:
    """Whether a name outside the layers is one of the embedding's."""
    return _EMBEDDING.search(name) is not None


def stage_of_each(names: list[str], *, where: str) -> tuple[dict[str, int], int]:
    """The stage that each tensor belongs to.

    `layers.N.`, `layer.N.`, `blocks.N.`, `block.N.` or `h.N.` is layer N: of each stack, where a
    model has several. Other names that speak of an embedding come first, and all that is left
    comes last: late is safe, since the last stage waits for every byte anyway.

    Args:
        names: The tensors of the model.
        where: The checkpoint, for the error.

    Returns:
        The stage of each name, and the number of layers.

    Raises:
        CheckpointError: There is no tensor at all, or a layer has none.
    """
    if not names:
        raise CheckpointError(
            "the checkpoint has no weights",
            where=where,
            expected="at least one tensor that a model uses",
            got="none",
            hint="Download or save the model again.",
        )
    layer_of = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    present = set(layer_of.values())
    highest = max(present, default=-1)
    if len(present) != highest + 1:
        raise CheckpointError(
            "a layer is missing",
            where=where,
            expected=f"layers 0 to {highest}",
            got=f"no tensor of layer {next(i for i in range(highest) if i not in present)}",
            hint="The checkpoint is incomplete; download it again.",
        )
    layers = highest + 1
    stages = {}
    for name in names:
        if name in layer_of:
            stages[name] = layer_of[name] + 1
        else:
            stages[name] = EMBEDDING if _EMBEDDING.search(name) else layers + 1
    return stages, layers


def stage_names(layers: int) -> list[str]:
    """What the stages of a model with that many layers are called, in the order of use."""
    return ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
