"""An engine's captured steps into an archive, and out of one into the steps of another engine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from coldframe.benchmarks.gpu.engine import Engine
from coldframe.loader.devices.driver import Driver, Stream
from coldframe.loader.devices.graph_calls import Executable, Graph, GraphCalls
from coldframe.runtime.engine.buckets import Bucket
from coldframe.snapshot.graph_file import decode, encode
from coldframe.snapshot.graphs import (
    GraphFingerprint,
    GraphSaver,
    Kernels,
    Rebuilt,
    rebuild,
)

__all__ = ["install", "kept", "made"]


def kept(engine: Engine) -> tuple[bytes, dict[str, str]]:
    """All captured steps that can be kept, as an archive, and why the others cannot.

    Raises:
        DeviceError: The driver cannot say what is in a graph.
    """
    saver = GraphSaver(engine.gpu.context.driver, engine.regions)
    refused = {}
    for bucket, captured in engine.graphs.captured.items():
        why = "it has no handle of the driver's"
        if captured.handle is not None:
            why = saver.add(_key(bucket), Graph(captured.handle)) or ""
        if why:
            refused[_key(bucket)] = why
    return encode(saver.archive(_fingerprint(engine))), refused


def made(engine: Engine, raw: bytes) -> Rebuilt:
    """The steps of an archive, made of it; nobody has tried them yet.

    Args:
        engine: It has captured something already, by which kernels are found.
        raw: The archive.

    Raises:
        SnapshotError: The archive is not for this process.
        DeviceError: The driver cannot make them.
    """
    driver = engine.gpu.context.driver
    kernels = Kernels(GraphCalls(driver))
    for captured in engine.graphs.captured.values():
        if captured.handle is not None:
            kernels.learn(Graph(captured.handle))
    archive = decode(raw, "the archive", _fingerprint(engine))
    return rebuild(driver, archive, engine.regions, kernels)


def install(engine: Engine, rebuilt: Rebuilt, scratch: int) -> int:
    """Has an engine's steps be those of an archive; how many.

    Args:
        engine: Its steps hold each against an eager one before they take it.
        rebuilt: Must live as long as the engine.
        scratch: Bytes of scratch that they were captured in.
    """
    calls = GraphCalls(engine.gpu.context.driver)
    for key, executable in rebuilt.graphs.items():
        rows, blocks = map(int, key.split("x"))
        engine.graphs.install(Bucket(rows, blocks), _Made(calls, executable), scratch)
    return len(rebuilt.graphs)


class _Made:
    def __init__(self, calls: GraphCalls, executable: Executable) -> None:
        self._calls = calls
        self._executable = executable

    def replay(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        self._calls.launch(self._executable, Stream(stream))


def _key(bucket: Bucket) -> str:
    return f"{bucket.sequences}x{bucket.blocks}"


def _fingerprint(engine: Engine) -> GraphFingerprint:
    try:
        cublas = version("nvidia-cublas")
    except PackageNotFoundError:
        cublas = "unknown"
    driver: Driver = engine.gpu.context.driver
    return GraphFingerprint.here(
        GraphCalls(driver),
        engine.gpu.context.ordinal,
        engine.regions,
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        cublas=cublas,
        model=engine.plan.fingerprint,
    )
