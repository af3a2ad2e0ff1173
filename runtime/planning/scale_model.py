"""A checkpoint of a few of a model's layers, at its own shapes: what a start is rehearsed with.

All of a start but its bytes is the same for it: the processes, their imports, the tokenizer, the
kernels at the model's shapes. So what it takes can be measured in a second or two whatever the
model's size, and without touching the model's weights.

The weights are one small number over and over; arithmetic takes no less time for that. One token
is a little likelier than all others, so that an answer has text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from coldframe.loader.checkpoints.companions import COMPANIONS
from coldframe.loader.errors import CheckpointError, PlatformError, RequestError, SourceNotFound
from coldframe.loader.sources.base import Origin
from coldframe.runtime.checkpoints.safetensors_writer import TensorEntry, encode_header
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["ScaleModel", "write_scale_model"]

_LAYERS = 3
"""One that has first uses in it, and two that have not."""
_WANTED_BYTES = 512 << 20
_MOST_BYTES = 2 << 30
_MOST_EMBEDDING = 128 << 20
_LEAST_VOCABULARY = 2048
_MOST_COMPANION = 500_000_000
_STEP = 4 << 20
_WEIGHTS = "model.safetensors"
_SMALL = {"BF16": b"\x80\x3a", "F16": b"\x00\x14", "F32": b"\x00\x00\x80\x3a"}
"""2^-10."""
_LARGER = {"BF16": b"\x80\x3b", "F16": b"\x00\x1c", "F32": b"\x00\x00\x80\x3b"}
"""2^-8."""


@dataclass(frozen=True, slots=True)
class ScaleModel:
    """What was written.

    Args:
        path: The directory.
        spec: Its shape.
        nbytes: Of its weights.
        head_share: Of the model's vocabulary, how much it has.
    """

    path: str
    spec: ModelSpec
    nbytes: int
    head_share: float

    @property
    def files(self) -> list[str]:
        """Those with its weights."""
        return [os.path.join(self.path, _WEIGHTS)]


def write_scale_model(
    directory: str, origin: Origin, config: Mapping[str, Any], spec: ModelSpec, room: int
) -> ScaleModel:
    """Writes one.

    Args:
        directory: An empty one.
        origin: Where the model is: its tokenizer is taken from there.
        config: The model's.
        spec: The same, read.
        room: Bytes that it may take.

    Raises:
        RequestError: A layer alone would take more than that.
        SourceError: The model's small files cannot be had.
        CheckpointError: One of them is none.
        PlatformError: It cannot be written.
    """
    spec = _cut(spec, room)
    try:
        _write_companions(directory, origin, config, spec)
        nbytes = _write_weights(directory, spec)
    except OSError as error:
        raise PlatformError(
            "a scale model cannot be written", where=directory, got=error.strerror
        ) from error
    vocabulary = config["vocab_size"]
    return ScaleModel(directory, spec, nbytes, spec.vocab_size / vocabulary)


def _cut(spec: ModelSpec, room: int) -> ModelSpec:
    """The shape of as many layers, and as much of the vocabulary, as there is room for."""
    row = spec.hidden_size * spec.dtype_bytes
    rows = max(
        min(_LEAST_VOCABULARY, spec.vocab_size), min(spec.vocab_size, _MOST_EMBEDDING // row)
    )
    for layers in range(min(_LAYERS, spec.layers), 0, -1):
        cut = replace(spec, layers=layers, vocab_size=rows, windows=spec.windows[:layers])
        if _nbytes(cut) <= min(room, _WANTED_BYTES if layers > 1 else _MOST_BYTES):
            return cut
    raise RequestError(
        "one layer of the model is more than a start can be rehearsed with",
        expected=f"at most {min(room, _MOST_BYTES):,} bytes",
        got=f"{_nbytes(cut):,}",
        hint="Measure a real start: coldframe run MODEL --json.",
    )


def _nbytes(spec: ModelSpec) -> int:
    return sum(map(prod, spec.expected_tensors().values())) * spec.dtype_bytes


def _write_companions(
    directory: str, origin: Origin, config: Mapping[str, Any], spec: ModelSpec
) -> None:
    root = Path(directory)
    for name in COMPANIONS:
        try:
            root.joinpath(name).write_bytes(origin.read_small(name, _MOST_COMPANION))
        except SourceNotFound:
            continue
    # Lists with an entry for each layer (`layer_types`) are cut like the layers.
    full = config["num_hidden_layers"]
    cut = {
        key: value[: spec.layers] if isinstance(value, list) and len(value) == full else value
        for key, value in config.items()
    }
    cut |= {"num_hidden_layers": spec.layers, "vocab_size": spec.vocab_size}
    cut["tie_word_embeddings"] = spec.tied
    for key, value in cut.items():
        if key.endswith("_token_id"):
            cut[key] = _within(value, spec.vocab_size)
    root.joinpath("config.json").write_text(json.dumps(cut))
    generation = root / "generation_config.json"
    if generation.exists():
        said = _object(generation)
        ends = {k: _within(v, spec.vocab_size) for k, v in said.items() if k.endswith("_token_id")}
        generation.write_text(json.dumps(said | ends))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError("a small file of the model is no JSON", where=path.name) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            "a small file of the model is no JSON object", where=path.name, got=repr(found)[:100]
        )
    return found


def _within(value: object, vocabulary: int) -> object:
    """Special tokens, as far as there are rows for them."""
    if isinstance(value, list):
        return [token for token in value if isinstance(token, int) and token < vocabulary] or None
    return value if not isinstance(value, int) or value < vocabulary else None


def _write_weights(directory: str, spec: ModelSpec) -> int:
    shapes = spec.expected_tensors()
    entries = [TensorEntry(name, spec.dtype, shape) for name, shape in shapes.items()]
    # Behind the last layer of the tied or untied head: the row of the token that is drawn.
    head = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    step = _SMALL[spec.dtype] * (_STEP // spec.dtype_bytes)
    data = encode_header(entries, {"format": "pt"})
    with Path(directory, _WEIGHTS).open("xb") as file:
        file.write(data)
        for entry in entries:
            at, left = file.tell(), entry.nbytes
            while left:
                left -= file.write(step[:left])
            if entry.name == head:
                row = spec.hidden_size * spec.dtype_bytes
                file.seek(at + spec.vocab_size // 2 * row)
                file.write(_LARGER[spec.dtype] * spec.hidden_size)
                file.seek(0, os.SEEK_END)
        # Dirty pages may not be mapped under a lease, nor read directly without being written.
        file.flush()
        os.fdatasync(file.fileno())
    return sum(entry.nbytes for entry in entries)
