"""Captured graphs kept for the next process: saved, and put together there without a capture.

A graph that was captured in one process is of no use to another: its pointers and the handles of
its kernels are that process's own. Here pointers become offsets in regions of memory that every
process reserves, and kernels what they are known by. A graph of which anything cannot be told so is
left out, with the reason; the others are kept all the same.

What is put together again must be checked against an eager step before it answers anybody: that is
left to whoever runs it, and so is to capture again what could not be had.

- `graph_nodes.py`: the form in which a graph is kept; `graph_file.py`: the bytes of an archive.
- `graph_reading.py`, `graph_pointers.py`, `graph_kernels.py`: a graph node by node, the pointers
  among its parameters, and what its kernels are known by.
- `graph_rebuild.py`: graphs put together; `graph_fingerprint.py`: what they take for granted;
  `graph_store.py`: where archives are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from coldframe.loader.devices.driver import Driver, Stream
from coldframe.loader.devices.graph_calls import (
    READING,
    REBUILDING,
    Executable,
    Graph,
    GraphCalls,
)
from coldframe.loader.errors import DeviceError, DeviceLost, GraphRefused
from coldframe.snapshot.graph_file import GraphArchive
from coldframe.snapshot.graph_fingerprint import GraphFingerprint
from coldframe.snapshot.graph_kernels import Kernels
from coldframe.snapshot.graph_nodes import MOST_REGIONS, GraphNodes, Region
from coldframe.snapshot.graph_reading import GraphReader
from coldframe.snapshot.graph_rebuild import Rebuilder

__all__ = [
    "GraphArchive",
    "GraphBuilder",
    "GraphFingerprint",
    "GraphSaver",
    "Kernels",
    "Rebuilt",
    "Region",
    "rebuild",
    "save",
]


class GraphSaver:
    """Makes an archive graph by graph, so that who waits need not wait for all of them.

    Args:
        driver: Whose graphs they are.
        regions: The memory that pointers may lead into; none overlaps another.

    Raises:
        DeviceError: The driver cannot say what is in a graph.
        GraphRefused: The regions overlap, or are too many.
    """

    def __init__(self, driver: Driver, regions: Sequence[Region]) -> None:
        _check(regions)
        calls = GraphCalls(driver)
        calls.demand(READING)
        self._reader = GraphReader(calls, regions)
        self._graphs: dict[str, GraphNodes] = {}
        self._refused: dict[str, str] = {}

    def add(self, key: str, graph: Graph) -> str | None:
        """Takes one graph.

        Args:
            key: What it will be asked for by.
            graph: As it was captured.

        Returns:
            Why it cannot be kept; None where it is.

        Raises:
            DeviceLost: There is no device any more.
        """
        try:
            self._graphs[key] = self._reader.read(graph)
        except DeviceLost:
            raise
        except (GraphRefused, DeviceError) as error:
            self._refused[key] = str(error)
            return str(error)
        return None

    def archive(
        self,
        fingerprint: GraphFingerprint,
        images: Sequence[bytes] = (),
        notes: Mapping[str, int] | None = None,
    ) -> GraphArchive:
        """The graphs that were taken.

        Args:
            fingerprint: What they take for granted.
            images: Code that kernels of theirs come from, where no library brings it.
            notes: Numbers to be had back with them.
        """
        return GraphArchive(
            fingerprint,
            self._reader.regions,
            tuple(self._reader.kernels),
            tuple(self._reader.attributes),
            dict(self._graphs),
            dict(self._refused),
            tuple(images),
            dict(notes or {}),
        )


def save(
    driver: Driver,
    graphs: Mapping[str, Graph],
    regions: Sequence[Region],
    fingerprint: GraphFingerprint,
    images: Sequence[bytes] = (),
) -> GraphArchive:
    """An archive of all that can be kept of some graphs; see `GraphSaver`.

    Raises:
        DeviceError: The driver cannot say what is in a graph, or is lost.
        GraphRefused: The regions overlap, or are too many.
    """
    saver = GraphSaver(driver, regions)
    for key, graph in graphs.items():
        saver.add(key, graph)
    return saver.archive(fingerprint, images)


class GraphBuilder:
    """Puts the graphs of an archive together one by one, without capturing anything.

    Args:
        driver: Whose they will be; its context must be current in this thread.
        archive: What they are in.
        regions: The memory that their pointers lead into, where it is in this process.
        kernels: The kernels of this process, which must live as long as the graphs.

    Attributes:
        refused: By key, why a graph cannot be had: it has to be captured.

    Raises:
        DeviceError: The driver cannot put graphs together.
        GraphRefused: The regions are not those of the archive.
    """

    def __init__(
        self, driver: Driver, archive: GraphArchive, regions: Sequence[Region], kernels: Kernels
    ) -> None:
        _check(regions)
        self._calls = GraphCalls(driver)
        self._calls.demand(REBUILDING)
        self._archive = archive
        self._rebuilder = Rebuilder(self._calls, archive, regions, kernels)
        self.refused = dict(archive.refused)
        for image in archive.images:
            kernels.load(image)

    def build(self, key: str, stream: Stream) -> Executable | None:
        """One graph, on its way to the device: it can be launched behind that in any stream.

        Args:
            key: Of which it was kept.
            stream: What brings it there.

        Returns:
            The caller's to `destroy`; None where it is refused.

        Raises:
            DeviceLost: There is no device any more.
        """
        made: Executable | None = None
        try:
            made = self._rebuilder.rebuild(self._archive.graphs[key])
            self._calls.upload(made, stream)
        except (GraphRefused, DeviceError) as error:
            if made is not None:
                self.destroy(made)
            if isinstance(error, DeviceLost):
                raise
            self.refused[key] = str(error)
            return None
        return made

    def destroy(self, executable: Executable) -> None:
        """Ends one, which may not be running."""
        with suppress(DeviceLost):  # and all that was on it
            self._calls.destroy(executable)


@dataclass(slots=True)
class Rebuilt:
    """Graphs that were put together again.

    Attributes:
        graphs: By key, ready to be launched, and on the device already.
        refused: By key, why one is not among them: it has to be captured.
    """

    graphs: dict[str, Executable]
    refused: dict[str, str]
    _builder: GraphBuilder

    def close(self) -> None:
        """Destroys them; none may be running."""
        while self.graphs:
            self._builder.destroy(self.graphs.popitem()[1])


def rebuild(
    driver: Driver, archive: GraphArchive, regions: Sequence[Region], kernels: Kernels
) -> Rebuilt:
    """Puts all graphs of an archive together; see `GraphBuilder`.

    Returns:
        All of whose kernels there are, and why the others are not among them.

    Raises:
        DeviceError: The driver cannot put graphs together, or is lost. Nothing is left behind.
        GraphRefused: The regions are not those of the archive.
    """
    builder = GraphBuilder(driver, archive, regions, kernels)
    rebuilt = Rebuilt({}, builder.refused, builder)
    stream = driver.stream()
    try:
        for key in archive.graphs:
            made = builder.build(key, stream)
            if made is not None:
                rebuilt.graphs[key] = made
        driver.synchronize(stream)
    except BaseException:
        rebuilt.close()
        raise
    finally:
        with suppress(DeviceLost):
            driver.destroy_stream(stream)
    return rebuilt


def _check(regions: Sequence[Region]) -> None:
    ordered = sorted(regions, key=lambda region: region.base)
    for before, after in pairwise(ordered):
        if after.base < before.base + before.size:
            raise GraphRefused(
                "regions of memory overlap",
                where=f"{before.name}, {after.name}",
                hint="Reserve each where none of the others is.",
            )
    if len(regions) > MOST_REGIONS:
        raise GraphRefused(
            "there are too many regions", expected=f"at most {MOST_REGIONS}", got=len(regions)
        )
