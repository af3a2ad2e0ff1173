"""What captured graphs take for granted: driver, GPU, libraries, model and memory.

Compared before anything of an archive is unpacked. Graphs hold kernels that a library has chosen
for this GPU, and numbers that only this model has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.snapshot.fields import Fields, Refusal
from coldframe.snapshot.graph_nodes import Region
from coldframe.snapshot.libraries import identity_at_once, mapped_files

__all__ = ["GraphFingerprint"]


class GraphFingerprint(NamedTuple):
    """What graphs were captured with, or what there is here.

    Attributes:
        driver: The CUDA version that the driver is made for.
        libcuda: What tells its library from another build; `none` where it has none.
        gpu: What the maker calls it.
        capability: Its compute capability.
        torch: Its version.
        cuda: What it was built for.
        cublas: What tells the libraries of matrix products from other builds.
        model: What tells the model and its plan from others.
        regions: The names and sizes of the memory that pointers lead into, in their order.
    """

    driver: str
    libcuda: str
    gpu: str
    capability: str
    torch: str
    cuda: str
    cublas: str
    model: str
    regions: tuple[tuple[str, int], ...]

    @staticmethod
    def here(
        calls: GraphCalls,
        ordinal: int,
        regions: Sequence[Region],
        *,
        torch: str,
        cuda: str,
        model: str,
    ) -> GraphFingerprint:
        """That of this process.

        Args:
            calls: The driver's.
            ordinal: Which GPU.
            regions: The memory that pointers may lead into.
            torch: Its version.
            cuda: What torch was built for.
            model: See above.

        Raises:
            DeviceError: The driver does not say.
            SnapshotError: A library was replaced since it was loaded.
        """
        return GraphFingerprint(
            str(calls.driver.version()),
            _mapped("libcuda.so"),
            calls.driver.device_name(ordinal),
            calls.capability(ordinal),
            torch,
            cuda,
            _mapped("libcublas.so", "libcublasLt.so"),
            model,
            tuple((region.name, region.size) for region in regions),
        )

    def refusal(self, here: GraphFingerprint) -> Refusal | None:
        """What graphs with this need and another process has not, if anything: the first of it."""
        for name in self._fields:
            expected, got = getattr(self, name), getattr(here, name)
            if expected != got:
                return Refusal(name, _shown(expected), _shown(got))
        return None

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as JSON values."""
        return {**self._asdict(), "regions": [[name, size] for name, size in self.regions]}

    @staticmethod
    def from_json(value: object) -> GraphFingerprint:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "a fingerprint of graphs")
        texts = {name: fields.text(name) for name in GraphFingerprint._fields if name != "regions"}
        regions = []
        for item in fields.items("regions"):
            if not isinstance(item, list) or [type(part) for part in item] != [str, int]:
                raise fields.wrong("regions", "names and sizes", str(item))
            regions.append((item[0], item[1]))
        fields.end()
        return GraphFingerprint(**texts, regions=tuple(regions))


def _mapped(*names: str) -> str:
    """What tells libraries that this process has loaded from other builds; `none` of none."""
    paths = [path for path in mapped_files(os.getpid()) if os.path.basename(path).startswith(names)]
    return ", ".join(map(identity_at_once, paths)) or "none"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{name} {size:,} bytes" for name, size in value) or "none"
    return str(value)
