"""A Hugging Face checkpoint, opened strictly: its config, its shards and where each tensor lies.

Only metadata is read here; the weights are the stream's to read, and what a config means for a
model is the engine's to say. A bad checkpoint never becomes wrong weights: what two readers could
take for two different things is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coldframe.loader.checkpoints.header import PREFIX_BYTES, TensorInfo, header_bytes, parse_header
from coldframe.loader.checkpoints.seal import Seal
from coldframe.loader.errors import CheckpointError, SourceNotFound
from coldframe.loader.sources.base import Origin
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.strict_json import describe, parse_object

__all__ = ["Checkpoint", "Shard", "TensorInfo", "read_config", "read_generation_config"]

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_CONFIG_BYTES = 10_000_000
_MAX_INDEX_BYTES = 100_000_000  # as much as a header may have


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint, as it was when the checkpoint was opened.

    Attributes:
        name: Its file name.
        uri: Where it is, for people, and in a directory where to open it (a symbolic link is not
            resolved).
        size: Bytes in the file.
        version: What changes when the file does: an ETag, or a local file's number and time.
        data_offset: Where the header ends and the data begins.
    """

    name: str
    uri: str
    size: int
    version: str
    data_offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config, shards and tensors of a model.

    Attributes:
        path: The directory, or the URI without credentials.
        config: `config.json` as it stands.
        shards: In the order of their names.
        tensors: By name, in the order of shards and of offsets.
        seal: The hashes of all bytes, where the checkpoint is sealed.
        headers: What is before the data in each shard, as it stands.
        config_raw: `config.json` as it was read, for whoever must have the same.
    """

    path: str
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorInfo]
    seal: Seal | None = None
    headers: tuple[bytes, ...] = field(default=(), repr=False)
    config_raw: bytes = field(default=b"", repr=False)

    @staticmethod
    def open(origin: str | os.PathLike[str] | Origin, *, sealed: bool = True) -> Checkpoint:
        """Open the checkpoint at a place, and read its headers.

        Where both `model.safetensors` and an index are there, `model.safetensors` is taken, as
        Transformers does. Files that the index does not name are ignored: some repositories hold
        the weights twice. A shard may be a symbolic link, since the Hugging Face cache is made of
        them, but its name must be a plain file name.

        Args:
            origin: The place; a path is a local directory.
            sealed: Whether config and headers are held against the seal, where there is one.

        Raises:
            SourceCorrupt: A config or a header is not the one that was sealed.
            CheckpointError: What is there is not a sound checkpoint.
            SourceNotFound: The directory, the config, the weights or a shard is missing.
            SourceDenied: One of them may not be read.
            SourceChanged: A file shrank while its header was read.
            SourceError: It could not be read.
        """
        place = _origin(origin)
        place.check()
        root = place.uri
        raw = place.read_small(CONFIG_NAME, _MAX_CONFIG_BYTES)
        # First, since a server that answers everything with a page of its own shows here.
        config = _parse_object(raw, place.uri_of(CONFIG_NAME))
        seal = Seal.read(place) if sealed else None
        if seal is not None:
            seal.check_config(raw, where=place.uri_of(CONFIG_NAME))
        weight_map = _read_index(place)
        names = [WEIGHTS_NAME] if weight_map is None else sorted(set(weight_map.values()))

        shards: list[Shard] = []
        tensors: dict[str, TensorInfo] = {}
        headers: list[bytes] = []
        for shard, found, header in _read_shards(place, names, seal):
            for tensor in found:
                twin = tensors.setdefault(tensor.name, tensor)
                if twin is not tensor:
                    raise CheckpointError(
                        "a tensor is in two shards",
                        where=f"{root}, tensor {describe(tensor.name)}",
                        expected="one shard for each tensor",
                        got=f"{shards[twin.shard].name} and {shard.name}",
                        hint="Save the model again.",
                    )
            shards.append(shard)
            headers.append(header)
        if weight_map is not None:
            _check_index(place, weight_map, names, tensors)
        return Checkpoint(root, config, tuple(shards), tensors, seal, tuple(headers), raw)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config, sizes of shards, headers and the seal, in hexadecimal.

        The same checkpoint has the same fingerprint on every machine: neither the directory nor
        times enter. The weights themselves enter by their seal alone; reading them all is what a
        cold start cannot wait for. It is computed anew at each call.
        """
        import hashlib
        import json

        content = [
            self.config,
            [[shard.name, shard.size, shard.data_offset] for shard in self.shards],
            [
                [t.name, t.dtype, t.shape, t.shard, t.offset, t.nbytes]
                for t in self.tensors.values()
            ],
            None if self.seal is None else self.seal.digest,
        ]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def agrees_with(self, other: Checkpoint) -> bool:
        """Whether another place holds the same checkpoint, as far as opening it tells.

        Config and headers must be equal, and the seals where both have one.
        """
        if self.seal is not None and other.seal is not None and self.seal != other.seal:
            return False
        return (self.config, self.headers, [(s.name, s.size) for s in self.shards]) == (
            other.config,
            other.headers,
            [(s.name, s.size) for s in other.shards],
        )


