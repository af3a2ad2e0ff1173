"""Which model an image is of: its config, its tokenizer and the shapes of its tensors.

An image holds none of the weights, so any weights of these shapes go with it. Where they lie in
which file, and in which layout they are loaded, does not matter either.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from coldframe.snapshot.fields import Fields, Refusal

__all__ = ["ModelKey", "TensorShape"]

TOKENIZER_NAME = "tokenizer.json"

_MAX_TOKENIZER_BYTES = 1 << 30
_HASH = re.compile("[0-9a-f]{64}")


class TensorShape(Protocol):
    """What counts of a tensor; the checkpoint's `TensorInfo` has it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...


class ModelKey(NamedTuple):
    """SHA-256 of what must be the same, in hexadecimal.

    Attributes:
        config: Of `config.json`, whatever its layout.
        generation: Of `generation_config.json`, likewise; None where there is none.
        tokenizer: Of the bytes of `tokenizer.json`; None where there is none.
        tensors: Of all tensors' names, dtypes and shapes.
    """

    config: str
    generation: str | None
    tokenizer: str | None
    tensors: str

    @staticmethod
    def of(
        directory: str | os.PathLike[str], tensors: Mapping[str, TensorShape] | None = None
    ) -> ModelKey:
        """The key of a model.

        Args:
            directory: Where its small files are.
            tensors: Its tensors by name, for a model whose weights are elsewhere.

        Raises:
            CheckpointError: It is not a sound checkpoint.
            SourceError: A file is missing or cannot be read.
        """
        # A restore compares keys that were computed elsewhere, and does without these.
        from coldframe.loader.checkpoints.checkpoint import (
            Checkpoint,
            read_config,
            read_generation_config,
        )
        from coldframe.loader.files import read_whole

        root = os.fspath(directory)
        if tensors is None:
            tensors = Checkpoint.open(root, sealed=False).tensors
        plan = sorted([name, info.dtype, list(info.shape)] for name, info in tensors.items())
        generation = read_generation_config(root)
        tokenizer = os.path.join(root, TOKENIZER_NAME)
        return ModelKey(
            _hash_json(read_config(root)),
            _hash_json(generation) if generation else None,
            _hash(read_whole(tokenizer, _MAX_TOKENIZER_BYTES))
            if os.path.lexists(tokenizer)
            else None,
            _hash_json(plan),
        )

    @property
    def digest(self) -> str:
        """One hash of all of them."""
        return _hash_json(list(self))

    def refusal(self, other: ModelKey) -> Refusal | None:
        """What of another model is not as it is in this one, if anything."""
        for name, expected, got in zip(self._fields, self, other, strict=True):
            if expected != got:
                return Refusal(f"model.{name}", str(expected), str(got))
        return None

    @staticmethod
    def from_json(value: object) -> ModelKey:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "a model's key")
        key = ModelKey(
            fields.text("config", _HASH),
            None if fields.absent("generation") else fields.text("generation", _HASH),
            None if fields.absent("tokenizer") else fields.text("tokenizer", _HASH),
            fields.text("tensors", _HASH),
        )
        fields.end()
        return key

    def to_json(self) -> dict[str, Any]:
        """The key as JSON values."""
        return self._asdict()


def _hash_json(value: object) -> str:
    return _hash(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
