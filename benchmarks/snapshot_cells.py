"""What the benchmark of snapshots measures: every cell once in each of its runs, interleaved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import (
    cold_start,
    evict_files,
    import_torch_s,
    warm_page_cache,
)
from coldframe.benchmarks.many_clones import Served, serve
from coldframe.benchmarks.restores import (
    Restored,
    files_in,
    freeze_point_s,
    import_engine_s,
    read_direct_s,
    read_s,
    restore_once,
)
from coldframe.loader.errors import PlatformError
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.store import open_store

__all__ = ["CODECS", "SLOW", "Cells", "Image", "cell_name"]

SLOW = "500MB/s"
"""What the throttled starts load at."""

CODECS = {"lz4": "auto", "raw": "none"}
"""How images are packed, and what `--compress` is for that; the first is what everybody gets."""

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a store of its own.

    Args:
        store: The directory.
        manifest: What the image is.
        files: All files of the store.
        created_s: Seconds that `coldframe snapshot create` took.
    """

    store: Path
    manifest: Manifest
    files: Sequence[Path]
    created_s: float

    @classmethod
    def create(cls, model: Path, root: Path, codec: str) -> Image:
        """Makes one.

        Raises:
            PlatformError: That failed.
        """
        print(f"an image, {codec}", file=sys.stderr)
        store = root / codec
        command = [
            *(str(Path(sys.executable).parent / "coldframe"), "snapshot", "create", str(model)),
            *("--snapshot-store", str(store), "--compress", CODECS[codec]),
            *("--graphs", "off", "--json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PlatformError(
                "an image cannot be made", where=" ".join(command), got=done.stderr.strip()
            )
        seconds = json.loads(done.stdout)["seconds"]
        (manifest,) = open_store(str(store)).manifests()[0]
        return cls(store, manifest, files_in(store), seconds)


class Cells:
    """What was measured so far, by name.

    Args:
        model: The checkpoint's directory.
        images: One for each codec.
        clones: How many at once.
        left_out: Gets what cannot be measured here, and why.
    """

    def __init__(
        self, model: Path, images: dict[str, Image], clones: int, left_out: dict[str, str]
    ) -> None:
        self.images = images
        self.clones = clones
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.restored: defaultdict[str, list[Restored]] = defaultdict(list)
        self.starts: defaultdict[str, list[Any]] = defaultdict(list)
        self.many: defaultdict[str, list[Served]] = defaultdict(list)
        self._model = model
        self._facts = ModelFacts(str(model))
        self._left_out = left_out

    def run(self) -> None:
        """Runs every cell once."""
        self.seconds["import torch"].append(import_torch_s())
        self.seconds["import engine"].append(import_engine_s())
        self.seconds["freeze point"].append(
            freeze_point_s(self._facts, self.images["lz4"].manifest)
        )
        for codec, image in self.images.items():
            read_s(image.files)
            for verify in (False, True):
                for stage in ("exec", "up", "prepared"):
                    name = cell_name(codec, verify, stage)
                    self.restored[name].append(
                        restore_once(self._model, image.store, verify=verify, stage=stage)
                    )
            try:
                self._cold(codec, image)
            except PlatformError as error:
                self._left_out[f"{codec}: cold disk"] = str(error)
        self._start("fresh", "off")
        self._start("restored", "require")
        self._start("slow", "require", f"--throttle={SLOW}")
        for mode in ("off", "require"):
            snapshot = SnapshotOptions(mode, str(self.images["lz4"].store))
            self.many[mode].append(serve(self._model, self.clones, snapshot))

    def _cold(self, codec: str, image: Image) -> None:
        evict_files(image.files)
        cold = restore_once(self._model, image.store, verify=True)
        evict_files(image.files)
        self.seconds[f"{codec}: read"].append(read_s(image.files))
        self.seconds[f"{codec}: read directly"].append(read_direct_s(image.files))
        self.restored[f"{codec}: cold"].append(cold)

    def _start(self, name: str, mode: str, *arguments: str) -> None:
        warm_page_cache(self._model)
        store = self.images["lz4"].store
        # As a container has it: what is in the environment is known before the flags are read.
        environment = {"COLDFRAME_SNAPSHOT": mode, "COLDFRAME_SNAPSHOT_STORE": str(store)}
        self.starts[name].append(
            cold_start(
                self._model, *arguments, prompt_ids=_PROMPT, tokens=2, environment=environment
            )
        )


def cell_name(codec: str, verify: bool, stage: str) -> str:
    return f"{codec}, {'hashed' if verify else 'not hashed'}, {stage}"
