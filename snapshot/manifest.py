"""The manifest of an image: what it is of, what it needs, and where each of its bytes is.

All that travels here is a NamedTuple: a restore waits for this module, and as many data classes
would take milliseconds to make.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.fields import Fields, parse
from coldframe.snapshot.gpu_image import GpuImage
from coldframe.snapshot.image_files import ImageFile, StoredObject, check_files
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.model_key import ModelKey

__all__ = [
    "EAGER_FOR_NOW",
    "VERSION",
    "Arena",
    "Draft",
    "Manifest",
    "Oracle",
    "Process",
    "Reservation",
    "is_image_id",
]

VERSION = 1
EAGER_FOR_NOW = "eager for now; "
"""What `decode_steps` begins with where nobody waited for compiled ones, or time or memory ran out:
another image may be better."""

_HASH = re.compile("[0-9a-f]{64}")
_ID = re.compile("[0-9a-f]{32}")


class Reservation(NamedTuple):
    """A range of addresses: its first, and how many bytes there are."""

    base: int
    nbytes: int


class Arena(NamedTuple):
    """Where the process has reserved addresses, for weights and for KV."""

    weights: Reservation
    kv: Reservation

    @staticmethod
    def from_json(value: object) -> Arena:
        """What `to_json` has made: for each, an address and a number of bytes.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "an arena")
        places: list[Reservation] = []
        for name in Arena._fields:
            match fields.integers(name):
                case (base, nbytes):
                    places.append(Reservation(base, nbytes))
                case other:
                    raise fields.wrong(name, "an address and a number of bytes", [*other])
        fields.end()
        return Arena(*places)

    def to_json(self) -> dict[str, Any]:
        """The arena as JSON values."""
        return {"weights": [*self.weights], "kv": [*self.kv]}


class Process(NamedTuple):
    """What was frozen.

    Attributes:
        pid: Its process id, in the namespace that it was frozen in.
        control_inode: The inode of its control socket.
        criu: The version of CRIU that has written it.
        user_namespace: Whether it was in a user namespace.
    """

    pid: int
    control_inode: int
    criu: str
    user_namespace: bool

    @staticmethod
    def from_json(value: object) -> Process:
        fields = Fields.of(value, "a process")
        process = Process(
            fields.integer("pid", 1),
            fields.integer("control_inode", 1),
            fields.text("criu"),
            fields.flag("user_namespace"),
        )
        fields.end()
        return process

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