def read_config(origin: str | Origin) -> dict[str, Any]:
    """The `config.json` of a model, for whoever needs it before the weights.

    Raises:
        CheckpointError: It is not a JSON object.
        SourceError: It is not there or cannot be read.
    """
    place = _origin(origin)
    place.check()
    return _read_object(place, CONFIG_NAME)


def read_generation_config(origin: str | Origin) -> dict[str, Any]:
    """The `generation_config.json` of a model; empty where there is none.

    Raises:
        CheckpointError: It is not a JSON object.
        SourceError: It is there and cannot be read.
    """
    place = _origin(origin)
    return (
        _read_object(place, GENERATION_CONFIG_NAME) if place.exists(GENERATION_CONFIG_NAME) else {}
    )


def _origin(origin: str | os.PathLike[str] | Origin) -> Origin:
    if isinstance(origin, str | os.PathLike):
        return DirectoryOrigin(os.fspath(origin))
    return origin


def _read_object(origin: Origin, name: str) -> dict[str, Any]:
    return _parse_object(origin.read_small(name, _MAX_CONFIG_BYTES), origin.uri_of(name))


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    return parse_object(
        raw,
        where=where,
        hint="Download or save the model again.",
        # Python writes Infinity, and configs in the wild have it (Mamba's time_step_limit).
        allow_constants=True,
    )


def _read_index(origin: Origin) -> dict[str, str] | None:
    """Tensor to shard as the index has it, or None for a checkpoint of one file."""
    if origin.exists(WEIGHTS_NAME):
        return None
    path = origin.uri_of(INDEX_NAME)
    if not origin.exists(INDEX_NAME):
        raise SourceNotFound(
            "there are no safetensors weights",
            where=origin.uri,
            expected=f"{WEIGHTS_NAME} or {INDEX_NAME}",
            hint="Download the weights, or convert them to safetensors.",
        )
    hint = "Download or save the index again."
    index = parse_object(origin.read_small(INDEX_NAME, _MAX_INDEX_BYTES), where=path, hint=hint)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map",
            where=path,
            expected="an object that names a shard for each tensor",
            got="nothing" if weight_map is None else describe(weight_map),
            hint=hint,
        )
    for tensor, name in weight_map.items():
        if not _is_shard_name(name):
            raise CheckpointError(
                "the index names something that is not a shard of this directory",
                where=f"{path}, tensor {describe(tensor)}",
                expected="a plain file name that ends in .safetensors",
                got=describe(name),
                hint="Do not trust this checkpoint before you know why.",
            )
    return weight_map


def _is_shard_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(character in name for character in "/\\\0")
    )


def _check_index(
    origin: Origin, weight_map: dict[str, str], names: list[str], tensors: dict[str, TensorInfo]
) -> None:
    hint = "The index and the shards are not of one save; download the model again."
    for name, shard in weight_map.items():
        found = tensors.get(name)
        if found is None or names[found.shard] != shard:
            raise CheckpointError(
                "a tensor is not in the shard that the index names",
                where=f"{origin.uri}, tensor {describe(name)}",
                expected=shard,
                got="no such tensor in any shard" if found is None else names[found.shard],
                hint=hint,
            )
    if len(tensors) != len(weight_map):
        extra = next(tensor for tensor in tensors.values() if tensor.name not in weight_map)
        raise CheckpointError(
            "a shard holds a tensor that the index does not name",
            where=f"{origin.uri_of(names[extra.shard])}, tensor {describe(extra.name)}",
            expected=f"{len(weight_map)} tensors",
            got=f"{len(tensors)} tensors",
            hint=hint,
        )


def _read_shards(
    origin: Origin, names: list[str], seal: Seal | None
) -> Iterator[tuple[Shard, list[TensorInfo], bytes]]:
    """Shards, their tensors and what is before their data, in the order of the names."""
    numbered = list(enumerate(names))
    if min(len(names), origin.concurrency) < 2:
        yield from (_read_shard(origin, name, number, seal) for number, name in numbered)
        return
    from concurrent.futures import ThreadPoolExecutor

    # Each costs a round trip over a network.
    with ThreadPoolExecutor(min(len(names), origin.concurrency)) as pool:
        yield from pool.map(lambda item: _read_shard(origin, item[1], item[0], seal), numbered)


def _read_shard(
    origin: Origin, name: str, number: int, seal: Seal | None
) -> tuple[Shard, list[TensorInfo], bytes]:
    where = origin.uri_of(name)
    file = origin.open_shard(name)
    try:
        size = file.size
        prefix = file.read(0, min(PREFIX_BYTES, size))
        length = header_bytes(prefix, file_size=size, where=where)
        header = file.read(PREFIX_BYTES, length)
    finally:
        file.close()
    if seal is not None:
        seal.check_header(name, prefix + header, where=where)
    tensors = parse_header(header, file_size=size, where=where, shard=number)
    shard = Shard(name, where, size, file.version, PREFIX_BYTES + length)
    return shard, tensors, prefix + header