class Oracle(NamedTuple):
    """What a clone has answered on the real weights.

    Attributes:
        prompt_ids: The prompt.
        token_ids: The answer, greedy.
        logprobs: The log-probability of each token of it.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @staticmethod
    def from_json(value: object) -> Oracle:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "an oracle")
        oracle = Oracle(
            fields.integers("prompt_ids"), fields.integers("token_ids"), fields.numbers("logprobs")
        )
        if not len(oracle.token_ids) == len(oracle.logprobs) > 0 or not oracle.prompt_ids:
            raise fields.wrong(
                "logprobs", f"one for each of {len(oracle.token_ids)} tokens", len(oracle.logprobs)
            )
        fields.end()
        return oracle

    def to_json(self) -> dict[str, Any]:
        """The oracle as JSON values."""
        return {name: [*values] for name, values in self._asdict().items()}


class Draft(NamedTuple):
    """What its maker knows of an image before it is stored.

    Attributes:
        name: The MODEL that it was made for, as it was written.
        model: What the model is.
        machine: What it needs.
        arena: Where the process has reserved addresses.
        process: What was frozen.
        decode_steps: How its clones compute decode steps, and why, for people; see
            `EAGER_FOR_NOW`.
        gpu: What it had on a GPU; None where it had none.
        engine: Whose engine it is of; None for a worker of our own.
    """

    name: str
    model: ModelKey
    machine: Machine
    arena: Arena
    process: Process
    decode_steps: str = ""
    gpu: GpuImage | None = None
    engine: EngineKey | None = None


class Manifest(NamedTuple):
    """An image.

    Attributes:
        created: When it was made, in seconds since 1970.
        name: As `Draft` has it, like the next seven.
        objects: What is in the store.
        files: What the image consists of, in the order of their names.
        oracle: What it must answer; None where nobody has asked.
        signature: HMAC-SHA256 of all of the above, in hexadecimal; None where it is not signed.
    """

    created: float
    name: str
    model: ModelKey
    machine: Machine
    arena: Arena
    process: Process
    decode_steps: str
    gpu: GpuImage | None
    engine: EngineKey | None
    objects: tuple[StoredObject, ...]
    files: tuple[ImageFile, ...]
    oracle: Oracle | None = None
    signature: str | None = None

    @property
    def id(self) -> str:
        """32 hexadecimal digits: of SHA-256 of all but the oracle and the signature.

        Those two come when the image is there already, and do not make another one of it.
        """
        return _hash(self._replace(oracle=None, signature=None).canonical())[:32]

    @property
    def image_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def stored_bytes(self) -> int:
        """The bytes of all objects."""
        return sum(item.stored_bytes for item in self.objects)

    def with_oracle(self, oracle: object) -> Manifest:
        """The same with an oracle, which may be given as JSON values.

        Raises:
            SnapshotError: It is none.
        """
        found = oracle if isinstance(oracle, Oracle) else Oracle.from_json(oracle)
        return self._replace(oracle=found, signature=None)

    def canonical(self) -> bytes:
        """All but the signature, always in the same bytes: what is signed."""
        content = self.to_json()
        del content["signature"]
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    def encode(self) -> bytes:
        """As it is kept in a store."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def decode(raw: bytes, where: str = "a manifest") -> Manifest:
        """What `encode` has made.

        Raises:
            SnapshotError: It is not a manifest of this version; it says which field is wrong.
        """
        return Manifest.from_json(parse(raw, where), where)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return {
            "version": VERSION,
            "created": self.created,
            "name": self.name,
            "model": self.model.to_json(),
            "machine": self.machine.to_json(),
            "arena": self.arena.to_json(),
            "process": self.process.to_json(),
            "decode_steps": self.decode_steps,
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            "engine": None if self.engine is None else self.engine.to_json(),
            "objects": [item.to_json() for item in self.objects],
            "files": [file.to_json() for file in self.files],
            "oracle": None if self.oracle is None else self.oracle.to_json(),
            "signature": self.signature,
        }

    @staticmethod
    def from_json(value: object, where: str = "a manifest") -> Manifest:
        """What `to_json` has made.

        Args:
            value: JSON values.
            where: Where they are from, for errors.

        Raises:
            SnapshotError: It is not a manifest of this version; it says which field is wrong.
        """
        fields = Fields(value, where)
        version = fields.integer("version")
        if version != VERSION:
            raise fields.wrong("version", f"{VERSION}", f"{version}")
        manifest = Manifest(
            fields.number("created"),
            fields.text("name"),
            ModelKey.from_json(fields.child("model")),
            Machine.from_json(fields.child("machine")),
            Arena.from_json(fields.child("arena")),
            Process.from_json(fields.child("process")),
            fields.text("decode_steps"),
            None if fields.absent("gpu") else GpuImage.from_json(fields.child("gpu")),
            None if fields.absent("engine") else EngineKey.from_json(fields.child("engine")),
            tuple(map(StoredObject.from_json, fields.children("objects"))),
            tuple(map(ImageFile.from_json, fields.children("files"))),
            None if fields.absent("oracle") else Oracle.from_json(fields.child("oracle")),
            None if fields.absent("signature") else fields.text("signature", _HASH),
        )
        fields.end()
        check_files(fields, manifest.objects, manifest.files)
        return manifest


def is_image_id(text: str) -> bool:
    """Whether a text is written like the id of an image."""
    return _ID.fullmatch(text) is not None


def _hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
